//! How much of the prompts a step may compute so that running answers stay smooth. Pure: times come from outside.
//!
//! Where a step computes both, a piece of a prompt passes a few layers a step. It has as many tokens as make the work of one or
//! more layers fill a step: reading the keys of a long context costs the same for one token as for many. Where a piece passes its
//! layers beside the steps, these follow each other at such a distance that it has most of the time.

use std::collections::VecDeque;
use std::time::Duration;

/// Part of what is known that a new measurement leaves.
const KEEP: f64 = 0.97;

/// Newest steps that count. Of those without prompts the quickest does: the first one behind others finds cold caches and threads that
/// sleep. Of answers beside prompts the slowest does: an answer should hardly ever come too late.
const NEWEST: usize = 5;

/// So many steps with prompts beside answers are followed by [`ALONE`] without: what answers cost by themselves changes, and
/// what is not known of it would count as the prompts' and starve them.
const BESIDE: usize = 24;

/// See [`BESIDE`].
const ALONE: usize = 2;

/// Tokens of a piece at least: to read a long context for fewer takes nearly as long.
const LEAST: usize = 8;

/// Tokens of a piece that passes more than a layer a step, at least. Fewer cost more each; with more, the time of a layer is
/// too coarse a measure to fill a step.
const SMALL: usize = 48;

/// From twice as many on, tokens of a piece that passes all layers at once are a multiple of this: fewer different shapes.
const WHOLE: usize = 8;

/// Steps are to take this part of the target, so that nearly all of them keep it: on shared machines the slowest hundredth
/// takes a third longer.
const AIM: f64 = 0.8;

/// A slow model's steps may take this many times as long as without prompts, even if that misses the target: an answer
/// keeps nearly half of its pace, and a prompt has three fifths of its own.
const SLOWDOWN: f64 = 2.4;

/// A slice may be late by this part of a layer.
const SLACK: f64 = 0.15;

/// A measurement below this part of what is known leaves so much of the old ones: what was expected came from steps that had to wait
/// for something, such as a GPU's compiler, and prompts would starve for as long as it is remembered.
const SURPRISE: (f64, f64) = (0.5, 0.25);

/// Contexts that are closer than this, in tokens, say nothing about what a longer one costs.
const SPREAD: f64 = 32.0;

/// What a step computes of prompts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Tokens.
    pub tokens: usize,
    /// Keys that they attend to, of all tokens together.
    pub keys: usize,
    /// Layers that they pass.
    pub layers: usize,
}

impl Work {
    /// That of `tokens` tokens behind `start` others, in no layer.
    pub fn of_run(start: usize, tokens: usize) -> Self {
        Self { tokens, keys: tokens * start + tokens * (tokens + 1) / 2, layers: 0 }
    }

    /// Of two runs that pass the same layers.
    pub fn and(self, other: Self) -> Self {
        Self { tokens: self.tokens + other.tokens, keys: self.keys + other.keys, layers: self.layers }
    }

    fn context(&self) -> f64 {
        self.keys as f64 / self.tokens.max(1) as f64
    }
}

/// Learns what steps cost.
#[derive(Debug)]
pub struct Pace {
    target: f64,
    most: usize,
    layers: usize,
    /// Seconds of the newest steps that only decode.
    decodes: VecDeque<f64>,
    /// Seconds of a token in a layer, by its context.
    cost: Line,
    /// Seconds of the next step that something else takes.
    reserved: f64,
    /// Steps with prompts beside answers, since the last ones without; and how many those were so far.
    beside: usize,
    alone: usize,
    /// Prompts may pass their layers beside the steps.
    goes_beside: bool,
    /// Seconds of the newest steps of answers beside which they do.
    answers: VecDeque<f64>,
}

impl Pace {
    /// Steps with running answers should take no longer than `target`; no step takes more than `most` tokens of prompts, which may stop
    /// behind any of `layers` layers, or pass them beside the steps if that `goes_beside`.
    pub fn new(target: Duration, most: usize, layers: usize, goes_beside: bool) -> Self {
        Self {
            target: target.as_secs_f64(),
            most: most.max(1),
            layers: layers.max(1),
            decodes: VecDeque::new(),
            cost: Line::default(),
            reserved: 0.0,
            beside: 0,
            alone: 0,
            goes_beside,
            answers: VecDeque::new(),
        }
    }

    /// Whether a piece is to pass the `left` layers beside the steps: where they take longer than a step may.
    pub fn goes_beside(&self, piece: Work, left: usize) -> bool {
        let cost = self.cost.at(piece.context()).map(|token| token * (piece.tokens * left) as f64);
        self.goes_beside && cost.is_none_or(|cost| cost > self.room())
    }

