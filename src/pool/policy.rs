//! Which models give memory back, and when. Pure: it is told the time and how things stand, and says what to do.
//!
//! In this order, as far as memory is missing: caches of models without requests, least recently used first, if they
//! are enough; models without requests, least recently used first; all other caches; and for a model that waits to be loaded,
//! models with requests: they finish those, and requests that come later wait for them to be loaded again. Pinned models keep
//! their weights.

use std::time::{Duration, Instant};

/// A model in memory.
#[derive(Debug, Clone)]
pub struct Resident {
    /// Its id.
    pub id: String,
    /// When its last request came, or ended.
    pub last_used: Instant,
    /// Whether requests of it run or wait.
    pub in_use: bool,
    /// Whether it is still being loaded, or, without any bytes, waits for that.
    pub loading: bool,
    /// It is not unloaded unless the host says so.
    pub pinned: bool,
    /// How long it stays without requests; `None`: until its memory is needed.
    pub ttl: Option<Duration>,
    /// Bytes that unloading it frees.
    pub bytes: u64,
    /// Bytes that it could give back at once: of its cache, what no request uses.
    pub spare: u64,
}

/// How short of memory the whole system is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// Not.
    #[default]
    None,
    /// Caches should shrink.
    Some,
    /// Models should go, too.
    Much,
}

/// What is missing in the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Bytes, without those that are on their way back.
    pub bytes: u64,
    /// For a model to be loaded; otherwise for a cache.
    pub to_load: bool,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Empty the hot tier.
    ReleaseHot,
    /// Give back what of the model's cache no request uses.
    Shrink(String),
    /// Unload a model without requests.
    Unload(String),
    /// Unload a model when its requests have ended; later ones wait.
    Drain(String),
    /// Nothing more can become free.
    Refuse,
}

/// What to do now, where the hot tier holds `hot` bytes. Models that are on their way out are not among the `residents`.
pub fn decide(now: Instant, residents: &[Resident], hot: u64, need: Option<Need>, pressure: Pressure) -> Vec<Action> {
    let loading = residents.iter().any(|resident| resident.loading && resident.bytes > 0);
    let mut residents: Vec<&Resident> = residents.iter().filter(|resident| !resident.loading).collect();
    residents.sort_by_key(|resident| resident.last_used);
    let mut actions = Vec::new();
    let expired = |resident: &Resident| {
        let idle = now.saturating_duration_since(resident.last_used);
        !resident.in_use && !resident.pinned && resident.ttl.is_some_and(|ttl| idle >= ttl)
    };
    let mut missing = need.map_or(0, |need| need.bytes);
    let (gone, stay): (Vec<&Resident>, Vec<&Resident>) = residents.into_iter().partition(|resident| expired(resident));
    for resident in gone {
        missing = missing.saturating_sub(resident.bytes);
        actions.push(Action::Unload(resident.id.clone()));
    }
    if missing > 0 {
        make_room(&stay, missing, &mut actions);
        // One after the other: what they give back may be enough. What is being loaded is used first, too.
        if actions.is_empty() && !loading && need.is_some_and(|need| need.to_load) {
            let used = stay.iter().find(|resident| !resident.pinned);
            actions.push(used.map_or(Action::Refuse, |resident| Action::Drain(resident.id.clone())));
        }
    } else if pressure > Pressure::None {
        relieve(&stay, hot, pressure, &mut actions);
    }
    actions
}

fn make_room(residents: &[&Resident], mut missing: u64, actions: &mut Vec<Action>) {
    let shrinks = |residents: &[&&Resident], missing: &mut u64, actions: &mut Vec<Action>| {
        for resident in residents.iter().filter(|resident| resident.spare > 0) {
            if *missing > 0 {
                *missing = missing.saturating_sub(resident.spare);
                actions.push(Action::Shrink(resident.id.clone()));
            }
        }
    };
    let idle: Vec<_> = residents.iter().filter(|resident| !resident.in_use).collect();
    if idle.iter().map(|resident| resident.spare).sum::<u64>() >= missing {
        return shrinks(&idle, &mut missing, actions);
    }
    for resident in idle.iter().filter(|resident| !resident.pinned) {
        if missing > 0 {
            missing = missing.saturating_sub(resident.bytes);
            actions.push(Action::Unload(resident.id.clone()));
        }
    }
    let stay: Vec<_> = residents.iter().filter(|resident| resident.in_use || resident.pinned).collect();
    shrinks(&stay, &mut missing, actions);
}

