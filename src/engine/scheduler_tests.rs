//! The scheduler with a runner that computes nothing but remembers everything: a row of a block stands for a token and
//! all before it, layer by layer, and the next token follows from the last layer. So a wrong block, slot, token or layer shows
//! in the answer.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, OnceLock};

use proptest::prelude::*;

use super::*;
use crate::cache::group::GroupKind;
use crate::engine::{Event, Priority, RequestState, activity::Activity, sequence::Prepared};
use crate::error::Status;
use crate::sampling::SamplingParams;
use crate::text::StopMatcher;
use crate::text::grammar::{Constraint, GrammarVocabulary, Guide, ThinkingMarkers, ThinkingStart};

const STOP: u32 = 0;

type Row = u64;

/// Before the first token.
const FIRST: Row = 17;

/// What a layer makes of what comes from the layer below, behind its own rows of the tokens before.
fn next_row(before: Row, hidden: Row) -> Row {
    (before ^ hidden).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23)
}

/// The cache group of a layer.
fn group_of(layer: usize, groups: usize) -> usize {
    layer % groups
}

/// The rows that a token at `position` sees of its layer: the one before it, which stands for all, or those of a window.
fn seen(kind: GroupKind, position: usize) -> Range<usize> {
    match kind {
        GroupKind::Full => position.saturating_sub(1)..position,
        GroupKind::Window(_) => kind.first_position(position)..position,
    }
}

/// What is sampled after a row; now and then the stop token.
fn token_after(row: Row, choice: u64) -> u32 {
    ((row ^ choice.wrapping_mul(0xD134_2543_DE82_EF95)) >> 20) as u32 % 97
}

/// What a sequence may draw.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Guided {
    Free,
    /// Words of one to three small tokens with a large one behind each.
    Constrained,
    /// So many tokens of thinking at most.
    Budget(usize),
}

const THINK: u32 = 95;
const THOUGHT: u32 = 96;

fn guide(guided: Guided) -> Option<Guide> {
    static BUILT: OnceLock<Arc<GrammarVocabulary>> = OnceLock::new();
    let build = || {
        let mut tokens: Vec<Vec<u8>> = (0..95u8).map(|token| vec![32 + token]).collect();
        tokens.extend([b"\xff<think>".to_vec(), b"\xff</think>".to_vec()]);
        let markers = ThinkingMarkers { open: "<think>".into(), close: "</think>".into() };
        let built = GrammarVocabulary::of_tokens(tokens, &[STOP]).unwrap();
        Arc::new(built.with_thinking(&markers, [vec![THINK], vec![THOUGHT]]).unwrap())
    };
    let vocabulary = Arc::clone(BUILT.get_or_init(build));
    match guided {
        Guided::Free => None,
        Guided::Constrained => {
            let words = Constraint::Regex("([!-O]{1,3}[P-~]){1,9}".into());
            let matcher = vocabulary.compile(&words).unwrap();
            Guide::new(vocabulary, Some(matcher), ThinkingStart::Never, None)
        }
        Guided::Budget(tokens) => Guide::new(vocabulary, None, ThinkingStart::Opened, Some(tokens)),
    }
}

/// The first token from `token` on that may come.
fn masked(mask: Option<TokenMask>, token: u32) -> u32 {
    let allows = |next: &u32| mask.as_ref().is_none_or(|mask| mask.allows(*next));
    (token..97).chain(0..token).find(allows).expect("some token may come")
}

/// The answer that a request gets when it is alone, of a model whose layers keep all rows.
fn expected(layers: usize, prompt: &[u32], max_tokens: usize, choice: u64) -> Vec<u32> {
    let model = FakeModel { layers: vec![GroupKind::Full; layers], states: false };
    expected_of(&model, prompt, max_tokens, choice, Guided::Free)
}

/// What a model's layers see of the tokens before.
struct FakeModel {
    layers: Vec<GroupKind>,
    /// Besides, each has a state, which all tokens so far have changed.
    states: bool,
}

