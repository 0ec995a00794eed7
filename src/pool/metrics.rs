//! What a pool tells about itself, as JSON and as Prometheus text.

use serde_json::{Map, Value, json};

use crate::engine::EngineMetrics;

/// `{"models": {id: metrics}}`; only loaded models.
pub fn json(models: &[(String, EngineMetrics)]) -> String {
    let object = |metrics: &EngineMetrics| serde_json::to_value(metrics).unwrap_or(Value::Null);
    let models: Map<String, Value> = models.iter().map(|(id, metrics)| (id.clone(), object(metrics))).collect();
    json!({ "models": models }).to_string()
}

/// The text format of Prometheus, version 0.0.4: one family for each metric, with the model as a label. Names end with
/// `_total` where a number only ever grows.
pub fn prometheus(models: &[(String, EngineMetrics)]) -> String {
    const GROWING: [&str; 11] = [
        "steps",
        "partial_steps",
        "step_seconds",
        "host_seconds",
        "build_seconds",
        "encode_seconds",
        "wait_seconds",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "preemptions",
    ];
    let Ok(Value::Object(names)) = serde_json::to_value(EngineMetrics::default()) else { return String::new() };
    let mut text = String::new();
    for name in names.keys() {
        let grows = GROWING.contains(&name.as_str());
        let (family, kind) =
            if grows { (format!("omlx_{name}_total"), "counter") } else { (format!("omlx_{name}"), "gauge") };
        text += &format!("# TYPE {family} {kind}\n");
        for (id, metrics) in models {
            let id = id.replace('\\', r"\\").replace('"', "\\\"").replace('\n', "\\n");
            let value = serde_json::to_value(metrics).ok().and_then(|object| object.get(name).cloned());
            text += &format!("{family}{{model=\"{id}\"}} {}\n", value.unwrap_or_default());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_have_every_number() {
        let metrics = EngineMetrics { steps: 3, step_seconds: 0.25, blocks_free: 7, ..EngineMetrics::default() };
        let models = [("a \"b\"".to_owned(), metrics)];
        let parsed: Value = serde_json::from_str(&json(&models)).unwrap();
        let object = parsed["models"]["a \"b\""].as_object().unwrap();
        assert_eq!((&object["steps"], &object["blocks_free"]), (&json!(3), &json!(7)));
        let text = prometheus(&models);
        assert!(
            text.contains("# TYPE omlx_steps_total counter\nomlx_steps_total{model=\"a \\\"b\\\"\"} 3\n"),
            "{text}"
        );
        assert!(text.contains("# TYPE omlx_blocks_free gauge\n") && text.contains("omlx_step_seconds_total{model"));
        assert_eq!(text.lines().count(), 2 * object.len());
    }
}
