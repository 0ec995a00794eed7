//! What holds for declarations of several types.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::config::read_json;

/// The config of the fixture `name` with some of the language model's fields replaced.
pub(super) fn changed(name: &str, changes: &Value) -> ModelConfig {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name);
    let mut value = read_json(&folder.join("config.json")).unwrap();
    let wrapped = value.get("text_config").is_some();
    let text = if wrapped { &mut value["text_config"] } else { &mut value };
    text.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    ModelConfig::from_value(value).unwrap()
}

#[test]
fn sizes_of_states_have_bounds() {
    let delta = &[
        "linear_num_value_heads",
        "linear_num_key_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    ][..];
    let cases = [
        ("qwen3_next-f32", delta),
        ("qwen3_5-f32", delta),
        ("granitemoehybrid-f32", &["mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_d_conv", "mamba_n_groups"]),
        ("nemotron_h-f32", &["mamba_num_heads", "mamba_head_dim", "ssm_state_size", "conv_kernel", "n_groups"]),
        ("lfm2-f32", &["conv_L_cache"]),
        ("lfm2_moe-f32", &["conv_L_cache"]),
    ];
    for (name, keys) in cases {
        let all = |size: usize| Value::from_iter(keys.iter().map(|&key| (key.to_owned(), json!(size))));
        let refused = |changes: &Value| {
            let error = plan(&changed(name, changes)).expect_err(&format!("{name}: {changes}"));
            assert_eq!(error.status(), Status::InvalidModel, "{name}: {changes}: {error}");
            check_supported(&changed(name, changes)).unwrap();
        };
        plan(&changed(name, &json!({}))).unwrap();
        // More than any model has.
        assert!(plan(&changed(name, &all(128))).unwrap().state_bytes > 0);
        for key in keys {
            for size in [0, (1 << 24) + 1, 1 << 40, u64::MAX] {
                refused(&Value::from_iter([((*key).to_owned(), json!(size))]));
            }
        }
        // Each within its bound, but not what they make together.
        refused(&all(1 << 24));
    }
}

#[test]
fn widths_that_are_adjusted_have_bounds() {
    let adjusted = |changes: Value| {
        let mut all = json!({ "block_auto_adjust_ff_dim": true });
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        plan(&changed("lfm2-f32", &all)).map_err(|error| error.status())
    };
    adjusted(json!({ "block_ffn_dim_multiplier": 1.5, "block_multiple_of": 256 })).unwrap();
    for changes in [
        json!({ "block_multiple_of": u64::MAX }),
        json!({ "block_ffn_dim_multiplier": 1e300 }),
        json!({ "block_ffn_dim_multiplier": -1.0 }),
    ] {
        assert_eq!(adjusted(changes.clone()).unwrap_err(), Status::InvalidModel, "{changes}");
    }
}

/// The largest base of a rotation: that of layers which see everything.
fn theta(name: &str, changes: &Value) -> f32 {
    let config = changed(name, changes);
    let mut spec = declare(&config, &Scope::whole(&config, 64)).unwrap();
    let latent = spec.layers.iter().filter_map(|layer| match &layer.mixer {
        MixerSpec::Latent(latent) => Some(latent.rope.theta()),
        _ => None,
    });
    let latent: Vec<f32> = latent.collect();
    let turning = spec.attentions().filter_map(|attention| attention.rope.as_ref());
    turning.map(|(rope, _)| rope.theta()).chain(latent).fold(0.0, f32::max)
}

#[test]
fn a_base_among_rotary_settings_goes_before_a_default() {
    let names = [
        ("gemma3_text-f32", 1e6),
        ("glm4_moe_lite-f32", 1e6),
        ("gpt_oss-f32", 1.5e5),
        ("lfm2-f32", 1e6),
        ("lfm2_moe-f32", 1e6),
        ("llama-f32", 1e4),
        ("llama4_text-f32", 5e5),
        ("mixtral-f32", 1e6),
    ];
    for (name, default) in names {
        let silent = json!({ "rope_theta": null, "rope_scaling": null, "rope_parameters": null });
        let with = |key: &str, value: Value| {
            let mut changes = silent.clone();
            changes[key] = value;
            changes
        };
        assert_eq!(theta(name, &silent), default, "{name}");
        assert_eq!(theta(name, &with("rope_theta", json!(7e6))), 7e6, "{name}");
        for object in ["rope_parameters", "rope_scaling"] {
            let rope = |theta: Value| with(object, json!({ "rope_type": "default", "rope_theta": theta }));
            assert_eq!(theta(name, &rope(json!(7e6))), 7e6, "{name}: {object}");
            assert_eq!(theta(name, &rope(Value::Null)), default, "{name}: {object}");
            // What a config says beside the object holds, as it did.
            let mut both = rope(json!(7e6));
            both["rope_theta"] = json!(2e6);
            assert_eq!(theta(name, &both), 2e6, "{name}: {object}");
        }
    }
}
