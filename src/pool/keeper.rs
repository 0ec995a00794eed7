//! The pool's housekeeper: a thread that carries out the [policy](super::policy) whenever memory is short, a model's time is
//! up, or the system needs memory.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::memory::{Machine, MemoryLimit, Reading};
use super::policy::{self, Action, Need, Pressure};
use super::{Shared, State};
use crate::engine::Engine;
use crate::error::{Error, Result, Status};
use crate::ledger::{Part, Uses};
use crate::mlx::{self, Device};
use crate::panics;
use crate::sync::lock;

/// How often the machine's memory is read while models are loaded, or rows are in the hot tier.
const READ: Duration = Duration::from_secs(1);

/// How often the keeper looks again while somebody waits for memory.
const SHORT: Duration = Duration::from_millis(10);

/// A cache that gave back what it could is left alone for this long.
const SHRUNK: Duration = Duration::from_secs(2);

/// The limit `auto` follows the system where it is off by more than this part.
const DRIFT: f64 = 0.05;

/// What the process has beyond the ledger is worth a warning from here on: bytes, and part of the limit.
const UNACCOUNTED: (u64, f64) = (1 << 29, 0.1);

/// Wakes the keeper; when all of them are gone, it ends.
pub(super) type Wake = Sender<()>;

/// Starts the keeper of a pool.
pub(super) fn start(shared: &Arc<Shared>, inbox: Receiver<()>, machine: Box<dyn Machine>) -> Result<()> {
    let shared = Arc::downgrade(shared);
    let keeper = move || {
        let mut keeper = Keeper { shared, machine, read: None, alarmed: false };
        if let Err(panic) = panics::catch(|| keeper.run(&inbox)) {
            tracing::error!(error = %panic, "the pool's housekeeper ended");
        }
    };
    let thread = std::thread::Builder::new().name("omlx-pool".to_owned()).spawn(keeper);
    thread.map(drop).map_err(|error| Error::io("starting the pool's thread", &error))
}

struct Keeper {
    shared: Weak<Shared>,
    machine: Box<dyn Machine>,
    read: Option<Instant>,
    /// The last reading was worth a warning.
    alarmed: bool,
}

impl Keeper {
    fn run(&mut self, inbox: &Receiver<()>) {
        loop {
            // Held while there is something to do only: the pool ends with its last handle.
            let Some(shared) = self.shared.upgrade() else { return };
            let next = self.look(&shared, Instant::now());
            drop(shared);
            let woken = match next {
                Some(time) => inbox.recv_timeout(time.saturating_duration_since(Instant::now())),
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            if woken == Err(RecvTimeoutError::Disconnected) {
                return;
            }
            while inbox.try_recv().is_ok() {}
        }
    }

    /// Does what is to be done; when to look again, if nobody wakes the keeper before.
    fn look(&mut self, shared: &Shared, now: Instant) -> Option<Instant> {
        let pressure = self.read(shared, now);
        let hot = lock(&shared.tiers).as_ref().map_or(0, |tiers| tiers.hot.bytes());
        let mut state = lock(&shared.state);
        if state.closed {
            return None;
        }
        state.end_drained();
        let shortage = shared.ledger.shortage();
        let coming = state.leaving_bytes();
        let mut residents = state.residents(shared, now);
        if let Some(short) = shortage.as_ref().filter(|short| !short.in_line) {
            // Whoever wants to grow does not shrink for it.
            residents.iter_mut().filter(|resident| resident.id == short.owner).for_each(|resident| resident.spare = 0);
        }
        let need =
            shortage.as_ref().map(|short| Need { bytes: short.bytes.saturating_sub(coming), to_load: short.in_line });
        // What is on its way out will do.
        let need = need.filter(|need| need.bytes > 0);
        let mut release_hot = false;
        for action in policy::decide(now, &residents, hot, need, pressure) {
            tracing::info!(?action, short = shortage.as_ref().map_or(0, |short| short.bytes), "memory");
            match action {
                Action::ReleaseHot => release_hot = true,
                Action::Shrink(id) => state.shrink(&id, now),
                Action::Unload(id) => state.unload_idle(&id),
                Action::Drain(id) => state.drain(&id),
                Action::Refuse => shared.ledger.refuse_first("no other model can be unloaded"),
            }
        }
        let (draining, retiring) = (!state.draining.is_empty(), !state.retiring.is_empty());
        drop(state);
        // Giving memory back takes time that requests need not wait for.
        if let Some(tiers) = lock(&shared.tiers).as_ref().filter(|_| release_hot) {
            tiers.release_hot(pressure == Pressure::Much);
        }
        if shortage.is_some() || draining {
            return Some(now + SHORT);
        }
        // Rows of a model that goes may stay in the hot tier.
        let read = (!residents.is_empty() || retiring || hot > 0).then_some(now + READ);
        let expiry = policy::next_expiry(&residents).map(|time| time.max(now + SHORT));
        read.into_iter().chain(expiry).min()
    }

    /// Reads the machine's memory now and then, and lets the limit follow it.
    fn read(&mut self, shared: &Shared, now: Instant) -> Pressure {
        if self.read.is_some_and(|read| now.saturating_duration_since(read) < READ) {
            return Pressure::None;
        }
        self.read = Some(now);
        let reading = self.machine.read();
        *lock(&shared.reading) = reading;
        let status = shared.ledger.status();
        let limit = lock(&shared.limit).bytes(shared.device, &reading, status.used);
        if (limit.abs_diff(status.limit)) as f64 > DRIFT * status.limit as f64 {
            set_limit(shared, limit);
        }
        let unaccounted = if status.used > 0 { unaccounted(shared, &reading, status.used) } else { 0 };
        let alarming = unaccounted > UNACCOUNTED.0.max((status.limit as f64 * UNACCOUNTED.1) as u64);
        if alarming && !self.alarmed {
            tracing::warn!(unaccounted, used = status.used, footprint = reading.footprint, "memory outside the ledger");
        }
        self.alarmed = alarming;
        reading.pressure
    }
}

/// Makes `bytes` the limit of a pool's ledger. MLX keeps freed arrays of a part of it: on the CPU not more than it does by
/// itself, on a GPU, where it would keep all of them, what a few steps need.
pub(super) fn set_limit(shared: &Shared, bytes: u64) {
    let buffers = match shared.device {
        Device::Cpu => (bytes / 64).clamp(8 << 20, 32 << 20),
        Device::Gpu => (bytes / 16).clamp(64 << 20, 8 << 30),
    };
    mlx::set_cache_limit(buffers);
    shared.buffers.set(Part::Workspace, buffers);
    shared.ledger.set_limit(bytes);
    mlx::set_wired_limit(bytes);
}

/// Bytes that the process, or MLX on its device, has beyond what the ledger knows and what was there when the pool opened.
pub(super) fn unaccounted(shared: &Shared, reading: &Reading, used: u64) -> u64 {
    let has = if shared.device.has_own_memory() {
        mlx::used_memory()
    } else {
        reading.footprint.saturating_sub(shared.footprint_at_open)
    };
    has.saturating_sub(used)
}

impl State {
    /// Unloads the model if no request uses it.
    fn unload_idle(&mut self, id: &str) {
        let idle = |engine: &Arc<Engine>| engine.activity().0 == 0;
        if let Some(engine) = self.take_engine(id, idle) {
            engine.stop(Error::new(Status::Cancelled, format!("model {id:?} was unloaded to make room")));
            self.retiring.push(engine);
        }
    }

