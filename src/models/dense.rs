//! What the configs of dense Llama-like models have in common.

use serde::Deserialize;

use super::Scope;
use crate::error::{Error, Result};
use crate::nn::{
    Activation, AttentionSpec, DecoderSpec, FeedForwardSpec, GatedSpec, LayerSpec, MixerSpec, NormKind, NormPlacement,
    OutputHead, RopeSpec, Window,
};

/// The shared fields of `config.json`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct DenseConfig {
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub intermediate_size: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub rms_norm_eps: f32,
    pub vocab_size: usize,
    pub tie_word_embeddings: Option<bool>,
    pub hidden_act: Option<String>,
    /// Another spelling of it.
    pub hidden_activation: Option<String>,
    pub attention_bias: Option<bool>,
    pub mlp_bias: Option<bool>,
    pub sliding_window: Option<usize>,
    pub use_sliding_window: Option<bool>,
    pub max_window_layers: Option<usize>,
    pub layer_types: Option<Vec<String>>,
    pub partial_rotary_factor: Option<f32>,
    #[serde(flatten)]
    pub rope: RopeSpec,
}

/// Upper bound of any size in a config: keeps the products of two of them far from overflow.
const MAX_SIZE: usize = 1 << 24;

/// An error that names the first of `sizes` that is none or too large.
pub(super) fn check_sizes(sizes: &[(&str, usize)]) -> Result<()> {
    match sizes.iter().find(|&&(_, n)| n == 0 || n > MAX_SIZE) {
        Some((name, size)) => Err(Error::invalid_model(format!("config.json: {name:?} is {size}"))),
        None => Ok(()),
    }
}

/// What transformers assumes where a Qwen config has no `max_window_layers`.
const QWEN_WINDOW_LAYERS: usize = 28;

impl DenseConfig {
    fn check(&self) -> Result<()> {
        check_sizes(&[
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.kv_heads()),
            ("head_dim", self.head_dim()),
            ("vocab_size", self.vocab_size),
        ])?;
        if !self.num_attention_heads.is_multiple_of(self.kv_heads()) {
            return Err(Error::invalid_model("config.json: attention heads are not a multiple of key/value heads"));
        }
        if self.sliding_window == Some(0) {
            return Err(Error::invalid_model("config.json: \"sliding_window\" is 0"));
        }
        if !self.head_dim().is_multiple_of(2) {
            return Err(Error::invalid_model("config.json: \"head_dim\" must be even"));
        }
        Ok(())
    }

    /// Of the feed-forward layers; SiLU where the config is silent.
    fn activation(&self) -> Result<Activation> {
        let named = self.hidden_activation.as_deref().or(self.hidden_act.as_deref());
        named.map_or(Ok(Activation::Silu), Activation::named)
    }

    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// The sliding window of `layer`: from `layer_types` where given, else from `default`.
    fn window(&self, layer: usize, default: Option<usize>) -> Result<Option<usize>> {
        let Some(types) = &self.layer_types else { return Ok(default) };
        match types.get(layer).map(String::as_str) {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => self
                .sliding_window
                .map(Some)
                .ok_or_else(|| Error::invalid_model("config.json: a sliding layer needs \"sliding_window\"")),
            Some(other) => Err(Error::unsupported(format!("layer type {other:?} is not supported"))),
            None => Err(Error::invalid_model("config.json: \"layer_types\" has fewer entries than layers")),
        }
    }

    /// The declaration of a model whose layers are all alike but for their window; `default_window` gives the
    /// window of a layer by its index where the config has no `layer_types`. Other traits are set by the caller.
    pub fn decoder(&self, scope: &Scope, default_window: impl Fn(usize) -> Option<usize>) -> Result<DecoderSpec> {
        self.check()?;
        let attention = AttentionSpec {
            heads: self.num_attention_heads,
            kv_heads: self.kv_heads(),
            head_dim: self.head_dim(),
            scale: (self.head_dim() as f32).powf(-0.5),
            qkv_bias: self.attention_bias.unwrap_or(false),
            output_bias: self.attention_bias.unwrap_or(false),
            fused: false,
            gated: false,
            output_name: "o_proj",
            keys_as_values: false,
            qk_norm: None,
            value_norm: None,
            position_scale: None,
            rope: Some((self.rope.clone(), self.head_dim())),
            window: None,
            soft_cap: None,
            sinks: false,
        };
        let feed_forward = FeedForwardSpec::Gated(GatedSpec {
            inner: self.intermediate_size,
            bias: self.mlp_bias.unwrap_or(false),
            activation: self.activation()?,
            names: GatedSpec::NAMES,
            joined: None,
        });
        let layers = (0..self.num_hidden_layers)
            .map(|layer| {
                let window = self.window(layer, default_window(layer))?.map(Window::Sliding);
                Ok(LayerSpec {
                    mixer: MixerSpec::Attention(AttentionSpec { window, ..attention.clone() }),
                    mixer_path: "self_attn",
                    feed_forward: feed_forward.clone(),
                    feed_forward_path: "mlp",
                })
            })
            .collect::<Result<_>>()?;
        Ok(DecoderSpec {
            hidden: self.hidden_size,
            vocab: self.vocab_size,
            norm: NormKind::Rms,
            norm_eps: self.rms_norm_eps,
            norms: NormPlacement::BEFORE,
            embedding: "embed_tokens",
            final_norm: "norm",
            is_centred: None,
            embedding_scale: 1.0,
            per_layer_input: None,
            residual_scale: 1.0,
            layer_scalar: false,
            head: match (scope.head, self.tie_word_embeddings) {
                (false, _) => OutputHead::None,
                (true, Some(true)) => OutputHead::Tied,
                (true, Some(false)) => OutputHead::Own,
                (true, None) => OutputHead::AsStored,
            },
            logit_scale: 1.0,
            logit_cap: None,
            predicts_ahead: false,
            wrapped: scope.wrapped,
            max_positions: self.rope.max_positions(),
            context: scope.context,
            layers,
        })
    }

    /// Qwen's rule: with `use_sliding_window`, the layers from `max_window_layers` on slide.
    pub fn qwen_window(&self, layer: usize) -> Option<usize> {
        let slides =
            self.use_sliding_window.unwrap_or(false) && layer >= self.max_window_layers.unwrap_or(QWEN_WINDOW_LAYERS);
        self.sliding_window.filter(|_| slides)
    }
}
