//! What a cancel does to the steps behind it.

use super::*;

#[test]
fn a_cancelled_request_is_in_no_later_step() {
    // After each number of turns: it waits, its prompt is computed, it decodes with a token on its way.
    let mut would_go_on = 0;
    for turns in 0..12 {
        let next = |cancels: bool| {
            let mut machine = Machine::new(plenty(4, 4), 4);
            machine.scheduler.blocks().grow(0, 60);
            machine.ask(vec![41, 42], 60, 1, Priority::Normal);
            let at = machine.ask((30..40).collect(), 40, 2, Priority::Normal);
            (0..turns).for_each(|_| assert!(machine.turn().unwrap()));
            let state = Arc::clone(&machine.asked[at].state);
            while state.next(Some(Duration::ZERO)).is_ok() {}
            if cancels {
                state.cancel();
            }
            machine.scheduler.reap_cancelled();
            let plan = machine.scheduler.plan(Instant::now(), &mut Vec::new());
            let sampled = machine.run(&plan).unwrap();
            for (id, token) in std::mem::replace(&mut machine.in_flight, sampled) {
                machine.commit(id, token, Instant::now());
            }
            machine.scheduler.tell_ends();
            let event = state.next(Some(Duration::ZERO));
            while machine.turn().unwrap() {}
            assert_eq!(machine.scheduler.blocks().counts(0).used, 0, "a leak at idle");
            (plan.runs.iter().filter(|run| run.sequence > 0).count(), event)
        };
        would_go_on += next(false).0;
        let (runs, event) = next(true);
        let Ok(Event::Done(done)) = event else { panic!("after {turns} turns: {event:?} instead of the end") };
        assert_eq!((runs, done.reason), (0, FinishReason::Cancelled), "after {turns} turns");
    }
    assert!(would_go_on > 12, "most of them would have gone on: {would_go_on}");
}

#[test]
fn a_piece_passes_the_rest_at_once_when_nobody_waits() {
    let (mut machine, _) = with_a_piece_on_its_way();
    step(&mut machine);
    machine.asked[0].cancelled = true;
    machine.asked[0].state.cancel();
    machine.scheduler.reap_cancelled();
    machine.scheduler.tell_ends();
    assert_eq!(step(&mut machine), (vec![40], 2..4, vec![true]));
    machine.settle().unwrap();
}
