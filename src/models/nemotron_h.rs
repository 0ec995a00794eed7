//! Nemotron-H and what follows it (NVIDIA 2025; `NemotronHForCausalLM`): layers of one part each, Mamba-2, attention that knows no
//! positions, squared ReLUs, or experts of these. Names and orders of operations are those of mlx-lm's `nemotron_h.py`.

use serde::Deserialize;
use serde_json::json;

use super::Scope;
use super::dense::DenseConfig;
use super::grouped::GroupedConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{
    Activation, DecoderSpec, ExpertActivation, ExpertsSpec, FeedForwardSpec, LatentExpertsSpec, LayerSpec, Mamba2Spec,
    MixerSpec, MlpSpec, NormPlacement, RecurrentSpec, SharedSpec,
};

/// Added to the sum that experts' weights are divided by.
const WEIGHT_EPS: f32 = 1e-20;

#[derive(Debug, Deserialize)]
struct NemotronConfig {
    /// A letter for each layer.
    hybrid_override_pattern: Option<Letters>,
    /// A word for each layer, which transformers has in two places.
    layers_block_type: Option<Vec<String>>,
    layer_types: Option<Vec<String>>,
    layer_norm_epsilon: f32,
    mlp_bias: bool,
    mlp_hidden_act: Option<String>,
    mamba_hidden_act: Option<String>,
    sliding_window: Option<usize>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Letters {
    Joined(String),
    Apart(Vec<String>),
}

#[derive(Debug, Deserialize)]
struct MambaConfig {
    mamba_num_heads: usize,
    mamba_head_dim: usize,
    ssm_state_size: usize,
    conv_kernel: usize,
    n_groups: usize,
    mamba_proj_bias: bool,
    /// Of the same projections, in the authors' code.
    use_bias: bool,
    use_conv_bias: bool,
    time_step_limit: Option<(f32, f32)>,
}

#[derive(Debug, Deserialize)]
struct MixtureConfig {
    moe_shared_expert_intermediate_size: Option<usize>,
    moe_latent_size: Option<usize>,
}

/// What a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Mamba,
    Attention,
    Mlp,
    Experts,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let own: NemotronConfig = config.parse()?;
    own.check()?;
    let parts = own.parts()?;
    // Older configs call the width of a head otherwise.
    let head_dim = config.field("attention_head_dim");
    let dense: DenseConfig = config.parse_over(json!({
        "rms_norm_eps": own.layer_norm_epsilon, "num_hidden_layers": parts.len(), "head_dim": head_dim,
    }))?;
    if dense.num_hidden_layers != parts.len() {
        return Err(Error::invalid_model(format!(
            "config.json: kinds of {} layers for {}",
            parts.len(),
            dense.num_hidden_layers
        )));
    }
    let mlp = MlpSpec {
        inner: dense.intermediate_size,
        bias: own.mlp_bias,
        activation: Activation::SquaredRelu,
        gated: false,
    };
    let norm_eps = own.layer_norm_epsilon;
    let dense = DenseConfig { layer_types: None, rms_norm_eps: norm_eps, ..dense };
    let mut spec = dense.decoder(scope, |_| None)?;
    spec.embedding = "embeddings";
    spec.final_norm = "norm_f";
    spec.norms = NormPlacement::Before(["norm", "norm"]);
    spec.predicts_ahead = true;
    spec.attentions().for_each(|attention| attention.rope = None);
    for (layer, part) in spec.layers.iter_mut().zip(parts) {
        let (mixer, feed_forward) = match part {
            Part::Attention => (layer.mixer.clone(), FeedForwardSpec::None),
            Part::Mamba => (recurrent(config, spec.hidden, norm_eps)?, FeedForwardSpec::None),
            Part::Mlp => (MixerSpec::None, FeedForwardSpec::Plain(mlp.clone(), ["up_proj", "down_proj"])),
            Part::Experts => (MixerSpec::None, FeedForwardSpec::Experts(experts(config, own.mlp_bias)?)),
        };
        *layer = LayerSpec { mixer, mixer_path: "mixer", feed_forward, feed_forward_path: "mixer" };
    }
    Ok(spec)
}

impl NemotronConfig {
    fn check(&self) -> Result<()> {
        let other = |value: &Option<String>, known: &str| value.as_ref().is_some_and(|value| value != known);
        if other(&self.mlp_hidden_act, "relu2") || other(&self.mamba_hidden_act, "silu") {
            return Err(Error::unsupported(
                "another \"mlp_hidden_act\" or \"mamba_hidden_act\" than \"relu2\" and \"silu\"",
            ));
        }
        if self.sliding_window.is_some() {
            return Err(Error::unsupported("a \"sliding_window\" is not supported for this architecture"));
        }
        Ok(())
    }

    /// What the layers are: from the letters, or from the words if there are none.
    fn parts(&self) -> Result<Vec<Part>> {
        let words = self.layers_block_type.as_ref().or(self.layer_types.as_ref());
        match (&self.hybrid_override_pattern, words) {
            (Some(Letters::Joined(letters)), _) => {
                letters.chars().map(|letter| Part::named(letter.encode_utf8(&mut [0; 4]))).collect()
            }
            (Some(Letters::Apart(names)), _) | (None, Some(names)) => {
                names.iter().map(|name| Part::named(name)).collect()
            }
            (None, None) => Err(Error::invalid_model("config.json: \"hybrid_override_pattern\" is missing")),
        }
    }
}

