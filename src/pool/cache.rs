//! What hosts ask of a pool's cache: what is in it, where a prompt is, and to bring, keep, write or forget rows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{EnginePool, State, TierLimits, TierSet, tiers};
use crate::engine::{self, CacheCommand, Engine, Request};
use crate::error::{Error, Result, Status};
use crate::ledger::Part;
use crate::sync::lock;

/// What is on its way to the files is waited for so long before they are cleared.
const LAST_WRITES: Duration = Duration::from_secs(10);

impl EnginePool {
    /// What there is of a model in the caches, as a JSON object: what its engine tells if it is loaded, and its part of the
    /// tiers.
    pub fn cache_stats(&self, model: Option<&str>) -> Result<String> {
        let (id, engine) = {
            let state = lock(&self.shared.state);
            let id = self.cached_name(&state, model)?;
            let engine = state.engines.get(&id).and_then(|slot| slot.engine.clone());
            (id, engine)
        };
        if engine.as_ref().is_some_and(|engine| !engine.has_cache()) {
            return Err(engine::no_cache());
        }
        tiers::stats(&self.tiers, &id, engine.map(|engine| engine.metrics()).as_ref())
    }

    /// Forgets what is cached of a model (of all models) in some tiers, and neither in use nor pinned; returns the bytes
    /// that became free. The pins of a model that is no longer there go with its files.
    pub fn cache_clear(&self, model: Option<&str>, tiers: TierSet) -> Result<u64> {
        let (model, exists, engines) = {
            let state = lock(&self.shared.state);
            let wanted = model.map(|name| self.cached_name(&state, Some(name))).transpose()?;
            let exists = wanted.as_ref().is_none_or(|id| state.catalogue.find(id).is_ok());
            let engines = state.engines.iter().filter(|(id, _)| wanted.as_ref().is_none_or(|wanted| wanted == *id));
            let engines = engines.filter_map(|(_, slot)| slot.engine.clone());
            let engines: Vec<_> = engines.filter(|engine| engine.has_cache()).collect();
            (wanted, exists, engines)
        };
        let model = model.as_deref();
        let mut freed = 0;
        for engine in engines.iter().filter(|_| tiers.pools) {
            freed += engine.cache(CacheCommand::Clear)? as u64;
        }
        if tiers.hot {
            freed += self.tiers.hot.clear(model);
        }
        if let Some(cold) = self.tiers.cold.as_ref().filter(|_| tiers.cold) {
            if !cold.writer.flush(LAST_WRITES) {
                return Err(Error::new(Status::Timeout, "rows of the cache are still being written"));
            }
            freed += match model.filter(|_| !exists) {
                Some(gone) => cold.tier.forget(gone),
                None => cold.tier.clear(model),
            };
        }
        Ok(freed)
    }

    /// The limits of the tiers.
    pub fn cache_limits(&self) -> TierLimits {
        TierLimits::of(&self.tiers)
    }

    /// Changes limits of the tiers; what is beyond them goes.
    pub fn set_cache_limits(&self, limits: TierLimits) -> Result<()> {
        let memory = lock(&self.shared.reading).total;
        limits.apply(&self.tiers, memory)?;
        if !self.device.has_own_memory() {
            self.hot.set(Part::Hot, tiers::host_bytes(&self.tiers));
        }
        Ok(())
    }

    /// Keeps what is cached of the beginning of a request's prompt, in files too; returns for how many tokens.
    pub fn cache_pin(&self, request: &Request) -> Result<usize> {
        let (engine, prompt) = self.prompt(request)?;
        engine.cache(|answer| CacheCommand::Pin(prompt, answer))
    }

    /// Ends the pin of a request's prompt.
    pub fn cache_unpin(&self, request: &Request) -> Result<()> {
        let (engine, prompt) = self.prompt(request)?;
        match engine.cache(|answer| CacheCommand::Unpin(prompt, answer))? {
            true => Ok(()),
            false => Err(Error::not_found("this prompt is not pinned")),
        }
    }

    /// Where the tokens of a request's prompt are cached, as a JSON object.
    pub fn cache_find(&self, request: &Request) -> Result<String> {
        let (engine, prompt) = self.prompt(request)?;
        let found = engine.cache(|answer| CacheCommand::Find(prompt, answer))?;
        serde_json::to_string(&found).map_err(|error| Error::internal(format!("whereabouts: {error}")))
    }

    /// Brings what the tiers have of a request's prompt into the pools; returns how many tokens are there then.
    pub fn cache_prefetch(&self, request: &Request) -> Result<usize> {
        let (engine, prompt) = self.prompt(request)?;
        engine.cache(|answer| CacheCommand::Prefetch(prompt, answer))
    }

    /// Writes everything that a model (or all that are loaded) computed and no file has, and blocks until that is done, or
    /// for `time`.
    pub fn cache_flush(&self, model: Option<&str>, time: Duration) -> Result<()> {
        let Some(cold) = &self.tiers.cold else {
            return Err(Error::unsupported("the pool was opened without a folder for its cache"));
        };
        let (deadline, losses) = (Instant::now() + time, cold.writer.losses());
        let engines = match model {
            Some(model) => vec![self.running(Some(model))?],
            None => {
                let state = lock(&self.shared.state);
                let engines = state.engines.values().filter_map(|slot| slot.engine.clone());
                engines.filter(|engine| engine.has_cache()).collect()
            }
        };
        let mut kept = true;
        for engine in engines {
            kept &= engine.cache(CacheCommand::Save)?;
        }
        if !cold.writer.flush(deadline.saturating_duration_since(Instant::now())) {
            return Err(Error::new(Status::Timeout, "rows of the cache are still being written"));
        }
        cold.tier.sync()?;
        if kept && cold.writer.losses() == losses {
            Ok(())
        } else {
            Err(Error::new(Status::Io, "some rows of the cache could not be written; see the log"))
        }
    }

    /// The name under which a model is in the tiers: the one that the models have by an id, an alias or nothing, or else one
    /// that only the tiers know since its folder is gone.
    fn cached_name(&self, state: &State, model: Option<&str>) -> Result<String> {
        match (self.resolve_id(state, model), model) {
            (Err(error), Some(name)) if error.status() == Status::NotFound && self.tiers.know(name) => {
                Ok(name.to_owned())
            }
            (resolved, _) => resolved,
        }
    }

    /// The engine of the model that a request means, and the tokens of its prompt.
    fn prompt(&self, request: &Request) -> Result<(Arc<Engine>, Vec<u32>)> {
        let engine = self.running(request.model.as_deref())?;
        let prompt = self.text(request.model.as_deref())?.get()?.prompt(&request.input)?;
        Ok((engine, prompt))
    }

    /// The engine of a model, which must be there already.
    fn running(&self, model: Option<&str>) -> Result<Arc<Engine>> {
        let state = lock(&self.shared.state);
        let id = self.resolve(&state, model)?.id;
        let engine = state.engines.get(&id).and_then(|slot| slot.engine.clone());
        engine.ok_or_else(|| Error::not_found(format!("model {id:?} is not loaded")))
    }
}
