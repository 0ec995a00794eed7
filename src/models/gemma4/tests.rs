use std::path::Path;

use mlx_rs::Dtype;

use super::*;
use crate::error::Status;
use crate::models;

/// The config of a fixture.
fn fixture(name: &str) -> Value {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name);
    ModelConfig::load(&folder).unwrap().raw().clone()
}

fn declared(value: Value) -> Result<DecoderSpec> {
    let config = ModelConfig::from_value(value)?;
    models::check_supported(&config)?;
    declare(&config, &Scope::whole(&config, 64))
}

/// `base` with some fields changed, or taken out where they are null here.
fn with(base: &Value, changes: Value) -> Value {
    let mut changed = base.clone();
    let fields = changed.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => fields.remove(key),
            value => fields.insert(key.clone(), value.clone()),
        };
    }
    changed
}

#[test]
fn the_last_layers_read_the_nearest_of_their_kind_and_are_wider() {
    let spec = declared(fixture("gemma4_text-f32")).unwrap();
    let sources = spec.layers.iter().map(|layer| match &layer.mixer {
        MixerSpec::CrossLayer(CrossLayerSpec { source, .. }) => Some(*source),
        _ => None,
    });
    assert_eq!(sources.collect::<Vec<_>>(), [None, None, Some(0), Some(1)]);
    let inner: Vec<usize> = spec.layers.iter().map(|layer| layer.feed_forward.inner()).collect();
    assert_eq!(inner, [16, 16, 32, 32]);
    // Only layers that have keys are in the cache.
    let layout = spec.kv_layout(Dtype::Float32);
    assert_eq!(layout.layers.iter().map(|layer| layer.keys).collect::<Vec<_>>(), [(1, 16), (1, 32)]);
    assert!(spec.crosses_layers() && spec.carried_numbers() == 4 * 16);
    let mixture = declared(fixture("gemma4_text-moe-f32")).unwrap();
    assert!(!mixture.crosses_layers() && mixture.per_layer_input.is_none());
}

#[test]
fn the_text_part_of_a_wrapper_is_the_same_model() {
    let text = fixture("gemma4_text-f32");
    for text in [text.clone(), with(&text, json!({"model_type": null}))] {
        let wrapper = json!({"model_type": "gemma4", "text_config": text, "vision_config": {}, "audio_config": null});
        let spec = declared(wrapper).unwrap();
        assert!(spec.wrapped && spec.crosses_layers());
    }
}

#[test]
fn what_is_not_supported_or_not_said_is_refused() {
    let base = fixture("gemma4_text-f32");
    let mixture = fixture("gemma4_text-moe-f32");
    let cases = [
        (&base, json!({"use_bidirectional_attention": "all"}), Status::Unsupported, "use_bidirectional_attention"),
        (&base, json!({"per_layer_config": {"1": {"head_dim": 32}}}), Status::Unsupported, "per_layer_config"),
        (&base, json!({"hidden_activation": "silu"}), Status::Unsupported, "hidden_activation"),
        (&base, json!({"vocab_size_per_layer_input": 47}), Status::Unsupported, "47 of 48"),
        (&base, json!({"layer_types": ["full_attention", "sliding_attention"]}), Status::Unsupported, "last layer"),
        (
            &base,
            json!({"layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]}),
            Status::InvalidModel,
            "none of its kind",
        ),
        (
            &base,
            json!({"layer_types": ["sliding_attention", "other", "sliding_attention", "full_attention"]}),
            Status::Unsupported,
            "other",
        ),
        (&base, json!({"num_kv_shared_layers": 4}), Status::InvalidModel, "share keys"),
        (&base, json!({"num_kv_shared_layers": null}), Status::InvalidModel, "num_kv_shared_layers"),
        (&base, json!({"num_key_value_heads": null}), Status::InvalidModel, "num_key_value_heads"),
        (&base, json!({"layer_types": null}), Status::InvalidModel, "layer_types"),
        (&base, json!({"use_double_wide_mlp": null}), Status::InvalidModel, "use_double_wide_mlp"),
        (&base, json!({"final_logit_softcapping": null}), Status::InvalidModel, "final_logit_softcapping"),
        (&base, json!({"global_head_dim": 33}), Status::InvalidModel, "head_dim"),
        (&base, json!({"rope_parameters": {"sliding_attention": {}}}), Status::InvalidModel, "full_attention"),
        (
            &base,
            json!({"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}, "sliding_attention": {}}}),
            Status::Unsupported,
            "proportional",
        ),
        (&mixture, json!({"num_experts": null}), Status::InvalidModel, "num_experts"),
        (&mixture, json!({"top_k_experts": null}), Status::InvalidModel, "top_k_experts"),
        (&mixture, json!({"moe_intermediate_size": null}), Status::InvalidModel, "moe_intermediate_size"),
        (&mixture, json!({"num_global_key_value_heads": 3}), Status::InvalidModel, "multiple"),
    ];
    for (base, changes, status, words) in cases {
        let error = declared(with(base, changes.clone())).expect_err(&format!("{changes}"));
        assert!(error.status() == status && error.to_string().contains(words), "{changes}: {error}");
    }
}

#[test]
fn what_means_nothing_else_is_taken() {
    let base = fixture("gemma4_text-f32");
    let mut uncapped = base.clone();
    uncapped["final_logit_softcapping"] = Value::Null;
    assert_eq!(declared(uncapped).unwrap().logit_cap, None);
    for changes in [
        json!({"use_bidirectional_attention": "vision"}),
        json!({"rope_parameters": null}),
        json!({"hidden_activation": null}),
        json!({"num_kv_shared_layers": 0, "use_double_wide_mlp": null}),
        // Heads of keys in full layers count where keys are values.
        json!({"num_global_key_value_heads": 3}),
    ] {
        declared(with(&base, changes.clone())).unwrap_or_else(|error| panic!("{changes}: {error}"));
    }
}
