//! The scheduler with a runner that computes nothing but remembers everything: a row of a block stands for a token and
//! all before it, and the next token follows from it. So a wrong block, slot or token shows in the answer.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::cache::manager::GroupKind;
use crate::engine::events::{Event, RequestState};
use crate::engine::request::Priority;
use crate::engine::sequence::Prepared;
use crate::sampling::SamplingParams;
use crate::text::StopMatcher;

const STOP: u32 = 0;

type Row = u64;

fn next_row(before: Row, token: u32) -> Row {
    (before ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23)
}

/// What is sampled after a row; now and then the stop token.
fn token_after(row: Row, choice: u64) -> u32 {
    ((row ^ choice.wrapping_mul(0xD134_2543_DE82_EF95)) >> 20) as u32 % 97
}

/// The answer that a request gets when it is alone.
fn expected(prompt: &[u32], max_tokens: usize, choice: u64) -> Vec<u32> {
    let mut row = prompt.iter().fold(17, |row, &token| next_row(row, token));
    let mut answer = Vec::new();
    while answer.len() < max_tokens {
        let token = token_after(row, choice);
        if token == STOP {
            break;
        }
        answer.push(token);
        row = next_row(row, token);
    }
    answer
}

struct Asked {
    state: Arc<RequestState>,
    prompt: Vec<u32>,
    max_tokens: usize,
    choices: usize,
    cancelled: bool,
}

/// The engine loop around a scheduler, with the runner's part made up.
struct Machine {
    scheduler: Scheduler,
    limits: Limits,
    rows: HashMap<(BlockId, usize), Row>,
    /// What the last step sampled: that of the step before is read by then.
    in_flight: Vec<(SequenceId, u32)>,
    unread: HashMap<SequenceId, u32>,
    /// Which answer of its request a sequence is.
    choices: HashMap<SequenceId, u64>,
    asked: Vec<Asked>,
    next_id: SequenceId,
    /// Turns that a growth takes.
    slow_growth: usize,
    growing: Option<(usize, usize)>,
    steps: usize,
    computed: usize,
    wrong_tables: bool,
}

impl Machine {
    fn new(limits: Limits, block_tokens: usize) -> Self {
        let blocks = BlockManager::new(block_tokens, &[GroupKind::Full], [1; 32]);
        Self {
            scheduler: Scheduler::new(limits, blocks),
            limits,
            rows: HashMap::new(),
            in_flight: Vec::new(),
            unread: HashMap::new(),
            choices: HashMap::new(),
            asked: Vec::new(),
            next_id: 0,
            slow_growth: 0,
            growing: None,
            steps: 0,
            computed: 0,
            wrong_tables: false,
        }
    }

    fn ask(&mut self, prompt: Vec<u32>, max_tokens: usize, choices: usize, priority: Priority) -> usize {
        let (state, sink) = RequestState::new(Default::default());
        let prepared = Prepared {
            prompt: prompt.clone(),
            max_tokens,
            sampling: SamplingParams::default(),
            stop_tokens: HashSet::from([STOP]),
            stop: StopMatcher::new::<&str>(&[]).unwrap(),
            ticket: None,
            choices,
            priority,
            sink,
        };
        let first = self.next_id;
        for (choice, sequence) in Sequence::of_request(first, prepared, None, Instant::now()).into_iter().enumerate() {
            self.choices.insert(sequence.id(), choice as u64);
            self.scheduler.admit(sequence);
        }
        self.next_id += choices as SequenceId;
        self.asked.push(Asked { state, prompt, max_tokens, choices, cancelled: false });
        self.asked.len() - 1
    }

    /// A turn of the engine loop; whether there was anything to do.
    fn turn(&mut self) -> Result<bool, TestCaseError> {
        self.scheduler.reap_cancelled();
        self.grow();
        let plan = self.scheduler.plan(Instant::now(), &mut Vec::new());
        self.check_plan(&plan)?;
        let sampled = self.run(&plan)?;
        let before = std::mem::replace(&mut self.in_flight, sampled);
        let busy = !before.is_empty() || !plan.runs.is_empty() || self.growing.is_some();
        for (id, token) in before {
            self.scheduler.commit(id, SampledToken { token, logprob: None }, Instant::now());
        }
        let grows = self.scheduler.wanted_blocks() > self.scheduler.blocks().capacity(0);
        Ok(busy || grows)
    }

    fn grow(&mut self) {
        let wanted = self.scheduler.wanted_blocks();
        if self.growing.is_none() && wanted > self.scheduler.blocks().capacity(0) {
            self.growing = Some((wanted, self.slow_growth));
        }
        match &mut self.growing {
            Some((_, left)) if *left > 0 => *left -= 1,
            Some((capacity, _)) => {
                self.scheduler.blocks().grow(*capacity);
                self.growing = None;
            }
            None => {}
        }
    }