    /// How long after a step beside prompts the next one is to begin.
    pub fn pause(&self) -> Duration {
        let answer = self.answers.iter().copied().fold(0.0, f64::max);
        Duration::from_secs_f64((self.most_seconds() - answer - self.reserved).max(0.0))
    }

    /// Something else takes so much of the next step.
    pub fn reserve(&mut self, time: Duration) {
        self.reserved = time.as_secs_f64();
    }

    /// Whether the next step with answers should do without prompts, to see what those cost by themselves.
    pub fn measures(&self) -> bool {
        self.beside >= BESIDE
    }

    /// Tokens of a piece that begins behind `start` others, beside answers or not.
    pub fn piece(&self, decodes: bool, start: usize) -> usize {
        let token = self.cost.at((start + SMALL / 2) as f64);
        let (true, false, Some(token)) = (decodes, self.goes_beside, token) else { return self.most };
        let room = self.room();
        let fit = |steps: usize| (room / (token * self.layers.div_ceil(steps) as f64)).min(self.most as f64);
        // The last of its slices should not be shorter than the others.
        let best = |a: &usize, b: &usize| (fit(*a) / *a as f64).total_cmp(&(fit(*b) / *b as f64)).then(b.cmp(a));
        let steps = (1..=self.layers).filter(|&steps| fit(steps) >= SMALL.min(self.most) as f64).max_by(best);
        let tokens = fit(steps.unwrap_or(self.layers)) as usize;
        let rounded = if self.layers > 1 || tokens < 2 * WHOLE { tokens } else { tokens / WHOLE * WHOLE };
        rounded.clamp(LEAST.min(self.most), self.most)
    }

    /// How many of the `left` layers a piece passes in the next step, beside answers or not.
    pub fn slice(&self, decodes: bool, piece: Work, left: usize) -> usize {
        let (true, Some(token)) = (decodes, self.cost.at(piece.context())) else { return left };
        let fit = self.room() / (token * piece.tokens as f64) + SLACK;
        let steps = left.div_ceil((fit as usize).clamp(1, left.max(1)));
        left.div_ceil(steps.max(1))
    }

    /// Seconds of a step that only decodes; 0 before the first one.
    fn decode(&self) -> f64 {
        self.decodes.iter().copied().reduce(f64::min).unwrap_or(0.0)
    }

    /// Seconds that a step with answers and prompts takes.
    fn most_seconds(&self) -> f64 {
        (AIM * self.target).max(SLOWDOWN * self.decode())
    }

    /// Seconds that a step beside answers has for prompts.
    fn room(&self) -> f64 {
        (self.most_seconds() - self.decode() - self.reserved).max(1e-6)
    }

    /// Seconds that a token of a prompt of `tokens` takes on average, if one has been computed.
    pub fn seconds_per_token(&self, tokens: usize) -> Option<f64> {
        self.cost.at(tokens as f64 / 2.0).map(|seconds| seconds * self.layers as f64)
    }

    /// A step of answers took `seconds` beside prompts.
    pub fn observe_beside(&mut self, seconds: f64) {
        note(&mut self.answers, seconds);
        self.alone = 0;
        self.beside += 1;
    }

    /// A step took `seconds`.
    pub fn observe(&mut self, seconds: f64, decodes: bool, work: Work) {
        if work.tokens * work.layers == 0 {
            note(&mut self.decodes, seconds);
            self.alone += 1;
            if self.alone >= ALONE {
                self.beside = 0;
            }
            return;
        }
        self.alone = 0;
        self.beside += usize::from(decodes);
        let decode = if decodes { self.decode() } else { 0.0 };
        // A step of a few tokens says little about one; and one that was interrupted, nothing.
        let each = |seconds: f64| seconds / (work.tokens * work.layers) as f64;
        let cost = each(seconds - decode).max(each(seconds) * 0.05);
        let known = self.cost.at(work.context());
        if known.is_some_and(|known| cost < SURPRISE.0 * known) {
            self.cost.forget(SURPRISE.1);
        }
        self.cost.add(work.context(), cost.min(known.map_or(f64::INFINITY, |known| 2.0 * known)));
    }
}

/// Adds one to the newest measurements.
fn note(newest: &mut VecDeque<f64>, seconds: f64) {
    if newest.len() == NEWEST {
        newest.pop_front();
    }
    newest.push_back(seconds);
}