fn expected_of(model: &FakeModel, prompt: &[u32], max_tokens: usize, choice: u64, guided: Guided) -> Vec<u32> {
    let mut guide = guide(guided);
    let mut rows: Vec<(Vec<Row>, Row)> = vec![(Vec::new(), FIRST); model.layers.len()];
    let mut pass = |token: u32| {
        rows.iter_mut().zip(&model.layers).fold(Row::from(token), |hidden, ((rows, state), &kind)| {
            let before = rows[seen(kind, rows.len())].iter().copied().reduce(next_row).unwrap_or(FIRST);
            let seen = if model.states { next_row(before, *state) } else { before };
            *state = next_row(*state, hidden);
            rows.push(next_row(seen, hidden));
            rows[rows.len() - 1]
        })
    };
    let mut last = prompt.iter().fold(0, |_, &token| pass(token));
    let mut answer = Vec::new();
    while answer.len() < max_tokens {
        let mask = guide.as_mut().and_then(|guide| guide.mask().unwrap());
        let token = masked(mask, token_after(last, choice));
        if token == STOP {
            break;
        }
        answer.push(token);
        if let Some(guide) = &mut guide {
            guide.accept(token).unwrap();
            if guide.is_complete() {
                break;
            }
        }
        last = pass(token);
    }
    answer
}

struct Asked {
    state: Arc<RequestState>,
    prompt: Vec<u32>,
    max_tokens: usize,
    choices: usize,
    guided: Guided,
    cancelled: bool,
}

/// The engine loop around a scheduler, with the runner's part made up.
struct Machine {
    scheduler: Scheduler,
    limits: Limits,
    /// Kinds of the cache groups; layers are in one after the other.
    kinds: Vec<GroupKind>,
    /// By layer, block and place in it.
    rows: HashMap<(usize, BlockId, usize), Row>,
    /// By layer and slot; of models with states.
    states: Option<HashMap<(usize, SlotId), Row>>,
    /// What comes from the layers that a piece has passed.
    held: HashMap<SequenceId, Vec<Row>>,
    /// Steps in which a piece stopped on its way.
    stops: usize,
    /// What passes its layers beside the steps.
    beside: Option<besides::Beside>,
    /// How often that stopped earlier than planned.
    early_stops: usize,
    /// What the last step sampled: that of the step before is read by then.
    in_flight: Vec<(SequenceId, u32)>,
    unread: HashMap<SequenceId, u32>,
    /// Which answer of its request a sequence is.
    choices: HashMap<SequenceId, u64>,
    asked: Vec<Asked>,
    next_id: SequenceId,
    /// Tokens behind the last message of a prompt.
    asks_with: usize,
    /// Turns that a growth takes.
    slow_growth: usize,
    growing: Option<(Vec<usize>, usize)>,
    steps: usize,
    computed: usize,
    wrong_tables: bool,
    /// Tables of windows are one block off.
    wrong_windows: bool,
    /// States are not copied.
    loses_states: bool,
    /// Forgets what it should hold.
    forgets: bool,
    /// Says that prompts beside the steps have come as far as planned.
    ignores_stops: bool,
    /// Draws what is not allowed.
    ignores_masks: bool,
}

impl Machine {
    fn new(limits: Limits, block_tokens: usize) -> Self {
        Self::of_groups(limits, block_tokens, &[GroupKind::Full])
    }

    fn of_groups(limits: Limits, block_tokens: usize, kinds: &[GroupKind]) -> Self {
        let blocks = BlockManager::new(block_tokens, kinds, [1; 32]);
        Self {
            scheduler: Scheduler::new(limits.clone(), blocks),
            limits,
            kinds: kinds.to_vec(),
            rows: HashMap::new(),
            states: None,
            held: HashMap::new(),
            stops: 0,
            beside: None,
            early_stops: 0,
            in_flight: Vec::new(),
            unread: HashMap::new(),
            choices: HashMap::new(),
            asked: Vec::new(),
            next_id: 0,
            asks_with: 1,
            slow_growth: 0,
            growing: None,
            steps: 0,
            computed: 0,
            wrong_tables: false,
            wrong_windows: false,
            loses_states: false,
            forgets: false,
            ignores_stops: false,
            ignores_masks: false,
        }
    }

    fn ask(&mut self, prompt: Vec<u32>, max_tokens: usize, choices: usize, priority: Priority) -> usize {
        self.ask_guided(prompt, max_tokens, choices, priority, Guided::Free)
    }