    fn check_plan(&self, plan: &StepPlan) -> Result<(), TestCaseError> {
        let ids: HashSet<SequenceId> = plan.runs.iter().map(|run| run.sequence).collect();
        prop_assert_eq!(ids.len(), plan.runs.len(), "a sequence has two runs");
        prop_assert!(plan.runs.len() <= self.limits.sequences, "more sequences than may run");
        prop_assert!(plan.prompt_tokens <= self.limits.prefill_chunk, "the budget is not kept");
        let prompts: usize = plan.runs[plan.runs.len() - plan.prompt_runs..].iter().map(Run::tokens).sum();
        prop_assert_eq!(prompts, plan.prompt_tokens);
        prop_assert!(self.scheduler.blocks.capacity(0) <= self.limits.blocks);
        Ok(())
    }

    /// Does what a plan says, and checks what every row sees.
    fn run(&mut self, plan: &StepPlan) -> Result<Vec<(SequenceId, u32)>, TestCaseError> {
        let block_tokens = self.scheduler.blocks.block_tokens();
        for copy in &plan.copies {
            for offset in 0..block_tokens {
                match self.rows.get(&(copy.from, offset)).copied() {
                    Some(row) => self.rows.insert((copy.to, offset), row),
                    None => self.rows.remove(&(copy.to, offset)),
                };
            }
        }
        let mut ends = Vec::new();
        for run in &plan.runs {
            let tokens = match &run.input {
                StepInput::Known(tokens) => tokens.clone(),
                StepInput::Unread => vec![self.unread[&run.sequence]],
            };
            let mut table: Vec<BlockId> = run.tables[0].iter().map(|block| block.unwrap()).collect();
            if self.wrong_tables && self.steps % 3 == 2 && table.len() > 1 {
                table.swap(0, 1);
            }
            let place = |position: usize| (table[position / block_tokens], position % block_tokens);
            let before = run.start.checked_sub(1).map(place);
            let mut row = match before {
                None => 17,
                Some(place) => self.rows.get(&place).copied().unwrap_or(0),
            };
            for (offset, &token) in tokens.iter().enumerate() {
                row = next_row(row, token);
                self.rows.insert(place(run.start + offset), row);
                self.computed += 1;
            }
            ends.push((run, row, place(run.start + tokens.len() - 1)));
        }
        self.unread.clear();
        let mut sampled = Vec::new();
        for (run, row, place) in ends {
            // Nobody else has written there in the same step.
            prop_assert_eq!(self.rows[&place], row, "two sequences share a row");
            if run.samples {
                let token = token_after(row, self.choices[&run.sequence]);
                self.unread.insert(run.sequence, token);
                sampled.push((run.sequence, token));
            }
        }
        self.steps += 1;
        Ok(sampled)
    }