/// A line through the newest measurements.
#[derive(Debug, Default)]
struct Line {
    /// Sums over the measurements, each of which weighs less with every one behind it.
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Line {
    fn add(&mut self, x: f64, y: f64) {
        self.forget(KEEP);
        for (sum, new) in
            [(&mut self.weight, 1.0), (&mut self.x, x), (&mut self.y, y), (&mut self.xx, x * x), (&mut self.xy, x * y)]
        {
            *sum += new;
        }
    }

    /// Leaves `part` of the measurements' weight.
    fn forget(&mut self, part: f64) {
        for sum in [&mut self.weight, &mut self.x, &mut self.y, &mut self.xx, &mut self.xy] {
            *sum *= part;
        }
    }

    /// Its height at `x`, none before the first measurement; it rises, and from 0 or above.
    fn at(&self, x: f64) -> Option<f64> {
        if self.weight == 0.0 {
            return None;
        }
        let (middle, height) = (self.x / self.weight, self.y / self.weight);
        let variance = (self.xx / self.weight - middle * middle).max(0.0);
        let slope = (self.xy / self.weight - middle * height) / (variance + SPREAD * SPREAD);
        let slope = slope.clamp(0.0, height / middle.max(1e-9));
        Some((height + slope * (x - middle)).max(1e-12))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYERS: usize = 28;

    /// A machine on which a step costs `decode` seconds, a token in a layer `token` and a key that it attends to `key`.
    struct Machine {
        decode: f64,
        token: f64,
        key: f64,
    }

    impl Machine {
        fn seconds(&self, work: Work) -> f64 {
            let token_layers = (work.tokens * work.layers) as f64;
            self.decode + self.token * token_layers + self.key * (work.keys * work.layers) as f64
        }

        /// Computes a prompt beside an answer; what its steps take, without the first ones.
        fn prompt(&self, pace: &mut Pace, layers: usize, start: usize, end: usize) -> Vec<f64> {
            (0..20).for_each(|_| pace.observe(self.decode, true, Work::default()));
            let (mut at, mut steps) = (start, Vec::new());
            while at < end {
                let tokens = pace.piece(true, at).min(end - at);
                let (piece, mut left) = (Work::of_run(at, tokens), layers);
                while left > 0 {
                    let work = Work { layers: pace.slice(true, piece, left), ..piece };
                    assert!((1..=left).contains(&work.layers));
                    left -= work.layers;
                    steps.push(self.seconds(work));
                    pace.observe(self.seconds(work), true, work);
                }
                at += tokens;
            }
            steps.split_off(5.min(steps.len()))
        }
    }

    #[test]
    fn slices_fill_steps_and_keep_to_them_however_long_the_context() {
        let machine = Machine { decode: 0.020, token: 4e-5, key: 5e-8 };
        let mut pace = Pace::new(Duration::from_millis(50), 128, LAYERS, false);
        assert_eq!((pace.piece(true, 0), pace.slice(true, Work::of_run(0, 128), LAYERS)), (128, LAYERS), "unknown");
        for round in 0..2 {
            let steps = machine.prompt(&mut pace, LAYERS, 0, 4000);
            let mean = steps.iter().sum::<f64>() / steps.len() as f64;
            let longest = steps.iter().copied().fold(0.0, f64::max);
            assert!(longest < 0.048 * 1.08, "round {round}: {longest}");
            assert!(mean > 0.048 * 0.88, "round {round}: {mean}");
        }
        assert_eq!(pace.piece(false, 4000), 128, "nobody waits for a token");
        assert_eq!(pace.slice(false, Work::of_run(4000, 50), 9), 9, "nobody waits for a token");
        let next = |pace: &Pace| {
            let tokens = pace.piece(true, 2000);
            tokens * pace.slice(true, Work::of_run(2000, tokens), LAYERS)
        };
        let free = next(&pace);
        pace.reserve(Duration::from_millis(20));
        assert!(next(&pace) < free, "{} and {free}", next(&pace));
    }

    #[test]
    fn steps_beside_prompts_come_at_their_distance() {
        let mut pace = Pace::new(Duration::from_millis(50), 128, LAYERS, true);
        let piece = Work::of_run(2000, 128);
        assert!(pace.goes_beside(piece, LAYERS), "nobody knows how long it takes");
        for seconds in [0.032, 0.029, 0.045, 0.030, 0.031] {
            pace.observe(seconds, true, Work::default());
        }
        let pause = |pace: &Pace| (pace.pause().as_secs_f64() * 1e4).round() / 10.0;
        assert_eq!(pause(&pace), 69.6, "2.4 times the quickest");
        [0.046, 0.050, 0.044].into_iter().for_each(|seconds| pace.observe_beside(seconds));
        assert_eq!(pause(&pace), 19.6, "the slowest answer keeps its time");
        pace.reserve(Duration::from_millis(5));
        assert_eq!(pause(&pace), 14.6);
        pace.observe_beside(0.5);
        assert_eq!(pause(&pace), 0.0);
        (0..BESIDE).for_each(|_| pace.observe_beside(0.046));
        assert!(pace.measures());
        // 35 ms are left of a step: a piece that takes that long need not be beside it.
        pace.observe(0.35, false, Work { layers: LAYERS, ..piece });
        assert!(pace.goes_beside(piece, 3) && !pace.goes_beside(piece, 2));
        assert_eq!(pace.piece(true, 2000), 128);
        assert!(!Pace::new(Duration::from_millis(50), 128, LAYERS, false).goes_beside(piece, LAYERS));
    }

    #[test]
    fn whole_pieces_find_their_target() {
        let machine = Machine { decode: 0.024, token: 0.0025, key: 0.0 };
        let mut pace = Pace::new(Duration::from_millis(100), 128, 1, false);
        machine.prompt(&mut pace, 1, 0, 4000);
        assert_eq!(pace.piece(true, 0), 16, "22 tokens would fill 0.8 of it");
        assert_eq!(pace.slice(true, Work::of_run(0, 16), 1), 1);
    }

    #[test]
    fn prompts_get_on_even_where_the_target_is_out_of_reach() {
        let mut pace = Pace::new(Duration::from_millis(50), 128, LAYERS, false);
        Machine { decode: 0.045, token: 0.5, key: 0.0 }.prompt(&mut pace, LAYERS, 0, 100);
        assert_eq!((pace.piece(true, 0), pace.slice(true, Work::of_run(0, LEAST), LAYERS)), (LEAST, 1));
        let mut slow = Pace::new(Duration::from_millis(50), 128, 1, false);
        Machine { decode: 0.4, token: 0.0099, key: 0.0 }.prompt(&mut slow, 1, 0, 4000);
        assert_eq!(slow.piece(true, 0), 56, "1.4 times as long again as without the prompt");
        let mut few = Pace::new(Duration::from_millis(50), 4, LAYERS, false);
        Machine { decode: 0.01, token: 1e-6, key: 0.0 }.prompt(&mut few, LAYERS, 0, 100);
        assert_eq!(few.piece(true, 0), 4);
    }

    #[test]
    fn prompts_do_not_starve_when_answers_get_slower() {
        let mut machine = Machine { decode: 0.020, token: 4e-5, key: 5e-8 };
        let mut pace = Pace::new(Duration::from_millis(50), 128, LAYERS, false);
        machine.prompt(&mut pace, LAYERS, 0, 2000);
        let next = |pace: &Pace| {
            let tokens = pace.piece(true, 1000);
            tokens * pace.slice(true, Work::of_run(1000, tokens), LAYERS)
        };
        let before = next(&pace);
        machine.decode = 0.060;
        let mut measured = 0;
        for _ in 0..200 {
            let piece = Work::of_run(1000, pace.piece(true, 1000));
            let layers = if pace.measures() { 0 } else { pace.slice(true, piece, LAYERS) };
            let work = if layers == 0 { Work::default() } else { Work { layers, ..piece } };
            pace.observe(machine.seconds(work), true, work);
            measured += usize::from(layers == 0);
        }
        assert!(measured.abs_diff(200 * ALONE / (BESIDE + ALONE)) <= ALONE, "{measured} of 200 steps");
        assert!(next(&pace) >= before, "{before} before, and now {}", next(&pace));
    }

    #[test]
    fn a_step_that_waited_for_a_compiler_does_not_starve_prompts() {
        // A GPU: each step has its price, a token hardly any.
        let seconds = |tokens: usize| 0.005 + 7e-6 * tokens as f64;
        let piece = |start, tokens| Work { layers: 1, ..Work::of_run(start, tokens) };
        let mut pace = Pace::new(Duration::from_millis(50), 512, 1, false);
        for (at, waited) in [10.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0].into_iter().enumerate() {
            pace.observe(seconds(512) + waited, false, piece(at * 512, 512));
        }
        (0..20).for_each(|_| pace.observe(0.0022, true, Work::default()));
        let (mut at, mut steps) = (0, 0);
        while at < 4000 {
            let tokens = pace.piece(true, at).min(4000 - at);
            pace.observe(seconds(tokens), true, piece(at, tokens));
            (at, steps) = (at + tokens, steps + 1);
        }
        assert!(steps <= 10, "{steps} steps for 4000 tokens, of which eight could do");
    }

    #[test]
    fn an_interruption_changes_little() {
        let machine = Machine { decode: 0.020, token: 4e-5, key: 5e-8 };
        let mut pace = Pace::new(Duration::from_millis(50), 128, LAYERS, false);
        machine.prompt(&mut pace, LAYERS, 0, 2000);
        let before = pace.piece(true, 2000);
        pace.observe(3.0, true, Work { layers: 5, ..Work::of_run(2000, before) });
        let after = pace.piece(true, 2000);
        assert!(after * 10 >= before * 9, "{before} and then {after}");
    }
}