    fn ask_guided(
        &mut self,
        prompt: Vec<u32>,
        max_tokens: usize,
        choices: usize,
        priority: Priority,
        guided: Guided,
    ) -> usize {
        let (state, sink) = RequestState::new("m".into(), Default::default(), Activity::new().enter());
        let prepared = Prepared {
            last_message: prompt.len().saturating_sub(self.asks_with).max(1),
            prompt: prompt.clone(),
            max_tokens,
            sampling: SamplingParams::default(),
            stop_tokens: HashSet::from([STOP]),
            stop: StopMatcher::new::<&str>(&[]).unwrap(),
            guide: guide(guided),
            answer: None,
            ticket: None,
            choices,
            priority,
            tells_start: false,
            sink,
        };
        for sequence in Sequence::of_request(self.next_id, prepared, None, Instant::now()) {
            self.choices.insert(sequence.id(), sequence.id() - self.next_id);
            self.scheduler.admit(sequence);
        }
        self.next_id += choices as SequenceId;
        self.asked.push(Asked { state, prompt, max_tokens, choices, guided, cancelled: false });
        self.asked.len() - 1
    }

    fn commit(&mut self, id: SequenceId, token: u32, now: Instant) {
        self.scheduler.commit(id, SampledToken { token, logprob: None }, now);
        self.scheduler.tell_ends();
    }

    /// A turn of the engine loop; whether there was anything to do.
    fn turn(&mut self) -> Result<bool, TestCaseError> {
        self.pass_beside(self.steps % 3);
        self.scheduler.reap_cancelled();
        self.grow();
        let plan = self.plan();
        self.check_plan(&plan)?;
        let sampled = self.run(&plan)?;
        // Steps take now longer and now shorter, so that pieces have all sizes and stop everywhere.
        let layer = [1e-5, 3e-4, 2e-3, 1e-2, 0.1][self.steps / 5 % 5];
        let seconds = 0.02 + layer * (plan.work.tokens * plan.work.layers) as f64;
        match self.beside {
            Some(_) => self.scheduler.observe_beside(seconds),
            None => self.scheduler.observe(seconds, plan.runs.len() > plan.prompt_runs, plan.work),
        }
        let before = if self.limits.beside { sampled } else { std::mem::replace(&mut self.in_flight, sampled) };
        let busy = !before.is_empty() || !plan.runs.is_empty() || self.growing.is_some();
        for (id, token) in before {
            self.scheduler.commit(id, SampledToken { token, logprob: None }, Instant::now());
        }
        self.scheduler.tell_ends();
        Ok(busy || self.scheduler.wanted_blocks() != self.capacities())
    }

    fn capacities(&mut self) -> Vec<usize> {
        (0..self.kinds.len()).map(|group| self.scheduler.blocks.capacity(group)).collect()
    }

    fn grow(&mut self) {
        let wanted = self.scheduler.wanted_blocks();
        if self.growing.is_none() && wanted != self.capacities() {
            self.growing = Some((wanted, self.slow_growth));
        }
        match self.growing.take() {
            Some((capacities, left)) if left > 0 => self.growing = Some((capacities, left - 1)),
            Some((capacities, _)) => {
                let blocks = self.scheduler.blocks();
                capacities.into_iter().enumerate().for_each(|(group, capacity)| blocks.grow(group, capacity));
            }
            None => {}
        }
    }

    fn check_plan(&self, plan: &StepPlan) -> Result<(), TestCaseError> {
        let ids: HashSet<SequenceId> = plan.runs.iter().map(|run| run.sequence).collect();
        prop_assert_eq!(ids.len(), plan.runs.len(), "a sequence has two runs");
        prop_assert!(plan.runs.len() <= self.limits.sequences, "more sequences than may run");
        prop_assert!(plan.work.tokens <= self.limits.prefill_chunk, "the budget is not kept");
        let prompts = &plan.runs[plan.runs.len() - plan.prompt_runs..];
        prop_assert_eq!(prompts.iter().map(Run::tokens).sum::<usize>(), plan.work.tokens);
        prop_assert!(!plan.layers.is_empty() && plan.layers.end <= self.limits.layers);
        prop_assert_eq!(plan.layers.len(), plan.work.layers);
        let decodes = plan.runs.len() > plan.prompt_runs;
        prop_assert!(decodes || plan.layers.end == self.limits.layers, "a piece stops although nobody waits");
        let last = plan.layers.end == self.limits.layers;
        prop_assert!(last || prompts.iter().all(|run| !run.samples), "a token before the last layer");
        self.check_beside(plan)?;
        for (group, &kind) in self.kinds.iter().enumerate() {
            let blocks = &self.scheduler.blocks;
            prop_assert!(blocks.capacity(group) <= self.limits.blocks[group]);
            for run in &plan.runs {
                let held = run.tables[group].iter().flatten().count();
                let most = kind.most_blocks(run.start + run.tokens(), run.tokens(), blocks.block_tokens());
                prop_assert!(
                    held <= most,
                    "{held} blocks of {kind:?} for {} tokens behind {}",
                    run.tokens(),
                    run.start
                );
            }
        }
        Ok(())
    }

