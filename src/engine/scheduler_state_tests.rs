//! Models whose layers keep states: what is found of prompts, and that answers stay what they are.

use super::*;
use crate::cache::snapshots::Snapshots;

/// Each layer has a state; `slots` of them at most, those for running sequences included.
fn with_states(limits: Limits, block_tokens: usize, kinds: &[GroupKind], slots: usize) -> Machine {
    let mut machine = Machine::of_groups(limits.clone(), block_tokens, kinds);
    let blocks = BlockManager::new(block_tokens, kinds, [1; 32]);
    let snapshots = Snapshots::new(limits.sequences, slots);
    machine.scheduler = Scheduler::new(limits, blocks.with_snapshots(snapshots));
    machine.states = Some(HashMap::new());
    machine
}

/// A machine with blocks and slots for everything.
fn roomy(sequences: usize, prefill_chunk: usize) -> Machine {
    let mut machine = with_states(plenty(sequences, prefill_chunk), 4, &[GroupKind::Full], 100);
    machine.scheduler.blocks().grow(0, 500);
    machine.scheduler.blocks().snapshots().unwrap().grow(100);
    machine
}

/// Tokens that a request has computed and cached.
fn cost(machine: &mut Machine, prompt: &[u32], max_tokens: usize) -> (u64, u64) {
    let before = machine.scheduler.counters();
    machine.ask(prompt.to_vec(), max_tokens, 1, Priority::Normal);
    machine.settle().unwrap();
    let after = machine.scheduler.counters();
    (after.prompt_tokens - before.prompt_tokens, after.cached_tokens - before.cached_tokens)
}

proptest! {
    #![proptest_config(cases())]

    /// Whatever else runs, joins, leaves, is cancelled or takes the slots of others.
    #[test]
    fn answers_do_not_depend_on_what_states_are_kept(
        (limits, kinds, block_tokens) in limits(),
        slots in 0usize..12,
        asks_with in 1usize..9,
        actions in actions(),
    ) {
        let mut machine = with_states(limits, block_tokens, &kinds, slots);
        machine.asks_with = asks_with;
        machine.scheduler.blocks().snapshots().unwrap().grow(slots);
        play(&mut machine, &actions)?;
    }
}

#[test]
fn a_state_that_is_not_copied_is_noticed() {
    let run = |loses: bool| {
        let mut machine = roomy(4, 64);
        machine.loses_states = loses;
        for own in 0..4 {
            machine.ask((30..50).chain([60 + own]).collect(), 12, 1, Priority::Normal);
        }
        machine.settle()
    };
    run(false).unwrap();
    assert!(run(true).is_err());
}

#[test]
fn a_conversation_computes_its_own_new_tokens_only() {
    let mut machine = roomy(4, 16);
    machine.asks_with = 3;
    let mut prompt: Vec<u32> = (20..53).collect();
    let mut known = 0;
    for turn in 0..10u32 {
        let (computed, cached) = cost(&mut machine, &prompt, 7);
        assert_eq!((computed as usize, cached as usize), (prompt.len() - known, known), "turn {turn}");
        // The answer, whose last token nobody has computed unless it is what ends it, and the next message.
        let model = FakeModel { layers: vec![GroupKind::Full], states: true };
        let answer = expected_of(&model, &prompt, 7, 0, Guided::Free);
        known = prompt.len() + answer.len();
        let ended = answer.len() < 7;
        prompt.extend(answer);
        if ended {
            prompt.push(STOP);
            known += 1;
        } else {
            known -= 1;
        }
        prompt.extend([70 + turn, 71, 72, 73, 74]);
    }
}

#[test]
fn a_template_that_changes_what_follows_the_last_message_costs_no_more_than_that() {
    let mut machine = roomy(4, 64);
    machine.asks_with = 3;
    let message: Vec<u32> = (20..61).collect();
    let asking = |tokens: &[u32]| [tokens, &[90, 91, 92]].concat();
    assert_eq!(cost(&mut machine, &asking(&message), 5), (44, 0));
    // Asked again: up to the last message it is there.
    assert_eq!(cost(&mut machine, &asking(&message), 5), (3, 41));
    // Without the thinking, and with what the user says next.
    let next = [&message[..], &[90, 40, 41, 80, 81]].concat();
    assert_eq!(cost(&mut machine, &asking(&next), 5), (8, 41));
}

