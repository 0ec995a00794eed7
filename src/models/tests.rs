//! What holds for declarations of several types.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::config::read_json;

/// The config of the fixture `name` with some of the language model's fields replaced.
fn changed(name: &str, changes: &Value) -> ModelConfig {
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