    /// Does what a plan says, and checks what every row sees.
    fn run(&mut self, plan: &StepPlan) -> Result<Vec<(SequenceId, u32)>, TestCaseError> {
        let answers = plan.runs.len() - plan.prompt_runs;
        // Which layers a step passes with its prompts, if they are in it.
        let layers = if plan.beside { 0..0 } else { plan.layers.clone() };
        let held = if plan.prompt_runs > 0 { std::mem::take(&mut self.held) } else { HashMap::new() };
        let mut hidden = Vec::new();
        for (at, run) in plan.runs.iter().enumerate() {
            let tokens = match &run.input {
                StepInput::Known(tokens) => tokens.clone(),
                StepInput::Unread => vec![self.unread[&run.sequence]],
            };
            self.computed += if at < answers || plan.layers.start == 0 { tokens.len() } else { 0 };
            let goes_on = at >= answers && plan.layers.start > 0 && !self.forgets;
            let own = goes_on.then(|| held.get(&run.sequence).cloned());
            let own = own.unwrap_or_else(|| Some(tokens.iter().map(|&token| Row::from(token)).collect()));
            let Some(own) = own else { return Err(TestCaseError::fail("a piece goes on that never began")) };
            prop_assert_eq!(own.len(), tokens.len());
            hidden.push(own);
        }
        for layer in 0..self.limits.layers {
            let passes = |at: usize| at < answers || layers.contains(&layer);
            let passing: Vec<usize> = (0..plan.runs.len()).filter(|&at| passes(at)).collect();
            if !passing.is_empty() {
                self.copy_blocks(layer, &plan.copies);
                self.copy_states(layer, &plan.slot_copies);
            }
            for &at in &passing {
                self.pass(layer, &plan.runs[at], &mut hidden[at]);
            }
            for &at in &passing {
                // Nobody else has written there in the same step.
                let run = &plan.runs[at];
                let (block, offset) = self.place(layer, run, run.start + run.tokens() - 1).unwrap_or_default();
                prop_assert_eq!(self.rows.get(&(layer, block, offset)), hidden[at].last(), "two write to a row");
            }
        }
        if plan.beside {
            self.begin_beside(plan, hidden.split_off(answers));
        } else if plan.prompt_runs > 0 && plan.layers.end < self.limits.layers {
            self.held = plan.runs.iter().map(|run| run.sequence).zip(hidden.clone()).skip(answers).collect();
            self.stops += 1;
        }
        self.unread.clear();
        if self.scheduler.waits_for_masks(plan) {
            for (id, token) in std::mem::take(&mut self.in_flight) {
                self.scheduler.commit(id, SampledToken { token, logprob: None }, Instant::now());
            }
        }
        let mut sampled = Vec::new();
        for (run, hidden) in plan.runs.iter().zip(hidden).filter(|(run, _)| run.samples) {
            let mask = if self.ignores_masks { None } else { self.scheduler.mask(run.sequence) };
            prop_assert!(mask.is_none() || self.scheduler.guides(plan), "a mask that nobody asks for");
            let token = masked(mask, token_after(hidden[hidden.len() - 1], self.choices[&run.sequence]));
            self.unread.insert(run.sequence, token);
            sampled.push((run.sequence, token));
        }
        self.steps += 1;
        Ok(sampled)
    }

    fn copy_blocks(&mut self, layer: usize, copies: &[BlockCopy]) {
        let group = group_of(layer, self.kinds.len());
        for copy in copies.iter().filter(|copy| copy.group == group) {
            for offset in 0..self.scheduler.blocks.block_tokens() {
                match self.rows.get(&(layer, copy.from, offset)).copied() {
                    Some(row) => self.rows.insert((layer, copy.to, offset), row),
                    None => self.rows.remove(&(layer, copy.to, offset)),
                };
            }
        }
    }

