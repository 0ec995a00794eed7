//! A model that computes nothing and draws the same token all the time: what is left is what the library itself costs. Hosts can
//! try themselves with it, too. Its folder has a config like those of dense models, with the `"token"`, and an empty weight file.

use std::ops::Range;

use mlx_rs::{Array, Dtype};

use super::dense::DenseConfig;
use super::{Model, Scope, vocab_size};
use crate::cache::KvLayout;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{DecoderSpec, Step};

pub(super) struct Null {
    layout: KvLayout,
    token: u32,
}

/// Whether `config` asks for it: it is not among the supported types, because it has nothing to be compared with.
pub(super) fn is_named(config: &ModelConfig) -> bool {
    config.model_type() == "omlx_null"
}

/// The model that it would be if it computed.
pub(super) fn declare(config: &ModelConfig) -> Result<DecoderSpec> {
    config.parse::<DenseConfig>()?.decoder(&Scope::whole(config, 1), |_| None)
}

pub(super) fn load(config: &ModelConfig) -> Result<Null> {
    let token = config.integer("token").unwrap_or(0);
    if token >= vocab_size(config)? {
        return Err(Error::invalid_model(format!("config.json: there is no token {token}")));
    }
    // As the plan reckons: blocks are counted, though nothing is in them.
    let layout = declare(config)?.kv_layout(Dtype::Float32);
    Ok(Null { layout, token: token as u32 })
}

impl Null {
    fn never<T>() -> Result<T> {
        Err(Error::internal("the null model was asked to compute"))
    }
}

impl Model for Null {
    fn constant(&self) -> Option<u32> {
        Some(self.token)
    }

    fn kv_layout(&self) -> &KvLayout {
        &self.layout
    }

    fn embed(&self, _tokens: &Array) -> Result<Array> {
        Self::never()
    }

    fn pass(&self, _x: Array, _layers: Range<usize>, _step: &mut Step<'_>) -> Result<Array> {
        Self::never()
    }

    fn final_norm(&self, _hidden: &Array) -> Result<Array> {
        Self::never()
    }

    fn logits(&self, _hidden: &Array, _wanted: Option<&Array>) -> Result<Array> {
        Self::never()
    }
}
