//! What a pool tells about its models and its memory.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use serde_json::{Map, Value, json};

use super::keeper::unaccounted;
use super::metrics::{self, Numbers, PoolMetrics};
use super::tiers::cold_numbers;
use super::{EnginePool, Slot};
use crate::engine::EngineMetrics;
use crate::ledger::Uses;
use crate::sync::lock;

impl EnginePool {
    /// The pool's memory and its models that are loaded or about to be, as a JSON object.
    pub fn status(&self) -> Value {
        let ledger = self.shared.ledger.status();
        let reading = *lock(&self.shared.reading);
        let uses = |uses: &Uses| json!({ "weights": uses.weights, "cache": uses.cache, "workspace": uses.workspace, "hot": uses.hot });
        let owners: Map<String, Value> = ledger.owners.iter().map(|(id, own)| (id.clone(), uses(own))).collect();
        let state = lock(&self.shared.state);
        let models: Map<String, Value> = state
            .engines
            .iter()
            .filter_map(|(id, slot)| Some((id.clone(), self.describe(slot, &state.settings.get(id))?)))
            .collect();
        json!({
            "device": self.device.name(),
            "memory": {
                "limit": ledger.limit,
                "used": ledger.used,
                "peak": ledger.peak,
                "waiting": ledger.waiting,
                "owners": owners,
                "system_total": reading.total,
                "system_available": reading.available,
                "footprint": reading.footprint,
                "unaccounted": unaccounted(&self.shared, &reading, ledger.used),
                "pressure": reading.pressure as u32,
            },
            "models": models,
            "leaving": state.draining.len() + state.retiring.iter().filter(|engine| !engine.is_gone()).count(),
        })
    }

    /// All numbers that metrics have.
    pub(super) fn numbers(&self) -> PoolMetrics {
        let hot = self.tiers.hot.stats();
        let cold = self.tiers.cold.as_ref().map(|cold| cold.tier.stats());
        let loaded: BTreeMap<String, EngineMetrics> = self.metrics().into_iter().collect();
        let of_model = |id: &str| {
            let mut numbers = Numbers::new();
            loaded.get(id).into_iter().for_each(|engine| metrics::add(&mut numbers, "", engine));
            metrics::add(&mut numbers, "hot_", &hot.models.get(id).copied().unwrap_or_default());
            if let Some(cold) = &cold {
                numbers.extend(cold_numbers("cold_", &cold.models.get(id).cloned().unwrap_or_default()));
            }
            (id.to_owned(), numbers)
        };
        let mut ids: BTreeSet<&str> = loaded.keys().map(String::as_str).collect();
        ids.extend(hot.models.keys().map(|id| &**id));
        ids.extend(cold.iter().flat_map(|cold| cold.models.keys()).map(String::as_str));
        let models: Vec<_> = ids.into_iter().map(of_model).collect();
        let (ledger, reading) = (self.shared.ledger.status(), *lock(&self.shared.reading));
        let mut pool = Numbers::new();
        let mut number = |name: &str, value: u64| drop(pool.insert(name.to_owned(), value.into()));
        number("models_loaded", loaded.len() as u64);
        number("memory_limit_bytes", ledger.limit);
        number("memory_used_bytes", ledger.used);
        number("memory_peak_bytes", ledger.peak);
        number("memory_waiting_bytes", ledger.waiting);
        number("memory_footprint_bytes", reading.footprint);
        number("memory_unaccounted_bytes", unaccounted(&self.shared, &reading, ledger.used));
        number("hot_limit_bytes", hot.limit);
        number("hot_bytes", hot.bytes);
        if let Some(cold) = &cold {
            number("cold_limit_bytes", cold.limit);
            pool.extend(cold_numbers("cold_", &cold.sums));
        }
        PoolMetrics { models, pool }
    }

    fn describe(&self, slot: &Slot, settings: &super::ModelSettings) -> Option<Value> {
        let engine = slot.engine.as_ref()?;
        let (requests, last_used) = engine.activity();
        let state = match (engine.ended(), engine.loaded()) {
            (Some(_), _) => "failed",
            (None, Some(_)) => "loaded",
            (None, None) => "loading",
        };
        let (there, all) = engine.loading();
        Some(json!({
            "state": state,
            "error": engine.ended().map(|error| error.message().to_owned()),
            "loaded_bytes": there,
            "weight_bytes": all,
            "requests": requests,
            "idle_seconds": Instant::now().saturating_duration_since(last_used).as_secs_f64(),
            "pinned": settings.pinned,
            "ttl_seconds": settings.ttl(self.shared.ttl).map(|ttl| ttl.as_secs_f64()),
        }))
    }
}