    fn copy_states(&mut self, layer: usize, copies: &[SlotCopy]) {
        let Some(states) = self.states.as_mut().filter(|_| !self.loses_states) else { return };
        let read: Vec<Row> = copies.iter().map(|copy| states.get(&(layer, copy.from)).copied().unwrap_or(0)).collect();
        states.extend(copies.iter().map(|copy| (layer, copy.to)).zip(read));
    }

    /// Block and place in it of a run's token in the layer's group.
    fn place(&self, layer: usize, run: &Run, position: usize) -> Option<(BlockId, usize)> {
        let (block_tokens, group) = (self.scheduler.blocks.block_tokens(), group_of(layer, self.kinds.len()));
        let table = &run.tables[group];
        let mut block = position / block_tokens;
        if self.wrong_tables && self.steps % 3 == 2 && table.len() > 1 && block < 2 {
            block = 1 - block;
        }
        if self.wrong_windows && self.kinds[group] != GroupKind::Full {
            block = (block + 1) % table.len();
        }
        Some((table[block]?, position % block_tokens))
    }

    /// Takes the tokens of a run through a layer.
    fn pass(&mut self, layer: usize, run: &Run, hidden: &mut [Row]) {
        let kind = self.kinds[group_of(layer, self.kinds.len())];
        for (at, hidden) in hidden.iter_mut().enumerate() {
            let position = run.start + at;
            let row = |position| {
                let place = self.place(layer, run, position);
                place.and_then(|(block, offset)| self.rows.get(&(layer, block, offset)).copied()).unwrap_or(0)
            };
            let mut seen = seen(kind, position).map(row).reduce(next_row).unwrap_or(FIRST);
            if let Some((states, slot)) = self.states.as_mut().zip(run.state) {
                let before = states.get(&(layer, slot)).copied().filter(|_| position > 0);
                let before = if position == 0 { FIRST } else { before.unwrap_or(0) };
                seen = next_row(seen, before);
                states.insert((layer, slot), next_row(before, *hidden));
            }
            *hidden = next_row(seen, *hidden);
            // A wrong table may have no block there.
            if let Some((block, offset)) = self.place(layer, run, position) {
                self.rows.insert((layer, block, offset), *hidden);
            }
        }
    }

