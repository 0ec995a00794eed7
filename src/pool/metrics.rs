//! What a pool tells about itself, as JSON and as Prometheus text.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Map, Value, json};

/// Numbers by name.
pub type Numbers = Map<String, Value>;

/// Numbers that only ever grow, of an engine and of a tier.
const GROWING: [&str; 24] = [
    "steps",
    "partial_steps",
    "parallel_steps",
    "step_seconds",
    "host_seconds",
    "build_seconds",
    "encode_seconds",
    "wait_seconds",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "texts",
    "preemptions",
    "hot_hit_tokens",
    "cold_hit_tokens",
    "cold_read_bytes",
    "cold_read_seconds",
    "cold_new_tokens",
    "cold_written_tokens",
    "cold_written_bytes",
    "cold_evicted",
    "cold_evicted_bytes",
    "cold_refused",
    "cold_damaged",
];

/// The numbers of each model that is loaded or has rows in the tiers, and of the pool as a whole.
#[derive(Debug, Default)]
pub struct PoolMetrics {
    /// By id, in the order of the ids.
    pub models: Vec<(String, Numbers)>,
    /// Of all together.
    pub pool: Numbers,
}

/// Adds the fields of `part` to `numbers`, with `prefix` before their names.
pub fn add(numbers: &mut Numbers, prefix: &str, part: &impl Serialize) {
    let Ok(Value::Object(fields)) = serde_json::to_value(part) else { return };
    numbers.extend(fields.into_iter().map(|(name, value)| (format!("{prefix}{name}"), value)));
}

impl PoolMetrics {
    /// `{"models": {id: numbers}, "pool": numbers}`.
    pub fn json(self) -> String {
        let models: Map<String, Value> = self.models.into_iter().map(|(id, own)| (id, Value::Object(own))).collect();
        json!({ "models": models, "pool": self.pool }).to_string()
    }

    /// The text format of Prometheus, version 0.0.4: one family for each number, with the model as a label; those of the
    /// pool are called `omlx_pool_…`. Names end with `_total` where a number only ever grows.
    pub fn prometheus(&self) -> String {
        let mut text = String::new();
        let names: BTreeSet<&String> = self.models.iter().flat_map(|(_, numbers)| numbers.keys()).collect();
        for name in names {
            let family = head(&mut text, "omlx_", name);
            for (id, numbers) in &self.models {
                let id = id.replace('\\', r"\\").replace('"', "\\\"").replace('\n', "\\n");
                if let Some(value) = numbers.get(name) {
                    text += &format!("{family}{{model=\"{id}\"}} {value}\n");
                }
            }
        }
        for (name, value) in &self.pool {
            let family = head(&mut text, "omlx_pool_", name);
            text += &format!("{family} {value}\n");
        }
        text
    }
}

/// Begins a family; returns its name.
fn head(text: &mut String, prefix: &str, name: &str) -> String {
    let grows = GROWING.contains(&name);
    let (family, kind) =
        if grows { (format!("{prefix}{name}_total"), "counter") } else { (format!("{prefix}{name}"), "gauge") };
    *text += &format!("# TYPE {family} {kind}\n");
    family
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::hot::HotModelStats;
    use crate::cache::ssd::ColdModelStats;
    use crate::engine::EngineMetrics;

    fn metrics() -> PoolMetrics {
        let mut numbers = Numbers::new();
        add(&mut numbers, "", &EngineMetrics { steps: 3, blocks_free: 7, ..EngineMetrics::default() });
        add(&mut numbers, "hot_", &HotModelStats::default());
        add(&mut numbers, "cold_", &ColdModelStats { hit_tokens: 5, ..ColdModelStats::default() });
        let pool = Numbers::from_iter([("memory_limit".to_owned(), json!(1000))]);
        PoolMetrics { models: vec![("a \"b\"".to_owned(), numbers), ("c".to_owned(), Numbers::new())], pool }
    }

    #[test]
    fn both_forms_have_every_number() {
        let parsed: Value = serde_json::from_str(&metrics().json()).unwrap();
        let object = parsed["models"]["a \"b\""].as_object().unwrap();
        assert_eq!((&object["steps"], &object["cold_hit_tokens"]), (&json!(3), &json!(5)));
        assert_eq!(parsed["pool"]["memory_limit"], 1000);
        let text = metrics().prometheus();
        for line in [
            "# TYPE omlx_steps_total counter\nomlx_steps_total{model=\"a \\\"b\\\"\"} 3\n",
            "# TYPE omlx_blocks_free gauge\nomlx_blocks_free{model=\"a \\\"b\\\"\"} 7\n",
            "omlx_cold_hit_tokens_total{model=\"a \\\"b\\\"\"} 5\n",
            "# TYPE omlx_pool_memory_limit gauge\nomlx_pool_memory_limit 1000\n",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        assert_eq!(text.lines().count(), 2 * object.len() + 2);
    }

    #[test]
    fn what_grows_is_there() {
        let (_, numbers) = metrics().models.swap_remove(0);
        for name in GROWING {
            assert!(numbers.contains_key(name), "there is no {name}");
        }
    }
}