/// The second one that leaves a prompt in the middle keeps a state there, which serves those after it.
#[test]
fn states_are_kept_where_prompts_part() {
    let mut machine = roomy(4, 64);
    let common: Vec<u32> = (20..70).collect();
    let prompt = |own: u32| [&common[..], &[80 + own, 60, 61, 62, 63, 64]].concat();
    assert_eq!(cost(&mut machine, &prompt(0), 2), (56, 0));
    assert_eq!(cost(&mut machine, &prompt(1), 2), (56, 0), "no state there yet");
    assert_eq!(cost(&mut machine, &prompt(2), 2), (6, 50));
    assert_eq!(cost(&mut machine, &prompt(3), 2), (6, 50));
}

/// Those that come together wait for the first one that leaves a state for them.
#[test]
fn answers_to_one_prompt_compute_it_once() {
    let mut machine = roomy(8, 16);
    machine.asks_with = 2;
    let prompt: Vec<u32> = (20..73).collect();
    machine.ask(prompt.clone(), 4, 4, Priority::Normal);
    machine.settle().unwrap();
    let counters = machine.scheduler.counters();
    assert_eq!((counters.prompt_tokens, counters.cached_tokens), (53 + 3 * 2, 3 * 51));
}

#[test]
fn a_preempted_sequence_goes_on_where_it_was() {
    let mut machine = roomy(4, 64);
    let token = (40..).find(|&token| {
        let model = FakeModel { layers: vec![GroupKind::Full], states: true };
        expected_of(&model, &[token, 42, 43, 44, 45, 46], 20, 0, Guided::Free).len() == 20
    });
    machine.ask([token.unwrap(), 42, 43, 44, 45, 46].to_vec(), 20, 1, Priority::Normal);
    for _ in 0..9 {
        machine.turn().unwrap();
    }
    let before = machine.computed;
    machine.scheduler.preempt_all();
    machine.settle().unwrap();
    // All but the tokens of its prompt and of the answer until then; a stop is noticed a step late.
    assert!(machine.computed - before <= 13, "{}", machine.computed - before);
    assert_eq!(machine.scheduler.counters().preemptions, 1);
}

/// Slots grow when snapshots have to go, and never beyond their limit.
#[test]
fn slots_are_wanted_when_snapshots_go() {
    let mut machine = with_states(plenty(2, 64), 4, &[GroupKind::Full], 10);
    machine.scheduler.blocks().grow(0, 500);
    let mut capacities = Vec::new();
    for own in 0..20 {
        cost(&mut machine, &[30 + own, 40, 41, 42, 43, 44], 2);
        let snapshots = machine.scheduler.blocks().snapshots().unwrap();
        let wanted = snapshots.wanted();
        snapshots.grow(wanted);
        capacities.push(snapshots.capacity());
    }
    assert_eq!((capacities[0], capacities[19]), (4, 10), "{capacities:?}");
    assert!(capacities.is_sorted());
}

/// The same where what they have in common begins behind a state in the middle of a block.
#[test]
fn answers_to_one_prompt_compute_it_once_behind_a_state_anywhere() {
    let mut machine = roomy(8, 16);
    machine.asks_with = 3;
    let common: Vec<u32> = (20..50).collect();
    assert_eq!(cost(&mut machine, &[&common[..], &[90, 91, 92]].concat(), 2), (33, 0));
    let before = machine.scheduler.counters();
    let prompt = [&common[..], &(50..79).collect::<Vec<u32>>()].concat();
    machine.ask(prompt, 4, 4, Priority::Normal);
    machine.settle().unwrap();
    let after = machine.scheduler.counters();
    assert_eq!(after.prompt_tokens - before.prompt_tokens, 29 + 3 * 3);
    assert_eq!(after.cached_tokens - before.cached_tokens, 30 + 3 * 56);
}
