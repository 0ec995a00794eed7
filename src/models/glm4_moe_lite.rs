//! GLM-4.7-Flash (`Glm4MoeLiteForCausalLM`): DeepSeek V3's shape with other epsilons.

use serde_json::json;

use super::Scope;
use super::deepseek_v3::{Family, declare_family};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::DecoderSpec;

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let defaults = json!({
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "n_group": 1, "topk_group": 1, "moe_layer_freq": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": true, "routed_scaling_factor": 1.8,
    });
    declare_family(config, scope, Family { defaults, narrow_eps: None, weight_eps: 1e-20 })
}