/// Under pressure caches shrink, in the host's memory and in the pools; if it is strong, the model that has been idle for
/// longest goes.
fn relieve(residents: &[&Resident], hot: u64, pressure: Pressure, actions: &mut Vec<Action>) {
    actions.extend((hot > 0).then_some(Action::ReleaseHot));
    let spare = residents.iter().filter(|resident| resident.spare > 0);
    actions.extend(spare.map(|resident| Action::Shrink(resident.id.clone())));
    let idle = residents.iter().find(|resident| !resident.in_use && !resident.pinned);
    if let Some(resident) = idle.filter(|_| pressure == Pressure::Much && actions.is_empty()) {
        actions.push(Action::Unload(resident.id.clone()));
    }
}

/// When the first model expires, if no request comes before.
pub fn next_expiry(residents: &[Resident]) -> Option<Instant> {
    let waits = residents.iter().filter(|resident| !resident.in_use && !resident.pinned && !resident.loading);
    waits.filter_map(|resident| resident.last_used.checked_add(resident.ttl?)).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With an empty hot tier.
    fn decide(now: Instant, residents: &[Resident], need: Option<Need>, pressure: Pressure) -> Vec<Action> {
        super::decide(now, residents, 0, need, pressure)
    }

    /// A model last used `age` seconds before the time that the tests call now.
    fn model(id: &str, now: Instant, age: u64) -> Resident {
        let last_used = now - Duration::from_secs(age);
        let id = id.to_owned();
        Resident { id, last_used, in_use: false, loading: false, pinned: false, ttl: None, bytes: 100, spare: 0 }
    }

    fn now() -> Instant {
        Instant::now() + Duration::from_secs(1_000_000)
    }

    fn load(bytes: u64) -> Option<Need> {
        Some(Need { bytes, to_load: true })
    }

    fn unload(id: &str) -> Action {
        Action::Unload(id.to_owned())
    }

    fn shrink(id: &str) -> Action {
        Action::Shrink(id.to_owned())
    }

    fn drain(id: &str) -> Action {
        Action::Drain(id.to_owned())
    }

    #[test]
    fn the_least_recently_used_idle_model_goes_first() {
        let now = now();
        let models = [model("b", now, 20), model("c", now, 30), model("a", now, 10)];
        assert_eq!(decide(now, &models, None, Pressure::None), []);
        assert_eq!(decide(now, &models, load(1), Pressure::None), [unload("c")]);
        assert_eq!(decide(now, &models, load(100), Pressure::None), [unload("c")]);
        assert_eq!(decide(now, &models, load(101), Pressure::None), [unload("c"), unload("b")]);
    }

    #[test]
    fn models_in_use_loading_or_pinned_stay() {
        let now = now();
        let mut models =
            [model("used", now, 40), model("pinned", now, 30), model("new", now, 20), model("idle", now, 10)];
        models[0].in_use = true;
        models[1].pinned = true;
        models[2].loading = true;
        assert_eq!(decide(now, &models, load(1), Pressure::None), [unload("idle")]);
        // The idle one is not enough: what is in use is looked at when it is gone.
        assert_eq!(decide(now, &models, load(150), Pressure::None), [unload("idle")]);
        assert_eq!(decide(now, &models[..2], load(150), Pressure::None), [drain("used")]);
        assert_eq!(decide(now, &models[1..3], load(150), Pressure::None), [], "what is being loaded will be idle");
        assert_eq!(decide(now, &models[1..2], load(150), Pressure::None), [Action::Refuse]);
        models[2].bytes = 0;
        assert_eq!(decide(now, &models[1..3], load(150), Pressure::None), [Action::Refuse], "that one waits itself");
        // A cache that wants to grow drives nobody out who is at work, and is not told off.
        assert_eq!(decide(now, &models[..2], Some(Need { bytes: 150, to_load: false }), Pressure::None), []);
    }

    #[test]
    fn caches_go_before_models_where_they_are_enough() {
        let now = now();
        let mut models = [model("old", now, 40), model("new", now, 10), model("used", now, 50)];
        models[2].in_use = true;
        for model in &mut models {
            model.spare = 30;
        }
        assert_eq!(decide(now, &models, load(20), Pressure::None), [shrink("old")]);
        assert_eq!(decide(now, &models, load(60), Pressure::None), [shrink("old"), shrink("new")]);
        assert_eq!(decide(now, &models, load(61), Pressure::None), [unload("old")]);
        assert_eq!(decide(now, &models, load(230), Pressure::None), [unload("old"), unload("new"), shrink("used")]);
        assert_eq!(decide(now, &models[2..], load(230), Pressure::None), [shrink("used")], "first this");
        models[2].spare = 0;
        assert_eq!(decide(now, &models[2..], load(230), Pressure::None), [drain("used")]);
    }

    #[test]
    fn models_expire() {
        let now = now();
        let mut models = [model("a", now, 40), model("b", now, 10), model("pinned", now, 99), model("used", now, 99)];
        models[2].pinned = true;
        models[3].in_use = true;
        for model in &mut models {
            model.ttl = Some(Duration::from_secs(30));
        }
        assert_eq!(decide(now, &models, None, Pressure::None), [unload("a")]);
        assert_eq!(next_expiry(&models[1..]), Some(now + Duration::from_secs(20)));
        assert_eq!(decide(now + Duration::from_secs(20), &models[1..], None, Pressure::None), [unload("b")]);
        assert_eq!(decide(now + Duration::from_secs(19), &models[1..], None, Pressure::None), []);
        assert_eq!(next_expiry(&models[2..]), None);
        // What expires anyway is enough.
        assert_eq!(decide(now, &models, load(100), Pressure::None), [unload("a")]);
    }

    #[test]
    fn pressure_shrinks_caches_and_then_takes_one_model_after_the_other() {
        let now = now();
        let mut models = [model("old", now, 40), model("new", now, 10)];
        models[1].spare = 5;
        assert_eq!(decide(now, &models, None, Pressure::Some), [shrink("new")]);
        assert_eq!(decide(now, &models, None, Pressure::Much), [shrink("new")]);
        models[1].spare = 0;
        assert_eq!(decide(now, &models, None, Pressure::Some), []);
        assert_eq!(decide(now, &models, None, Pressure::Much), [unload("old")]);
        models[0].pinned = true;
        assert_eq!(decide(now, &models, None, Pressure::Much), [unload("new")]);
    }

    #[test]
    fn pressure_empties_the_hot_tier_before_any_model_goes() {
        let now = now();
        let mut models = [model("idle", now, 40)];
        let hot = |models: &[Resident], need, pressure| super::decide(now, models, 5, need, pressure);
        assert_eq!(hot(&models, None, Pressure::None), []);
        assert_eq!(
            hot(&models, load(1), Pressure::None),
            [unload("idle")],
            "its limit is in the ledger, however full it is"
        );
        assert_eq!(hot(&models, None, Pressure::Some), [Action::ReleaseHot]);
        assert_eq!(hot(&models, None, Pressure::Much), [Action::ReleaseHot], "the model stays for now");
        assert_eq!(hot(&[], None, Pressure::Some), [Action::ReleaseHot], "no model is loaded");
        models[0].spare = 5;
        assert_eq!(hot(&models, None, Pressure::Much), [Action::ReleaseHot, shrink("idle")]);
    }
}
