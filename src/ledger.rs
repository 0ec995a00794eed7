//! The account of memory: who uses how much of one limit, and who waits for some. Pure.
//!
//! Memory is taken here before it is allocated. A model that is to be loaded waits in line; a cache that wants to grow does
//! not, and never takes what somebody in the line waits for. Whoever can give memory back hears of it ([`Ledger::on_shortage`]).

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, Result, Status};
use crate::sync::lock;

/// How often a waiting thread looks whether it should give up.
const LOOK: Duration = Duration::from_millis(50);

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Uses {
    /// Weights of a model.
    pub weights: u64,
    /// Its pools of keys and values.
    pub cache: u64,
    /// What its steps need besides.
    pub workspace: u64,
    /// Rows of keys and values outside the pools.
    pub hot: u64,
}

impl Uses {
    /// All of them.
    pub fn sum(&self) -> u64 {
        self.weights.saturating_add(self.cache).saturating_add(self.workspace).saturating_add(self.hot)
    }
}

/// What a share of the memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// See [`Uses::weights`].
    Weights,
    /// See [`Uses::cache`].
    Cache,
    /// See [`Uses::workspace`].
    Workspace,
    /// See [`Uses::hot`].
    Hot,
}

impl Uses {
    fn part(&mut self, part: Part) -> &mut u64 {
        match part {
            Part::Weights => &mut self.weights,
            Part::Cache => &mut self.cache,
            Part::Workspace => &mut self.workspace,
            Part::Hot => &mut self.hot,
        }
    }
}

/// One limit, and what is taken of it.
#[derive(Default)]
pub struct Ledger {
    state: Mutex<State>,
    changed: Condvar,
    shortage: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Ledger").field(&self.status()).finish()
    }
}

#[derive(Debug, Default)]
struct State {
    limit: u64,
    accounts: BTreeMap<AccountId, Entry>,
    /// First come, first served.
    line: VecDeque<Waiting>,
    next: AccountId,
    peak: u64,
}

type AccountId = u64;

#[derive(Debug)]
struct Entry {
    owner: String,
    uses: Uses,
    /// Bytes that it could not get when it last tried to grow.
    denied: u64,
    /// It is never closed.
    stays: bool,
}

#[derive(Debug)]
struct Waiting {
    account: AccountId,
    bytes: u64,
    /// Why it is not to wait any longer.
    refused: Option<String>,
}

impl State {
    fn used(&self) -> u64 {
        self.accounts.values().map(|entry| entry.uses.sum()).sum()
    }

    fn free(&self) -> u64 {
        self.limit.saturating_sub(self.used())
    }

    /// What one account could have at most.
    fn obtainable(&self) -> u64 {
        let stays: u64 = self.accounts.values().filter(|entry| entry.stays).map(|entry| entry.uses.sum()).sum();
        self.limit.saturating_sub(stays)
    }

    /// Records a new sum, and the largest one so far.
    fn changed(&mut self) {
        self.peak = self.peak.max(self.used());
    }
}

/// How a ledger stands.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LedgerStatus {
    /// Bytes that may be used.
    pub limit: u64,
    /// Bytes that are.
    pub used: u64,
    /// The most that ever were.
    pub peak: u64,
    /// Bytes that models wait for.
    pub waiting: u64,
    /// By owner.
    pub owners: BTreeMap<String, Uses>,
}

/// What is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Who needs it.
    pub owner: String,
    /// Bytes that have to become free.
    pub bytes: u64,
    /// It waits in line, to be loaded; otherwise a cache cannot grow.
    pub in_line: bool,
}

impl Ledger {
    /// Of which nothing is used.
    pub fn new(limit: u64) -> Arc<Self> {
        let ledger = Self::default();
        lock(&ledger.state).limit = limit;
        Arc::new(ledger)
    }

    /// Changes the limit; what is used beyond it stays until somebody gives it back.
    pub fn set_limit(&self, limit: u64) {
        lock(&self.state).limit = limit;
        self.changed.notify_all();
        self.wake();
    }

