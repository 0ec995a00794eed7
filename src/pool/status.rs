//! What a pool tells about its models and its memory.

use std::time::Instant;

use serde_json::{Map, Value, json};

use super::keeper::unaccounted;
use super::{EnginePool, Slot};
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