    /// Goes on until nothing is left; every request then has its answer.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        let mut turns = 0;
        while self.turn()? {
            turns += 1;
            prop_assert!(turns < 20_000, "the scheduler does not end");
        }
        prop_assert!(self.scheduler.is_idle(), "sequences are left without a step");
        let used = (0..self.kinds.len()).map(|group| self.scheduler.blocks.counts(group).used).sum::<usize>();
        prop_assert_eq!(used, 0, "a leak at idle");
        let slots = self.scheduler.blocks.snapshots().map_or(0, |snapshots| snapshots.counts().used);
        prop_assert_eq!(slots, 0, "a leak of states at idle");
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
                Ok(Event::Done(done)) => break done,
                Ok(_) => {}
                Err(status) => return Err(TestCaseError::fail(format!("no done event: {status:?}"))),
            }
        };
        prop_assert_eq!(asked.state.next(Some(Duration::ZERO)), Err(Status::Closed), "something after the end");
        let holds = |tokens: usize| {
            let most = |group| self.scheduler.most_blocks(group, tokens) <= self.limits.blocks[group];
            (0..self.kinds.len()).all(most)
        };
        let kind = |layer| self.kinds[group_of(layer, self.kinds.len())];
        let layers = (0..self.limits.layers).map(kind).collect();
        let model = FakeModel { layers, states: self.states.is_some() };
        for (choice, answer) in answers.iter().enumerate() {
            let expected = expected_of(&model, &asked.prompt, asked.max_tokens, choice as u64, asked.guided);
            let fits = holds(asked.prompt.len() + expected.len() + 1);
            if done.error.is_none() && fits {
                prop_assert_eq!(answer, &expected, "{} tokens of prompt", asked.prompt.len());
            }
            prop_assert!(expected.starts_with(answer), "{:?} is not the beginning of {:?}", answer, expected);
        }
        match done.error.map(|error| error.status()) {
            None => {}
            Some(Status::Cancelled) => prop_assert!(asked.cancelled),
            Some(Status::OutOfMemory) => prop_assert!(!holds(asked.prompt.len() + 1)),
            Some(other) => return Err(TestCaseError::fail(format!("{other:?}"))),
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Action {
    Ask { family: u32, shared: usize, own: usize, max_tokens: usize, choices: usize, priority: usize, guided: Guided },
    Cancel { which: usize },
    Turns(usize),
    ClearCache,
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let guided = prop_oneof![
        3 => Just(Guided::Free),
        1 => Just(Guided::Constrained),
        1 => (0usize..5).prop_map(Guided::Budget),
    ];
    let choices = prop_oneof![4 => Just(1usize), 1 => 2usize..4];
    let ask = (0u32..3, 0usize..30, 1usize..12, 1usize..25, choices, 0usize..3, guided);
    let action = prop_oneof![
        5 => ask.prop_map(|(family, shared, own, max_tokens, choices, priority, guided)| {
            Action::Ask { family, shared, own, max_tokens, choices, priority, guided }
        }),
        1 => (0usize..64).prop_map(|which| Action::Cancel { which }),
        5 => (1usize..12).prop_map(Action::Turns),
        1 => Just(Action::ClearCache),
    ];
    prop::collection::vec(action, 1..25)
}

/// Kinds of groups, and limits. A group of windows has what a single sequence needs, if the other one does.
fn limits() -> impl Strategy<Value = (Limits, Vec<GroupKind>, usize)> {
    let kinds = prop_oneof![
        Just(vec![GroupKind::Full]),
        (1usize..14).prop_map(|window| vec![GroupKind::Full, GroupKind::Window(window)]),
        (1usize..14).prop_map(|window| vec![GroupKind::Window(window)]),
    ];
    let numbers = (1usize..6, 1usize..20, 1usize..30, 1usize..6, any::<bool>(), 0usize..6);
    (numbers, kinds, 1usize..9).prop_map(|(numbers, kinds, block_tokens)| {
        let (sequences, prefill_chunk, blocks, layers, beside, more) = numbers;
        let single = |kind: &GroupKind| kind.most_blocks(blocks * block_tokens, prefill_chunk, block_tokens);
        let group = |kind: &GroupKind| if kinds.len() > 1 { (single(kind) + more).min(blocks) } else { blocks };
        let target_latency = Duration::from_millis(50);
        let blocks = kinds.iter().map(group).collect();
        (Limits { sequences, prefill_chunk, layers, beside, target_latency, blocks }, kinds, block_tokens)
    })
}

fn play(machine: &mut Machine, actions: &[Action]) -> Result<(), TestCaseError> {
    for (at, action) in actions.iter().enumerate() {
        match *action {
            Action::Ask { family, shared, own, max_tokens, choices, priority, guided } => {
                let mut prompt: Vec<u32> = (0..shared as u32).map(|i| 30 + i * 7 % 5 + family * 10).collect();
                prompt.extend((0..own as u32).map(|i| if i == 0 { 60 + at as u32 % 4 } else { i % 3 }));
                let priority = [Priority::High, Priority::Normal, Priority::Low][priority];
                machine.ask_guided(prompt, max_tokens, choices, priority, guided);
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
        (limits, kinds, block_tokens) in limits(),
        slow_growth in 0usize..5,
        actions in actions(),
    ) {
        let mut machine = Machine::of_groups(limits, block_tokens, &kinds);
        machine.slow_growth = slow_growth;
        play(&mut machine, &actions)?;
    }
}

fn plenty(sequences: usize, prefill_chunk: usize) -> Limits {
    let target_latency = Duration::from_millis(50);
    Limits { sequences, prefill_chunk, layers: 1, beside: false, target_latency, blocks: vec![1000] }
}

/// Runs a step without a measurement: tokens, layers of prompts, and whether each run samples.
fn step(machine: &mut Machine) -> (Vec<usize>, Range<usize>, Vec<bool>) {
    let plan = machine.scheduler.plan(Instant::now(), &mut Vec::new());
    machine.check_plan(&plan).unwrap();
    let sampled = machine.run(&plan).unwrap();
    for (id, token) in std::mem::replace(&mut machine.in_flight, sampled) {
        machine.commit(id, token, Instant::now());
    }
    let of = |run: &Run| (run.tokens(), run.samples);
    let (tokens, samples) = plan.runs.iter().map(of).unzip();
    (tokens, plan.layers, samples)
}

#[path = "scheduler_beside_tests.rs"]
mod besides;
#[path = "scheduler_cancel_tests.rs"]
mod cancels;
#[path = "scheduler_case_tests.rs"]
mod single;
use single::with_a_piece_on_its_way;
#[path = "scheduler_state_tests.rs"]
mod states;