    /// Calls `wake` whenever somebody goes short, from that thread and without a lock held. Once.
    pub fn on_shortage(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.shortage.set(Box::new(wake));
    }

    fn wake(&self) {
        if let Some(wake) = self.shortage.get() {
            wake();
        }
    }

    /// An account in the name of `owner`, of which there may be several.
    pub fn open(self: &Arc<Self>, owner: &str) -> Account {
        self.account(owner, false)
    }

    /// The same, of something that stays as long as the ledger: what it uses can never be had.
    pub fn open_for_good(self: &Arc<Self>, owner: &str) -> Account {
        self.account(owner, true)
    }

    fn account(self: &Arc<Self>, owner: &str, stays: bool) -> Account {
        let mut state = lock(&self.state);
        state.next += 1;
        let id = state.next;
        state.accounts.insert(id, Entry { owner: owner.to_owned(), uses: Uses::default(), denied: 0, stays });
        drop(state);
        Account { ledger: Arc::clone(self), id }
    }

    /// How it stands.
    pub fn status(&self) -> LedgerStatus {
        let state = lock(&self.state);
        let mut owners: BTreeMap<String, Uses> = BTreeMap::new();
        for entry in state.accounts.values() {
            let sum = owners.entry(entry.owner.clone()).or_default();
            sum.weights += entry.uses.weights;
            sum.cache += entry.uses.cache;
            sum.workspace += entry.uses.workspace;
            sum.hot += entry.uses.hot;
        }
        let waiting = state.line.iter().map(|waiting| waiting.bytes).sum();
        LedgerStatus { limit: state.limit, used: state.used(), peak: state.peak, waiting, owners }
    }

    /// What whoever can give memory back should know: the first in line, or else a cache that needs to grow.
    pub fn shortage(&self) -> Option<Shortage> {
        let state = lock(&self.state);
        let missing = |account: AccountId, bytes: u64, in_line: bool| {
            let bytes = (state.used() + bytes).saturating_sub(state.limit);
            let owner = state.accounts.get(&account)?.owner.clone();
            (bytes > 0).then_some(Shortage { owner, bytes, in_line })
        };
        let first = state.line.front().and_then(|first| missing(first.account, first.bytes, true));
        let grows = || state.accounts.iter().filter(|(_, entry)| entry.denied > 0);
        first.or_else(|| grows().find_map(|(&id, entry)| missing(id, entry.denied, false)))
    }

    /// Sends the first in line away: there is no memory that could become free for it.
    pub fn refuse_first(&self, why: &str) {
        if let Some(first) = lock(&self.state).line.front_mut() {
            first.refused = Some(why.to_owned());
        }
        self.changed.notify_all();
    }
}

/// What one owner has taken; all of it is given back when this is dropped.
#[derive(Debug)]
pub struct Account {
    ledger: Arc<Ledger>,
    id: AccountId,
}

impl Account {
    /// Takes more for `part`, if it is free and nobody in line waits for it.
    pub fn try_take(&self, part: Part, bytes: u64) -> bool {
        let mut state = lock(&self.ledger.state);
        let in_line: u64 = state.line.iter().map(|waiting| waiting.bytes).sum();
        // Older accounts come first, so that two that need the same memory do not wait for each other.
        let older: u64 = state.accounts.range(..self.id).map(|(_, entry)| entry.denied).sum();
        let promised = in_line.saturating_add(older);
        let granted = state.free().saturating_sub(promised) >= bytes;
        if let Some(entry) = state.accounts.get_mut(&self.id).filter(|_| granted) {
            *entry.uses.part(part) += bytes;
            entry.denied = 0;
            state.changed();
        }
        granted
    }

    /// Says what a cache was denied and cannot do without (0: nothing), so that others may make room for it.
    pub fn needs(&self, bytes: u64) {
        let mut state = lock(&self.ledger.state);
        let Some(entry) = state.accounts.get_mut(&self.id) else { return };
        let more = bytes > entry.denied;
        entry.denied = bytes;
        drop(state);
        if more {
            self.ledger.wake();
        }
    }

