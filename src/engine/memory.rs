//! An engine's part of the memory that all engines share: taken before it is allocated.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::ledger::{Account, Part, Uses};

/// How often an engine asks again for what it was denied.
const AGAIN: Duration = Duration::from_millis(250);

/// How long sequences pause for memory that others may give back, before one of them gives up its blocks to the others.
const PAUSE: Duration = Duration::from_secs(2);

/// The same where there is no other sequence: it would have to end.
const LONG_PAUSE: Duration = Duration::from_secs(20);

/// What an engine has, and what it was denied.
#[derive(Debug)]
pub(super) struct EngineMemory<'a> {
    account: &'a Account,
    /// Bytes that its cache is promised from the beginning.
    floor: u64,
    /// Bytes of its cache at the last count.
    cache: u64,
    /// Since when its cache cannot grow.
    denied: Option<Instant>,
    asked: Option<Instant>,
}

/// What to do without memory for more blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Denied {
    /// Others may give some back: wait.
    Pause,
    /// Get along with what is there.
    MakeDo,
    /// Give back everything, and begin again when others are done: they wait for it.
    Yield,
}

impl<'a> EngineMemory<'a> {
    /// Takes what an engine needs to begin, in line behind others that do; blocks until there is room.
    pub fn begin(account: &'a Account, uses: Uses, interrupted: impl Fn() -> Option<Error>) -> Result<Self> {
        account.take(uses, interrupted)?;
        Ok(Self { account, floor: uses.cache, cache: 0, denied: None, asked: None })
    }

    /// The weights are there and take `bytes`.
    pub fn loaded(&self, bytes: u64) {
        self.account.set(Part::Weights, bytes);
    }

    /// Bytes for steps.
    pub fn workspace(&self) -> u64 {
        self.account.uses().workspace
    }

    /// Bytes that the cache may ever have.
    pub fn most(&self) -> u64 {
        let uses = self.account.uses();
        self.account.obtainable().saturating_sub(uses.sum() - uses.cache)
    }

    /// Whether it makes sense to ask for more now.
    pub fn may_ask(&self, now: Instant) -> bool {
        self.denied.is_none() || self.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= AGAIN)
    }

    /// Makes `bytes` in all the cache's, if there are so many.
    pub fn grow(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.account.uses().cache);
        let granted = more == 0 || self.account.try_take(Part::Cache, more);
        if granted {
            self.denied = None;
        }
        granted
    }

    /// The cache did not get `bytes` in all; `needed` if a sequence cannot go on without, and whether it is `alone`.
    pub fn deny(&mut self, bytes: u64, needed: bool, alone: bool, now: Instant) -> Denied {
        self.asked = Some(now);
        let since = *self.denied.get_or_insert(now);
        let uses = self.account.uses();
        let possible = bytes <= self.most();
        self.account.needs(if needed && possible { bytes.saturating_sub(uses.cache) } else { 0 });
        let waited = now.saturating_duration_since(since);
        if !needed || !possible || waited >= if alone { LONG_PAUSE } else { PAUSE } {
            Denied::MakeDo
        } else if alone && waited >= PAUSE && self.account.should_yield() {
            Denied::Yield
        } else {
            Denied::Pause
        }
    }

    /// The cache wants nothing more.
    pub fn content(&mut self) {
        if self.denied.take().is_some() {
            self.account.needs(0);
        }
    }

    /// The cache takes `bytes` now, and no more while it changes.
    pub fn has(&mut self, bytes: u64) {
        if self.cache != bytes {
            self.cache = bytes;
            self.account.set(Part::Cache, bytes.max(self.floor));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Ledger;

    #[test]
    fn a_cache_grows_pauses_and_makes_do() {
        let ledger = Ledger::new(1000);
        let (mine, other) = (ledger.open("mine"), ledger.open("other"));
        let uses = Uses { weights: 300, cache: 100, ..Uses::default() };
        let mut memory = EngineMemory::begin(&mine, uses, || None).unwrap();
        assert!(memory.grow(80), "that is below what was promised");
        memory.has(80);
        assert_eq!(mine.uses().cache, 100);
        assert!(memory.grow(200) && other.try_take(Part::Weights, 450));
        let now = Instant::now();
        assert!(!memory.grow(300) && memory.may_ask(now));
        assert_eq!(memory.deny(300, false, false, now), Denied::MakeDo);
        assert_eq!(ledger.shortage(), None, "it can do without");
        assert_eq!(memory.deny(300, true, false, now), Denied::Pause);
        assert_eq!(ledger.shortage().map(|short| short.bytes), Some(50));
        assert!(!memory.may_ask(now) && memory.may_ask(now + AGAIN));
        assert_eq!(memory.deny(300, true, false, now + PAUSE), Denied::MakeDo);
        assert_eq!(memory.deny(300, true, true, now + PAUSE), Denied::Pause);
        other.needs(5);
        assert_eq!(memory.deny(300, true, true, now + PAUSE), Denied::Pause, "the other one is younger");
        let mut young = EngineMemory { account: &other, floor: 0, cache: 0, denied: Some(now), asked: None };
        assert_eq!(young.deny(300, true, true, now + PAUSE), Denied::Yield);
        assert_eq!(memory.deny(701, true, true, now), Denied::MakeDo, "that will never be free");
        other.close();
        assert!(memory.grow(300) && memory.may_ask(now));
        memory.has(290);
        assert_eq!((mine.uses().cache, memory.most()), (290, 700));
    }
}