    /// Goes on until nothing is left; every request then has its answer.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        let mut turns = 0;
        while self.turn()? {
            turns += 1;
            prop_assert!(turns < 20_000, "the scheduler does not end");
        }
        prop_assert!(self.scheduler.is_idle(), "sequences are left without a step");
        prop_assert_eq!(self.scheduler.blocks().counts(0).used, 0, "a leak at idle");
        for asked in std::mem::take(&mut self.asked) {
            self.check_answer(&asked)?;
        }
        Ok(())
    }

    fn check_answer(&self, asked: &Asked) -> Result<(), TestCaseError> {
        let mut answers = vec![Vec::new(); asked.choices];
        let done = loop {
            match asked.state.next(Some(Duration::ZERO)) {
                Ok(Event::Delta(delta)) => answers[delta.choice].extend(delta.tokens),
                Ok(Event::ChoiceDone(..)) => {}
                Ok(Event::Done(done)) => break done,
                Err(status) => return Err(TestCaseError::fail(format!("no done event: {status:?}"))),
            }
        };
        prop_assert_eq!(asked.state.next(Some(Duration::ZERO)), Err(Status::Closed), "something after the end");
        let room = self.limits.blocks * self.scheduler.blocks.block_tokens();
        for (choice, answer) in answers.iter().enumerate() {
            let expected = expected(&asked.prompt, asked.max_tokens, choice as u64);
            let fits = asked.prompt.len() + expected.len() < room;
            if done.error.is_none() && fits {
                prop_assert_eq!(answer, &expected, "{} tokens of prompt", asked.prompt.len());
            }
            prop_assert!(expected.starts_with(answer), "{:?} is not the beginning of {:?}", answer, expected);
        }
        match done.error.map(|error| error.status()) {
            None => {}
            Some(Status::Cancelled) => prop_assert!(asked.cancelled),
            Some(Status::OutOfMemory) => prop_assert!(asked.prompt.len() + 1 > room),
            Some(other) => return Err(TestCaseError::fail(format!("{other:?}"))),
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Action {
    Ask { family: u32, shared: usize, own: usize, max_tokens: usize, choices: usize, priority: usize },
    Cancel { which: usize },
    Turns(usize),
    ClearCache,
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let ask = (0u32..3, 0usize..30, 1usize..12, 1usize..25, prop_oneof![4 => Just(1usize), 1 => 2usize..4], 0usize..3);
    let action = prop_oneof![
        5 => ask.prop_map(|(family, shared, own, max_tokens, choices, priority)| {
            Action::Ask { family, shared, own, max_tokens, choices, priority }
        }),
        1 => (0usize..64).prop_map(|which| Action::Cancel { which }),
        5 => (1usize..12).prop_map(Action::Turns),
        1 => Just(Action::ClearCache),
    ];
    prop::collection::vec(action, 1..25)
}

fn limits() -> impl Strategy<Value = Limits> {
    (1usize..6, 1usize..20, 1usize..30).prop_map(|(sequences, prefill_chunk, blocks)| Limits {
        sequences,
        prefill_chunk,
        target_latency: Duration::from_millis(50),
        blocks,
    })
}

fn play(machine: &mut Machine, actions: &[Action]) -> Result<(), TestCaseError> {
    for (at, action) in actions.iter().enumerate() {
        match *action {
            Action::Ask { family, shared, own, max_tokens, choices, priority } => {
                let mut prompt: Vec<u32> = (0..shared as u32).map(|i| 30 + i * 7 % 5 + family * 10).collect();
                prompt.extend((0..own as u32).map(|i| if i == 0 { 60 + at as u32 % 4 } else { i % 3 }));
                let priority = [Priority::High, Priority::Normal, Priority::Low][priority];
                machine.ask(prompt, max_tokens, choices, priority);
            }
            Action::Cancel { which } => {
                let count = machine.asked.len().max(1);
                if let Some(asked) = machine.asked.get_mut(which % count) {
                    asked.cancelled = true;
                    asked.state.cancel();
                }
            }
            Action::Turns(turns) => {
                for _ in 0..turns {
                    machine.turn()?;
                }
            }
            Action::ClearCache => {
                machine.scheduler.blocks().clear();
            }
        }
    }
    machine.settle()
}

fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(500);
    ProptestConfig { cases, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    /// Whatever else runs, joins, leaves or is cancelled: every answer is what it would be alone.
    #[test]
    fn answers_do_not_depend_on_company(
        limits in limits(),
        block_tokens in 1usize..9,
        slow_growth in 0usize..5,
        actions in actions(),
    ) {
        let mut machine = Machine::new(limits, block_tokens);
        machine.slow_growth = slow_growth;
        play(&mut machine, &actions)?;
    }
}

fn plenty(sequences: usize, prefill_chunk: usize) -> Limits {
    Limits { sequences, prefill_chunk, target_latency: Duration::from_millis(50), blocks: 1000 }
}

#[test]
fn a_wrong_block_table_is_noticed() {
    let run = |wrong: bool| {
        let mut machine = Machine::new(plenty(4, 8), 4);
        machine.wrong_tables = wrong;
        for own in 0..4 {
            machine.ask((30..50).chain([60 + own]).collect(), 12, 1, Priority::Normal);
        }
        machine.settle()
    };
    run(false).unwrap();
    assert!(run(true).is_err());
}

#[test]
fn decoding_runs_ahead_of_reading_and_prompts_run_in_chunks() {
    let mut machine = Machine::new(plenty(2, 4), 4);
    machine.scheduler.blocks().grow(20);
    machine.ask((30..40).collect(), 3, 1, Priority::Normal);
    let mut planned = Vec::new();
    for _ in 0..6 {
        let plan = machine.scheduler.plan(Instant::now(), &mut Vec::new());
        let sampled = machine.run(&plan).unwrap();
        let before = std::mem::replace(&mut machine.in_flight, sampled);
        planned
            .extend(plan.runs.iter().map(|run| (run.start, run.tokens(), run.samples, run.input == StepInput::Unread)));
        for (id, _) in before {
            machine.scheduler.commit(id, SampledToken { token: 5, logprob: None }, Instant::now());
        }
    }
    let expected = [
        (0, 4, false, false),
        (4, 4, false, false),
        (8, 2, true, false),
        // The token at 10 is not read yet when its successor is planned.
        (10, 1, true, true),
        (11, 1, true, true),
    ];
    assert_eq!(planned, expected);
}

#[test]
fn running_answers_and_a_prompt_share_every_step() {
    let mut machine = Machine::new(plenty(4, 8), 4);
    machine.scheduler.blocks().grow(200);
    let first = machine.ask(vec![41, 42], 60, 1, Priority::Normal);
    for _ in 0..3 {
        machine.turn().unwrap();
    }
    assert!(expected(&machine.asked[first].prompt, 60, 0).len() > 20, "the first answer is long enough");
    machine.ask((30..70).collect(), 2, 1, Priority::Normal);
    for _ in 0..5 {
        let plan = machine.scheduler.plan(Instant::now(), &mut Vec::new());
        assert_eq!(plan.runs.iter().map(Run::tokens).collect::<Vec<_>>(), [1, 8]);
        let sampled = machine.run(&plan).unwrap();
        for (id, token) in std::mem::replace(&mut machine.in_flight, sampled) {
            machine.scheduler.commit(id, SampledToken { token, logprob: None }, Instant::now());
        }
    }
    machine.settle().unwrap();
}

#[test]
fn classes_come_in_their_order_and_nobody_starves() {
    let mut machine = Machine::new(plenty(1, 8), 4);
    machine.scheduler.blocks().grow(50);
    let start = Instant::now();
    let [low, normal, high] =
        [Priority::Low, Priority::Normal, Priority::High].map(|p| machine.ask(vec![9, 9], 1, 1, p));
    let first = |machine: &mut Machine, now: Instant| machine.scheduler.plan(now, &mut Vec::new()).runs[0].sequence;
    assert_eq!(first(&mut machine, start), high as SequenceId);
    machine.scheduler.commit(high as SequenceId, SampledToken { token: STOP, logprob: None }, start);
    // After a while the lowest class counts as the one above, and it came first.
    assert_eq!(first(&mut machine, start + PATIENCE * 3), low as SequenceId);
    machine.scheduler.commit(low as SequenceId, SampledToken { token: STOP, logprob: None }, start);
    assert_eq!(first(&mut machine, start), normal as SequenceId);
}

#[test]
fn a_shared_prompt_is_computed_once_and_held_once() {
    let mut machine = Machine::new(plenty(16, 64), 32);
    let system: Vec<u32> = (0..2000).map(|i| 30 + i % 97).collect();
    for own in 0..16 {
        let prompt = system.iter().copied().chain([200 + own, 1, 2]).collect();
        machine.ask(prompt, 1, 1, Priority::Normal);
    }
    machine.settle().unwrap();
    assert_eq!(machine.computed, 2000 + 16 * 3);
    let counters = machine.scheduler.counters();
    assert_eq!((counters.prompt_tokens, counters.cached_tokens), (2000 + 16 * 3, 15 * 2000));
    // 62 whole blocks are shared, the half block behind them is everybody's own.
    assert_eq!(machine.scheduler.blocks().counts(0).cached, 62 + 16);
}

#[test]
fn preempted_sequences_come_back() {
    let limits = Limits { blocks: 12, ..plenty(4, 16) };
    let mut machine = Machine::new(limits, 4);
    for own in 0..4 {
        machine.ask(vec![30 + own, 31, 32 + own, 33], 40, 1, Priority::Normal);
    }
    machine.settle().unwrap();
    assert!(machine.scheduler.counters().preemptions > 0, "the blocks were enough: this test sees nothing");
}

#[test]
fn what_never_fits_is_refused_with_numbers() {
    let mut machine = Machine::new(Limits { blocks: 3, ..plenty(2, 16) }, 4);
    let (too_long, fits) =
        (machine.ask((30..43).collect(), 4, 1, Priority::Normal), machine.ask(vec![1], 2, 1, Priority::Low));
    let states = [too_long, fits].map(|at| Arc::clone(&machine.asked[at].state));
    while machine.turn().unwrap() {}
    let Ok(Event::Done(done)) = states[0].next(Some(Duration::ZERO)) else { panic!("an answer") };
    let error = done.error.unwrap();
    assert_eq!(error.status(), Status::OutOfMemory);
    assert!(error.message().contains("14 tokens") && error.message().contains("12 tokens"), "{error}");
    assert!(matches!(states[1].next(Some(Duration::ZERO)), Ok(Event::Delta(_))));
}

#[test]
fn a_failed_step_ends_what_runs_and_empties_the_cache() {
    let mut machine = Machine::new(plenty(2, 16), 4);
    let all: Vec<usize> =
        (0..3).map(|own| machine.ask(vec![30, 31, 32, 33, 34 + own], 400, 1, Priority::Normal)).collect();
    for _ in 0..4 {
        machine.turn().unwrap();
    }
    machine.in_flight.clear();
    let ended = machine.scheduler.fail_running(&Error::backend("broken"));
    assert_eq!(ended, [all[0] as SequenceId, all[1] as SequenceId]);
    let counts = machine.scheduler.blocks().counts(0);
    assert_eq!((counts.used, counts.cached, machine.scheduler.blocks().entries()), (0, 0, 0));
    while machine.turn().unwrap() {}
    assert!(machine.scheduler.is_idle(), "the third request is served");
}