    /// Lets the model end its requests; later ones load it again.
    pub(super) fn drain(&mut self, id: &str) {
        let engine = self.take_engine(id, |_| true);
        self.draining.extend(engine);
        self.end_drained();
    }

    fn take_engine(&mut self, id: &str, wanted: impl Fn(&Arc<Engine>) -> bool) -> Option<Arc<Engine>> {
        self.engines.get_mut(id)?.engine.take_if(|engine| wanted(engine))
    }

    fn shrink(&mut self, id: &str, now: Instant) {
        if let Some(slot) = self.engines.get_mut(id) {
            slot.shrunk = Some(now);
            slot.engine.iter().for_each(|engine| engine.release_memory());
        }
    }

    /// Stops the engines that have ended their last requests.
    fn end_drained(&mut self) {
        let done: Vec<_> = self.draining.extract_if(.., |engine| engine.activity().0 == 0).collect();
        for engine in done {
            engine.stop(Error::new(Status::Cancelled, "the model was unloaded to make room"));
            self.retiring.push(engine);
        }
        self.retiring.retain(|engine| !engine.is_gone());
    }

    /// Bytes of the engines that are on their way out.
    fn leaving_bytes(&self) -> u64 {
        self.retiring.iter().chain(&self.draining).map(|engine| engine_bytes(engine)).sum()
    }

    fn residents(&self, shared: &Shared, now: Instant) -> Vec<policy::Resident> {
        let owners = shared.ledger.status().owners;
        let resident = |(id, slot): (&String, &super::Slot)| {
            let engine = slot.engine.as_ref().filter(|engine| engine.ended().is_none())?;
            let (requests, last_used) = engine.activity();
            let settings = self.settings.get(id);
            let loading = engine.loaded().is_none();
            let metrics = engine.metrics();
            let rests = slot.shrunk.is_some_and(|shrunk| now.saturating_duration_since(shrunk) < SHRUNK);
            let spare = (metrics.cached_bytes + metrics.free_bytes) as u64;
            Some(policy::Resident {
                id: id.clone(),
                last_used,
                in_use: requests > 0,
                loading,
                pinned: settings.pinned,
                ttl: settings.ttl(shared.ttl),
                bytes: if loading { owners.get(id).map_or(0, Uses::sum) } else { engine_bytes(engine) },
                spare: if rests { 0 } else { spare },
            })
        };
        self.engines.iter().filter_map(resident).collect()
    }
}

fn engine_bytes(engine: &Engine) -> u64 {
    let metrics = engine.metrics();
    (metrics.weight_bytes + metrics.cache_bytes + metrics.workspace_bytes) as u64
}

/// The limit in bytes when a pool opens.
pub(super) fn first_limit(limit: MemoryLimit, device: Device, reading: &Reading) -> Result<u64> {
    limit.check()?;
    Ok(limit.bytes(device, reading, 0))
}