    /// Takes `uses` as soon as they are free, in the order of the calls; blocks until then, or until `interrupted` says why
    /// not to. `OutOfMemory` if they are more than the limit, or than can become free.
    pub fn take(&self, uses: Uses, interrupted: impl Fn() -> Option<Error>) -> Result<()> {
        let mut state = lock(&self.ledger.state);
        state.line.push_back(Waiting { account: self.id, bytes: uses.sum(), refused: None });
        let outcome = loop {
            let first = state.line.front().filter(|first| first.account == self.id);
            if let Some(first) = first {
                if uses.sum() > state.obtainable() {
                    break Err(does_not_fit(&uses, &state, "more than the limit"));
                }
                if uses.sum() <= state.free() {
                    break Ok(());
                }
                if let Some(why) = &first.refused {
                    break Err(does_not_fit(&uses, &state, why));
                }
                drop(state);
                self.ledger.wake();
                state = lock(&self.ledger.state);
            }
            if let Some(error) = interrupted() {
                break Err(error);
            }
            let waited = self.ledger.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        };
        state.line.retain(|waiting| waiting.account != self.id);
        if let (Ok(()), Some(entry)) = (&outcome, state.accounts.get_mut(&self.id)) {
            let has = &mut entry.uses;
            has.weights += uses.weights;
            has.cache += uses.cache;
            has.workspace += uses.workspace;
            has.hot += uses.hot;
            state.changed();
        }
        drop(state);
        // Whoever is first now.
        self.ledger.changed.notify_all();
        outcome
    }

    /// Whether an older account needs more, too: what this one holds may be what that one waits for.
    pub fn should_yield(&self) -> bool {
        lock(&self.ledger.state).accounts.range(..self.id).any(|(_, entry)| entry.denied > 0)
    }

    /// What `part` really uses, more or less than was taken.
    pub fn set(&self, part: Part, bytes: u64) {
        let mut state = lock(&self.ledger.state);
        if let Some(entry) = state.accounts.get_mut(&self.id) {
            *entry.uses.part(part) = bytes;
        }
        state.changed();
        drop(state);
        self.ledger.changed.notify_all();
    }

    /// What it has.
    pub fn uses(&self) -> Uses {
        lock(&self.ledger.state).accounts.get(&self.id).map_or_else(Uses::default, |entry| entry.uses)
    }

    /// Bytes that it could have if all others that can go were gone.
    pub fn obtainable(&self) -> u64 {
        lock(&self.ledger.state).obtainable()
    }

    /// Gives everything back; what is taken afterwards counts for nothing.
    pub fn close(&self) {
        lock(&self.ledger.state).accounts.remove(&self.id);
        self.ledger.changed.notify_all();
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.close();
    }
}

