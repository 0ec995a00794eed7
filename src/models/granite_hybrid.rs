//! Granite 4 with states (IBM 2025; `GraniteMoeHybridForCausalLM`): Mamba-2 in most layers, Granite's four factors, and experts or
//! none. Names, defaults and orders of operations are those of mlx-lm's `granitemoehybrid.py`.

use serde::Deserialize;
use serde_json::json;

use super::Scope;
use super::dense::DenseConfig;
use super::granite::Factors;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{
    Activation, DecoderSpec, ExpertsSpec, FeedForwardSpec, Mamba2Spec, MixerSpec, RecurrentSpec, RouterSpec, SharedSpec,
};

/// What authors call the matrix of gate and up, and down; MLX's tools keep that of shared experts.
const JOINED: [&str; 2] = ["input_linear", "output_linear"];

#[derive(Debug, Deserialize)]
struct HybridConfig {
    layer_types: Vec<String>,
    position_embedding_type: Option<String>,
    num_local_experts: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct MixtureConfig {
    num_local_experts: usize,
    num_experts_per_tok: usize,
    shared_intermediate_size: usize,
}

#[derive(Debug, Deserialize)]
struct MambaConfig {
    mamba_n_heads: usize,
    mamba_d_head: usize,
    mamba_d_state: usize,
    mamba_d_conv: usize,
    mamba_n_groups: usize,
    mamba_proj_bias: bool,
    mamba_conv_bias: bool,
    time_step_limit: Option<(f32, f32)>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse_over(json!({ "tie_word_embeddings": true }))?;
    let own: HybridConfig = config.parse()?;
    let (depth, norm_eps) = (dense.num_hidden_layers, dense.rms_norm_eps);
    if own.layer_types.len() != depth {
        return Err(Error::invalid_model(format!(
            "config.json: \"layer_types\" has {} entries for {depth} layers",
            own.layer_types.len()
        )));
    }
    // Its kinds are not those of windows.
    let mut spec = DenseConfig { layer_types: None, ..dense }.decoder(scope, |_| None)?;
    config.parse::<Factors>()?.apply(&mut spec)?;
    match own.position_embedding_type.as_deref() {
        None | Some("rope") => {}
        Some("nope") => spec.attentions().for_each(|attention| attention.rope = None),
        Some(other) => {
            return Err(Error::unsupported(format!("\"position_embedding_type\" {other:?} is not supported")));
        }
    }
    let sparse = own.num_local_experts.is_some_and(|count| count > 0);
    let experts = sparse.then(|| config.parse::<MixtureConfig>()).transpose()?;
    let hidden = spec.hidden;
    for (layer, kind) in spec.layers.iter_mut().zip(&own.layer_types) {
        match kind.as_str() {
            "attention" => {}
            "mamba" => {
                let recurrent = config.parse::<MambaConfig>()?.recurrent(hidden, norm_eps);
                (layer.mixer, layer.mixer_path) = (MixerSpec::Recurrent(recurrent), "mamba");
            }
            other => return Err(Error::unsupported(format!("layer type {other:?} is not supported"))),
        }
        let FeedForwardSpec::Gated(mlp) = &mut layer.feed_forward else { continue };
        match &experts {
            Some(experts) => {
                if mlp.activation != Activation::Silu {
                    return Err(Error::unsupported("experts with another \"hidden_act\" than \"silu\""));
                }
                layer.feed_forward = FeedForwardSpec::Experts(experts.experts(mlp.inner));
                layer.feed_forward_path = "block_sparse_moe";
            }
            // Authors keep it where others have their shared experts.
            None => {
                layer.feed_forward_path = "";
                mlp.names = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
                mlp.joined = Some(["shared_mlp.input_linear", "shared_mlp.output_linear"]);
            }
        }
    }
    Ok(spec)
}

impl MixtureConfig {
    /// Experts of width `inner`.
    fn experts(&self, inner: usize) -> ExpertsSpec {
        let shared = SharedSpec::new("shared_mlp", self.shared_intermediate_size);
        let shared = SharedSpec { beside: true, joined: Some(JOINED), ..shared };
        let router = RouterSpec::softmax_of_chosen("router.layer");
        let experts = ExpertsSpec::new(self.num_local_experts, self.num_experts_per_tok, inner, router);
        ExpertsSpec { shared: Some(shared), ..experts }
    }
}

impl MambaConfig {
    fn recurrent(&self, hidden: usize, norm_eps: f32) -> RecurrentSpec {
        RecurrentSpec::Mamba2(Mamba2Spec {
            hidden,
            heads: self.mamba_n_heads,
            head_width: self.mamba_d_head,
            state_width: self.mamba_d_state,
            groups: self.mamba_n_groups,
            taps: self.mamba_d_conv,
            step_limits: self.time_step_limit.unwrap_or((0.001, 100.0)),
            projection_bias: self.mamba_proj_bias,
            convolution_bias: self.mamba_conv_bias,
            norm_groups: 1,
            norm_eps,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use safetensors::SafeTensors;
    use safetensors::tensor::TensorView;
    use serde_json::Value;

    use super::*;
    use crate::error::Status;
    use crate::mlx::{self, Device};
    use crate::models::tests::changed;
    use crate::models::{self, check_supported};
    use crate::weights::Weights;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
    }

    /// The fixture's config with some fields replaced.
    fn declared(changes: Value) -> Result<DecoderSpec> {
        let config = changed("granitemoehybrid-f32", &changes);
        check_supported(&config)?;
        declare(&config, &Scope::whole(&config, 64))
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let kinds = |kinds: [&str; 3]| json!({ "layer_types": kinds });
        for known in [
            json!({}),
            json!({ "position_embedding_type": "rope" }),
            json!({ "num_local_experts": 0, "hidden_act": "gelu" }),
            kinds(["attention", "attention", "attention"]),
            json!({ "layer_types": ["attention", "attention", "attention"], "mamba_n_heads": null }),
        ] {
            declared(known.clone()).unwrap_or_else(|error| panic!("{known}: {error}"));
        }
        for unknown in [
            json!({ "position_embedding_type": "alibi" }),
            json!({ "hidden_act": "gelu" }),
            kinds(["mamba", "attention", "linear"]),
            kinds(["mamba", "mamba", "mamba"]),
        ] {
            let error = declared(unknown.clone()).expect_err(&unknown.to_string());
            assert_eq!(error.status(), Status::Unsupported, "{unknown}: {error}");
        }
        for broken in [
            json!({ "layer_types": ["mamba", "attention"] }),
            json!({ "layer_types": null }),
            json!({ "mamba_n_heads": null }),
            json!({ "shared_intermediate_size": null }),
            json!({ "logits_scaling": 0 }),
        ] {
            let error = declared(broken.clone()).expect_err(&broken.to_string());
            assert_eq!(error.status(), Status::InvalidModel, "{broken}: {error}");
        }
    }

    /// The one without experts as its authors store it: gate and up are a matrix of `shared_mlp`.
    #[test]
    fn dense_layers_are_found_by_the_names_of_authors() {
        let folder = fixture("granitemoehybrid-4bit");
        let config = ModelConfig::load(&folder).unwrap();
        let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors: BTreeMap<String, _> = file
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
            .collect();
        for name in tensors.keys().filter(|name| name.contains(".mlp.gate_proj.")).cloned().collect::<Vec<_>>() {
            let up = tensors.remove(&name.replace("gate_proj", "up_proj")).unwrap();
            let (dtype, mut shape, mut both) = tensors.remove(&name).unwrap();
            shape[0] *= 2;
            both.extend(up.2);
            tensors.insert(name.replace("mlp.gate_proj", "shared_mlp.input_linear"), (dtype, shape, both));
            let down = tensors.remove(&name.replace("gate_proj", "down_proj")).unwrap();
            tensors.insert(name.replace("mlp.gate_proj", "shared_mlp.output_linear"), down);
        }
        let stored = tempfile::tempdir().unwrap();
        let views = tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        safetensors::serialize_to_file(views, None, &stored.path().join("model.safetensors")).unwrap();
        mlx::init().unwrap();
        let bytes = |folder: &Path| {
            mlx::on_device(Device::Cpu, || {
                Ok(models::load(&config, 64, Weights::open(folder, &config, None)?)?.weight_bytes)
            })
        };
        // Nothing is left over, either.
        assert_eq!(bytes(stored.path()).unwrap(), bytes(&folder).unwrap());
        let sparse = ModelConfig::load(&fixture("granitemoehybrid-f32")).unwrap();
        let wrong = mlx::on_device(Device::Cpu, || {
            models::load(&sparse, 64, Weights::open(stored.path(), &sparse, None)?).map(drop)
        });
        assert!(wrong.is_err());
    }

    #[test]
    fn positions_are_told_only_where_the_config_says_so() {
        let turns = |changes| declared(changes).unwrap().attentions().all(|attention| attention.rope.is_some());
        assert!(!turns(json!({})));
        assert!(turns(json!({ "position_embedding_type": "rope" })));
    }
}