impl Part {
    fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "M" | "mamba" | "linear_attention" | "conv" => Self::Mamba,
            "*" | "attention" | "full_attention" => Self::Attention,
            "-" | "mlp" => Self::Mlp,
            "E" | "moe" => Self::Experts,
            other => return Err(Error::unsupported(format!("layer type {other:?} is not supported"))),
        })
    }
}

fn recurrent(config: &ModelConfig, hidden: usize, norm_eps: f32) -> Result<MixerSpec> {
    let own: MambaConfig = config.parse()?;
    if own.use_bias != own.mamba_proj_bias {
        return Err(Error::unsupported("a \"use_bias\" that is not \"mamba_proj_bias\""));
    }
    Ok(MixerSpec::Recurrent(RecurrentSpec::Mamba2(Mamba2Spec {
        hidden,
        heads: own.mamba_num_heads,
        head_width: own.mamba_head_dim,
        state_width: own.ssm_state_size,
        groups: own.n_groups,
        taps: own.conv_kernel,
        step_limits: own.time_step_limit.unwrap_or((0.0, f32::INFINITY)),
        projection_bias: own.mamba_proj_bias,
        convolution_bias: own.use_conv_bias,
        norm_groups: own.n_groups,
        norm_eps,
    })))
}

/// Of which only what all tokens pass, and the projections around the others, have biases.
fn experts(config: &ModelConfig, bias: bool) -> Result<ExpertsSpec> {
    let (grouped, own): (GroupedConfig, MixtureConfig) = (config.parse()?, config.parse()?);
    let experts = grouped.experts(WEIGHT_EPS)?;
    let mut experts =
        experts.ok_or_else(|| Error::invalid_model("config.json: \"n_routed_experts\" is missing or 0"))?;
    experts.activation = ExpertActivation::SquaredRelu;
    experts.projections = ["", "fc1", "fc2"];
    experts.latent = own.moe_latent_size.map(|width| LatentExpertsSpec {
        width,
        bias,
        names: ["fc1_latent_proj", "fc2_latent_proj"],
    });
    if let Some(shared) = &mut experts.shared {
        // One, of this width whatever their number.
        let inner = own
            .moe_shared_expert_intermediate_size
            .ok_or_else(|| Error::invalid_model("config.json: \"moe_shared_expert_intermediate_size\" is missing"))?;
        *shared = SharedSpec { inner, bias, ..shared.clone() };
    }
    Ok(experts)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::error::Status;
    use crate::models::check_supported;
    use crate::models::tests::changed;

    /// The fixture's config with some fields replaced.
    fn declared(changes: Value) -> Result<DecoderSpec> {
        let config = changed("nemotron_h-f32", &changes);
        check_supported(&config)?;
        declare(&config, &Scope::whole(&config, 64))
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for known in [
            json!({}),
            json!({ "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "sliding_window": null }),
            json!({ "hybrid_override_pattern": "M-*-M", "n_routed_experts": null, "n_group": null }),
            json!({ "time_step_limit": [0.0, 1e300], "moe_latent_size": 8 }),
        ] {
            declared(known.clone()).unwrap_or_else(|error| panic!("{known}: {error}"));
        }
        for unknown in [
            json!({ "mlp_hidden_act": "silu" }),
            json!({ "mamba_hidden_act": "gelu" }),
            json!({ "sliding_window": 64 }),
            json!({ "hybrid_override_pattern": "M-*E|" }),
            json!({ "use_bias": true }),
            json!({ "scoring_func": "softmax" }),
        ] {
            let error = declared(unknown.clone()).expect_err(&unknown.to_string());
            assert_eq!(error.status(), Status::Unsupported, "{unknown}: {error}");
        }
        for broken in [
            json!({ "hybrid_override_pattern": "M-*E" }),
            json!({ "hybrid_override_pattern": null }),
            json!({ "n_routed_experts": 0 }),
            json!({ "moe_shared_expert_intermediate_size": null }),
            json!({ "ssm_state_size": null }),
        ] {
            let error = declared(broken.clone()).expect_err(&broken.to_string());
            assert_eq!(error.status(), Status::InvalidModel, "{broken}: {error}");
        }
    }

    #[test]
    fn words_say_the_same_as_letters() {
        let letters = format!("{:?}", declared(json!({})).unwrap());
        for words in [
            json!({ "layers_block_type": ["mamba", "mlp", "attention", "moe", "mamba"], "num_hidden_layers": null }),
            json!({ "layer_types": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"] }),
        ] {
            let mut changes = words.clone();
            changes["hybrid_override_pattern"] = Value::Null;
            assert_eq!(format!("{:?}", declared(changes).unwrap()), letters, "{words}");
        }
        let apart = json!({ "hybrid_override_pattern": ["M", "-", "*", "E", "M"] });
        assert_eq!(format!("{:?}", declared(apart).unwrap()), letters);
        let other = declared(json!({ "hybrid_override_pattern": "M*-EM" })).unwrap();
        assert_ne!(format!("{other:?}"), letters);
    }
}
