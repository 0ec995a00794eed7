//! Single histories: who is in which step, and what is noticed.

use super::*;

/// A machine of four layers that runs an answer and begins a prompt of 40 tokens, two layers a step.
pub(super) fn with_a_piece_on_its_way() -> (Machine, usize) {
    let mut machine = Machine::new(Limits { layers: 4, ..plenty(4, 64) }, 4);
    machine.scheduler.blocks().grow(0, 200);
    let long = (40..).find(|&token| expected(4, &[token, 42], 60, 0).len() > 20).unwrap();
    machine.ask(vec![long, 42], 60, 1, Priority::Normal);
    for _ in 0..3 {
        machine.turn().unwrap();
    }
    for _ in 0..100 {
        (0..2).for_each(|_| machine.scheduler.observe(0.01, true, Work::default()));
        let work = Work { layers: 2, ..Work::of_run(0, 40) };
        machine.scheduler.observe(0.04, true, work);
    }
    let prompt = machine.ask((30..70).collect(), 2, 1, Priority::Normal);
    (machine, prompt)
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
fn a_window_that_is_one_block_off_is_noticed() {
    let run = |wrong: bool| {
        let limits = Limits { layers: 4, blocks: vec![1000; 2], ..plenty(4, 8) };
        let mut machine = Machine::of_groups(limits, 4, &[GroupKind::Full, GroupKind::Window(7)]);
        machine.wrong_windows = wrong;
        machine.ask((30..50).collect(), 12, 1, Priority::Normal);
        machine.settle()
    };
    run(false).unwrap();
    assert!(run(true).is_err());
}

/// What a window group needs does not grow with the sequences, and a sequence that it does not hold is refused or ends.
#[test]
fn windows_need_few_blocks_for_long_sequences() {
    let kinds = [GroupKind::Full, GroupKind::Window(8)];
    let single = kinds[1].most_blocks(usize::MAX, 16, 4);
    let run = |blocks: usize, prompt: usize| {
        let limits = Limits { blocks: vec![200, blocks], ..plenty(2, 16) };
        let mut machine = Machine::of_groups(limits, 4, &kinds);
        let states: Vec<_> = (0..2u32)
            .map(|own| {
                let at = machine.ask((own..prompt as u32).collect(), 30, 1, Priority::Normal);
                Arc::clone(&machine.asked[at].state)
            })
            .collect();
        while machine.turn().unwrap() {}
        assert!(machine.scheduler.is_idle());
        let end = |state: &Arc<RequestState>| loop {
            if let Event::Done(done) = state.next(Some(Duration::ZERO)).expect("an end") {
                return done.error.map(|error| error.status());
            }
        };
        (states.iter().map(end).collect::<Vec<_>>(), machine.scheduler.counters().preemptions)
    };
    // One at a time, and side by side.
    assert_eq!(run(single, 300).0, [None, None]);
    assert_eq!(run(2 * single, 300), (vec![None, None], 0));
    assert_eq!(run(single - 1, 300).0, [Some(Status::OutOfMemory); 2]);
    assert_eq!(run(single - 1, 8).0, [None, None], "short ones need less");
}

#[test]
fn a_token_that_is_not_allowed_is_noticed() {
    let run = |ignores: bool| {
        let mut machine = Machine::new(plenty(4, 8), 4);
        machine.ignores_masks = ignores;
        machine.ask_guided((30..50).collect(), 12, 2, Priority::Normal, Guided::Constrained);
        machine.settle()
    };
    run(false).unwrap();
    assert!(run(true).is_err());
}

/// Whoever has a constraint is planned on a token that is not read yet, as everybody is; only its mask waits for that.
#[test]
fn guided_sequences_are_in_every_step_and_their_masks_wait() {
    let mut machine = Machine::new(plenty(4, 8), 4);
    machine.scheduler.blocks().grow(0, 20);
    for (own, guided) in [Guided::Free, Guided::Constrained, Guided::Budget(2)].into_iter().enumerate() {
        machine.ask_guided(vec![30 + own as u32], 9, 1, Priority::Normal, guided);
    }
    let (mut planned, mut waits) = (vec![Vec::new(); 3], Vec::new());
    for _ in 0..4 {
        let plan = machine.scheduler.plan(Instant::now(), &mut Vec::new());
        waits.push(machine.scheduler.waits_for_masks(&plan));
        for (id, steps) in planned.iter_mut().enumerate() {
            steps.push(plan.runs.iter().any(|run| run.sequence == id as SequenceId));
        }
        let sampled = machine.run(&plan).unwrap();
        for (id, token) in std::mem::replace(&mut machine.in_flight, sampled) {
            machine.commit(id, token, Instant::now());
        }
    }
    assert_eq!(planned, vec![vec![true; 4]; 3]);
    assert_eq!(waits, [false, true, true, true]);
    // A budget waits for the token that spends it: the second of the thinking is the last, and the third must be the marker.
    let mut machine = Machine::new(plenty(4, 8), 4);
    machine.scheduler.blocks().grow(0, 20);
    machine.ask_guided(vec![30], 9, 1, Priority::Normal, Guided::Budget(2));
    let mut waits = Vec::new();
    for _ in 0..5 {
        let plan = machine.scheduler.plan(Instant::now(), &mut Vec::new());
        waits.push(machine.scheduler.waits_for_masks(&plan));
        let sampled = machine.run(&plan).unwrap();
        for (id, token) in std::mem::replace(&mut machine.in_flight, sampled) {
            machine.commit(id, token, Instant::now());
        }
    }
    assert_eq!(waits, [false, false, true, true, false]);
}

#[test]
fn decoding_runs_ahead_of_reading_and_prompts_run_in_chunks() {
    let mut machine = Machine::new(plenty(2, 4), 4);
    machine.scheduler.blocks().grow(0, 20);
    machine.ask((30..40).collect(), 3, 1, Priority::Normal);
    let mut planned = Vec::new();
    for _ in 0..6 {
        let plan = machine.scheduler.plan(Instant::now(), &mut Vec::new());
        let sampled = machine.run(&plan).unwrap();
        let before = std::mem::replace(&mut machine.in_flight, sampled);
        planned
            .extend(plan.runs.iter().map(|run| (run.start, run.tokens(), run.samples, run.input == StepInput::Unread)));
        for (id, _) in before {
            machine.commit(id, 5, Instant::now());
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
    machine.scheduler.blocks().grow(0, 200);
    let first = machine.ask(vec![41, 42], 60, 1, Priority::Normal);
    for _ in 0..3 {
        machine.turn().unwrap();
    }
    assert!(expected(1, &machine.asked[first].prompt, 60, 0).len() > 20, "the first answer is long enough");
    machine.ask((30..70).collect(), 2, 1, Priority::Normal);
    for _ in 0..5 {
        let plan = machine.scheduler.plan(Instant::now(), &mut Vec::new());
        assert_eq!(plan.runs.iter().map(Run::tokens).collect::<Vec<_>>(), [1, 8]);
        let sampled = machine.run(&plan).unwrap();
        for (id, token) in std::mem::replace(&mut machine.in_flight, sampled) {
            machine.commit(id, token, Instant::now());
        }
    }
    machine.settle().unwrap();
}

#[test]
fn a_piece_is_shared_and_answered_when_it_has_passed_the_last_layer() {
    let (mut machine, _) = with_a_piece_on_its_way();
    let twin = machine.ask((30..70).collect(), 2, 1, Priority::Normal);
    let entries = machine.scheduler.blocks().entries();
    let (tokens, layers, samples) = step(&mut machine);
    assert_eq!((&tokens[1..], layers.clone(), &samples[1..]), (&[40][..], 0..2, &[false][..]));
    assert_eq!(machine.scheduler.blocks().entries(), entries, "half a piece is shared");
    // The twin would begin with the same tokens: it waits for them, and then needs its last one only.
    assert_eq!(step(&mut machine), (tokens, 2..4, vec![true, true]));
    assert!(machine.scheduler.blocks().entries() > entries);
    let before = machine.computed;
    step(&mut machine);
    assert_eq!(machine.computed - before, 3, "one token each");
    machine.settle().unwrap();
    assert_eq!((twin, machine.scheduler.counters().prompt_tokens), (2, 2 + 40 + 1));
}

#[test]
fn a_piece_whose_sequence_ends_is_forgotten() {
    let (mut machine, prompt) = with_a_piece_on_its_way();
    step(&mut machine);
    machine.asked[prompt].cancelled = true;
    machine.asked[prompt].state.cancel();
    machine.scheduler.reap_cancelled();
    machine.scheduler.tell_ends();
    assert_eq!(step(&mut machine).0, [1], "the answer is by itself");
    assert_eq!(machine.scheduler.counters().prompt_tokens, 2, "half a piece was counted");
    machine.settle().unwrap();
}

#[test]
fn lost_hidden_states_are_noticed() {
    let run = |forgets: bool| {
        let (mut machine, _) = with_a_piece_on_its_way();
        machine.forgets = forgets;
        machine.settle().map(|()| assert!(machine.stops > 0))
    };
    run(false).unwrap();
    assert!(run(true).is_err());
}

#[test]
fn classes_come_in_their_order_and_nobody_starves() {
    let mut machine = Machine::new(plenty(1, 8), 4);
    machine.scheduler.blocks().grow(0, 50);
    let start = Instant::now();
    let [low, normal, high] =
        [Priority::Low, Priority::Normal, Priority::High].map(|p| machine.ask(vec![9, 9], 1, 1, p));
    let first = |machine: &mut Machine, now: Instant| machine.scheduler.plan(now, &mut Vec::new()).runs[0].sequence;
    assert_eq!(first(&mut machine, start), high as SequenceId);
    machine.commit(high as SequenceId, STOP, start);
    // After a while the lowest class counts as the one above, and it came first.
    assert_eq!(first(&mut machine, start + PATIENCE * 3), low as SequenceId);
    machine.commit(low as SequenceId, STOP, start);
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
    let limits = Limits { blocks: vec![12], ..plenty(4, 16) };
    let mut machine = Machine::new(limits, 4);
    for own in 0..4 {
        machine.ask(vec![30 + own, 31, 32 + own, 33], 40, 1, Priority::Normal);
    }
    machine.settle().unwrap();
    assert!(machine.scheduler.counters().preemptions > 0, "the blocks were enough: this test sees nothing");
}

#[test]
fn what_never_fits_is_refused_with_numbers() {
    let mut machine = Machine::new(Limits { blocks: vec![3], ..plenty(2, 16) }, 4);
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

/// What was brought for a sequence that has not begun is older than what has just ended, and goes all the same last.
#[test]
fn rows_of_an_admitted_sequence_are_not_taken_for_another() {
    fn cache(blocks: &mut BlockManager, tokens: &[u32]) {
        let mut table = blocks.table();
        blocks.extend(&mut table, 0, tokens.len(), &mut Vec::new()).unwrap();
        blocks.index(&mut table, tokens, tokens.len());
        blocks.release(table);
    }
    let left = |asked: bool| {
        let mut machine = Machine::new(plenty(4, 8), 4);
        machine.scheduler.blocks().grow(0, 8);
        let (brought, ended): (Vec<u32>, Vec<u32>) = ((30..46).collect(), (50..66).collect());
        machine.ask(brought.clone(), 2, 1, Priority::Normal);
        let blocks = machine.scheduler.blocks();
        cache(blocks, &brought);
        cache(blocks, &ended);
        blocks.next_step();
        if asked {
            assert_eq!(machine.scheduler.owed_blocks(), [5], "a token more than it has");
        }
        let blocks = machine.scheduler.blocks();
        let mut table = blocks.table();
        blocks.extend(&mut table, 0, 16, &mut Vec::new()).unwrap();
        blocks.peek(&brought)
    };
    assert_eq!(left(true), 16);
    assert!(left(false) < 16, "they would be there without that");
}