fn does_not_fit(uses: &Uses, state: &State, why: &str) -> Error {
    let megabytes = |bytes: u64| bytes.div_ceil(1_000_000);
    let what = format!(
        "needs {} MB (weights {}, cache {}, workspace {}), and {} of {} MB are free: {why}",
        megabytes(uses.sum()),
        megabytes(uses.weights),
        megabytes(uses.cache),
        megabytes(uses.workspace),
        state.free() / 1_000_000,
        state.limit / 1_000_000
    );
    Error::new(Status::OutOfMemory, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    fn weights(bytes: u64) -> Uses {
        Uses { weights: bytes, ..Uses::default() }
    }

    /// Waits until as many bytes are waited for.
    fn in_line(ledger: &Ledger, bytes: u64) {
        for _ in 0..2000 {
            if ledger.status().waiting == bytes {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("{ledger:?}");
    }

    #[test]
    fn nobody_gets_more_than_there_is() {
        let ledger = Ledger::new(100);
        let (a, b) = (ledger.open("a"), ledger.open("b"));
        a.take(weights(60), || None).unwrap();
        assert!(!b.try_take(Part::Cache, 41));
        assert!(b.try_take(Part::Cache, 40));
        let error = b.take(weights(101), || None).unwrap_err();
        assert_eq!(error.status(), Status::OutOfMemory);
        a.set(Part::Weights, 50);
        assert!(b.try_take(Part::Cache, 10) && !b.try_take(Part::Cache, 1));
        drop(a);
        let status = ledger.status();
        assert_eq!((status.used, status.peak, status.owners.len()), (50, 100, 1));
    }

    #[test]
    fn what_stays_can_never_be_had() {
        let ledger = Ledger::new(100);
        let (stays, model) = (ledger.open_for_good("stays"), ledger.open("model"));
        stays.set(Part::Hot, 30);
        assert_eq!(model.obtainable(), 70);
        assert!(model.take(weights(71), || None).is_err());
        model.take(weights(70), || None).unwrap();
    }

    #[test]
    fn models_wait_in_line_and_caches_do_not_pass_them() {
        let ledger = Ledger::new(100);
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        ledger.on_shortage(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let old = ledger.open("old");
        old.take(weights(70), || None).unwrap();
        let order = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for (name, bytes, line) in [("first", 90, 90), ("second", 20, 110)] {
                let (ledger, order) = (Arc::clone(&ledger), &order);
                let other = Arc::clone(&ledger);
                scope.spawn(move || {
                    let account = ledger.open(name);
                    account.take(weights(bytes), || None).unwrap();
                    order.lock().unwrap().push(name);
                    std::thread::sleep(Duration::from_millis(20));
                });
                in_line(&other, line);
            }
            assert_eq!(ledger.shortage(), Some(Shortage { owner: "first".to_owned(), bytes: 60, in_line: true }));
            assert!(!old.try_take(Part::Cache, 1), "30 are free, but promised");
            assert!(woken.load(Ordering::Relaxed) > 0);
            old.close();
        });
        assert_eq!(*order.lock().unwrap(), ["first", "second"], "the second would have fitted at once");
        assert_eq!(ledger.status().peak, 90);
    }

    #[test]
    fn waiting_ends_with_a_reason() {
        let ledger = Ledger::new(100);
        let old = ledger.open("old");
        old.take(weights(70), || None).unwrap();
        let new = ledger.open("new");
        let error = new.take(weights(50), || Some(Error::new(Status::Cancelled, "unloaded"))).unwrap_err();
        assert_eq!((error.status(), ledger.status().waiting), (Status::Cancelled, 0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                in_line(&ledger, 50);
                ledger.refuse_first("the rest is pinned");
            });
            let error = new.take(weights(50), || None).unwrap_err();
            assert_eq!(error.status(), Status::OutOfMemory);
            assert!(error.message().contains("the rest is pinned"), "{error}");
        });
        // Somebody who raises the limit lets it in.
        let given = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                in_line(&ledger, 50);
                given.store(true, Ordering::Relaxed);
                ledger.set_limit(120);
            });
            new.take(weights(50), || None).unwrap();
        });
        assert!(given.load(Ordering::Relaxed));
    }

    #[test]
    fn a_cache_says_what_it_cannot_do_without() {
        let ledger = Ledger::new(100);
        let (a, b) = (ledger.open("a"), ledger.open("b"));
        a.take(weights(95), || None).unwrap();
        assert!(!b.try_take(Part::Cache, 20));
        assert_eq!(ledger.shortage(), None, "it may do without");
        b.needs(20);
        assert_eq!(ledger.shortage(), Some(Shortage { owner: "b".to_owned(), bytes: 15, in_line: false }));
        a.set(Part::Weights, 80);
        assert_eq!(ledger.shortage(), None);
        // What an older account cannot do without is not for others.
        let c = ledger.open("c");
        assert!(c.should_yield() && !b.should_yield());
        assert!(!c.try_take(Part::Cache, 1));
        assert!(b.try_take(Part::Cache, 20) && !c.should_yield());
    }
}
