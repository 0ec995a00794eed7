//! Prompts that pass their layers beside the steps.

use super::*;

/// A piece beside the steps: its runs, what comes from the layers that it has passed, and those that are left.
pub(super) struct Beside {
    runs: Vec<Run>,
    hidden: Vec<Vec<Row>>,
    left: Range<usize>,
}

impl Machine {
    pub(super) fn begin_beside(&mut self, plan: &StepPlan, hidden: Vec<Vec<Row>>) {
        let runs = plan.runs[plan.runs.len() - plan.prompt_runs..].to_vec();
        self.beside = Some(Beside { runs, hidden, left: plan.layers.clone() });
    }

    /// Takes what is beside the steps through so many layers.
    pub(super) fn pass_beside(&mut self, layers: usize) {
        let Some(mut beside) = self.beside.take() else { return };
        for layer in beside.left.by_ref().take(layers) {
            for (run, hidden) in beside.runs.iter().zip(&mut beside.hidden) {
                self.pass(layer, run, hidden);
            }
        }
        let done = beside.left.is_empty() || self.scheduler.piece_ends();
        self.beside = Some(beside);
        if done {
            self.stop_beside();
        }
    }

    /// The next step; what is beside it stops where it is in its way.
    pub(super) fn plan(&mut self) -> StepPlan {
        let plan = self.scheduler.plan(Instant::now(), &mut Vec::new());
        if self.beside.is_none() || !plan.runs.is_empty() && plan.copies.is_empty() {
            return plan;
        }
        self.stop_beside();
        if plan.runs.is_empty() { self.scheduler.plan(Instant::now(), &mut Vec::new()) } else { plan }
    }

    pub(super) fn check_beside(&self, plan: &StepPlan) -> Result<(), TestCaseError> {
        let (answers, prompts) = plan.runs.split_at(plan.runs.len() - plan.prompt_runs);
        if plan.beside {
            prop_assert!(self.limits.beside && !answers.is_empty() && plan.copies.is_empty());
            prop_assert!(prompts.iter().all(|run| !run.samples), "a token that no step draws");
            prop_assert!(self.beside.is_none(), "two pieces beside the steps");
        }
        prop_assert!(self.beside.is_none() || prompts.is_empty(), "another piece in a step");
        Ok(())
    }

    pub(super) fn stop_beside(&mut self) {
        let Some(Beside { runs, hidden, left }) = self.beside.take() else { return };
        self.early_stops += usize::from(!left.is_empty());
        self.held = runs.iter().map(|run| run.sequence).zip(hidden).collect();
        self.scheduler.passed(if self.ignores_stops { left.end } else { left.start });
    }
}

/// A machine that begins a prompt of 40 tokens beside the steps of an answer.
fn with_a_piece_beside() -> (Machine, usize) {
    let (mut machine, prompt) = with_a_piece_on_its_way();
    machine.limits.beside = true;
    machine.scheduler.limits.beside = true;
    machine.scheduler.pace = Pace::new(Duration::from_millis(50), 64, 4, true);
    // What was sampled last is read before anything else is planned.
    for (id, token) in std::mem::take(&mut machine.in_flight) {
        machine.commit(id, token, Instant::now());
    }
    (machine, prompt)
}

#[test]
fn prompts_beside_the_steps_leave_these_to_answers() {
    let (mut machine, prompt) = with_a_piece_beside();
    let plan = machine.scheduler.plan(Instant::now(), &mut Vec::new());
    assert!(plan.beside && plan.layers == (0..3), "the last layer is for the step that draws");
    assert_eq!(plan.runs.iter().map(Run::tokens).collect::<Vec<_>>(), [1, 40]);
    for (id, token) in machine.run(&plan).unwrap() {
        machine.commit(id, token, Instant::now());
    }
    for _ in 0..5 {
        let plan = machine.scheduler.plan(Instant::now(), &mut Vec::new());
        assert_eq!((plan.runs.len(), plan.prompt_runs), (1, 0));
        for (id, token) in machine.run(&plan).unwrap() {
            machine.commit(id, token, Instant::now());
        }
    }
    assert_eq!(machine.scheduler.counters().prompt_tokens, 2, "a piece on its way was counted");
    machine.asked[prompt].cancelled = true;
    machine.asked[prompt].state.cancel();
    assert!(machine.scheduler.piece_ends());
    machine.settle().unwrap();
    assert_eq!(machine.early_stops, 1);
}

/// Layers that it stops in front of are passed later.
#[test]
fn pieces_go_on_where_they_have_stopped() {
    let run = |ignores_stops: bool| {
        let (mut machine, _) = with_a_piece_beside();
        machine.ignores_stops = ignores_stops;
        for _ in 0..2 {
            machine.turn()?;
        }
        assert!(machine.beside.is_some());
        machine.stop_beside();
        assert_eq!(machine.early_stops, 1);
        machine.settle()
    };
    run(false).unwrap();
    assert!(run(true).is_err());
}
