//! Which tokens the next step computes. Pure: no MLX, no threads, no clock of its own.
//!
//! A sequence has known tokens and a count of computed ones that chases them; prompt chunks and single decode
//! tokens are the same thing. A step may be planned on the token that the step before is still computing; that token
//! is then read, and if it ends the sequence the extra step's token is dropped.

use std::collections::VecDeque;
use std::time::Instant;

use super::events::FinishReason;
use super::sequence::{SampledToken, Sequence, SequenceId, cancelled};
use crate::error::Error;

/// Tokens of one sequence to run through the model.
#[derive(Debug, PartialEq)]
pub struct StepPlan {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// Which tokens.
    pub input: StepInput,
    /// Position of the first of them in the sequence.
    pub start: usize,
    /// Whether the step samples a token after the last of them.
    pub samples: bool,
}

/// Input tokens of a step.
#[derive(Debug, PartialEq)]
pub enum StepInput {
    /// Token ids known on the host.
    Known(Vec<u32>),
    /// The one token that this sequence's last step sampled and that nobody has read yet.
    Unread,
}

/// First come, first served, one sequence at a time.
#[derive(Debug)]
pub struct Scheduler {
    waiting: VecDeque<Sequence>,
    running: Option<Sequence>,
    prefill_chunk: usize,
}

impl Scheduler {
    /// `prefill_chunk` is the most prompt tokens in one step, so that a cancel is heard within one chunk.
    pub fn new(prefill_chunk: usize) -> Self {
        Self { waiting: VecDeque::new(), running: None, prefill_chunk: prefill_chunk.max(1) }
    }

    /// Queues a sequence.
    pub fn admit(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Moves the next waiting sequence to where it can run, if there is room; the runner makes its state.
    pub fn start(&mut self) -> Option<&Sequence> {
        if self.running.is_some() {
            return None;
        }
        self.running = self.waiting.pop_front();
        self.running.as_ref()
    }

    /// Ends cancelled sequences; returns the started one, whose state the runner holds.
    pub fn reap_cancelled(&mut self) -> Option<SequenceId> {
        let (gone, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(Sequence::is_cancelled);
        self.waiting = waiting;
        let gone: VecDeque<Sequence> = gone;
        let running = self.running.take_if(|sequence| sequence.is_cancelled());
        let freed = running.as_ref().map(|sequence| sequence.id);
        for sequence in gone.into_iter().chain(running) {
            sequence.finish(Err(cancelled()));
        }
        freed
    }

    /// The next step, or `None` if there is nothing to compute now.
    pub fn plan(&mut self) -> Option<StepPlan> {
        // A reader that is far behind makes its own sequence wait, but not the ones behind it.
        let must_go_on = !self.waiting.is_empty();
        let sequence = self.running.as_mut().filter(|sequence| must_go_on || !sequence.is_paused())?;
        let known = sequence.tokens.len();
        let start = sequence.computed;
        if start < known {
            let end = known.min(start + self.prefill_chunk);
            let samples = end == known;
            sequence.computed = end;
            sequence.unread += usize::from(samples);
            let input = StepInput::Known(sequence.tokens[start..end].to_vec());
            return Some(StepPlan { sequence: sequence.id, input, start, samples });
        }
        // All known tokens are computed: continue from the newest sampled one, if the answer may go on after it.
        let generated = sequence.completion_len() + sequence.unread;
        if sequence.unread == 0 || start >= known + sequence.unread || generated >= sequence.max_tokens {
            return None;
        }
        sequence.computed += 1;
        sequence.unread += 1;
        Some(StepPlan { sequence: sequence.id, input: StepInput::Unread, start, samples: true })
    }

    /// Takes a token read from the device; returns the sequence if it ended and its state can go.
    ///
    /// The token of a sequence that has ended meanwhile is dropped.
    pub fn commit(&mut self, id: SequenceId, sampled: SampledToken, now: Instant) -> Option<SequenceId> {
        let sequence = self.running.as_mut().filter(|sequence| sequence.id == id)?;
        let end = match sequence.accept(sampled, now) {
            Ok(None) => return None,
            Ok(Some(reason)) => Ok(reason),
            Err(error) => Err(error),
        };
        self.end(id, end)
    }

    /// Ends sequence `id` because a step failed.
    pub fn fail(&mut self, id: SequenceId, error: Error) -> Option<SequenceId> {
        self.end(id, Err(error))
    }

    fn end(&mut self, id: SequenceId, end: Result<FinishReason, Error>) -> Option<SequenceId> {
        let sequence = self.running.take_if(|sequence| sequence.id == id)?;
        sequence.finish(end);
        Some(id)
    }

    /// Ends everything with `error`.
    pub fn fail_all(&mut self, error: &Error) {
        for sequence in self.running.take().into_iter().chain(std::mem::take(&mut self.waiting)) {
            sequence.finish(Err(error.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use super::*;
    use crate::engine::events::{Event, RequestState};
    use crate::engine::sequence::Prepared;
    use crate::error::Status;
    use crate::sampling::SamplingParams;
    use crate::text::StopMatcher;

    fn sequence(id: SequenceId, prompt: usize, max_tokens: usize, stop: &[u32]) -> (Arc<RequestState>, Sequence) {
        let (state, sink) = RequestState::new(Default::default());
        let prepared = Prepared {
            prompt: (0..prompt as u32).collect(),
            max_tokens,
            sampling: SamplingParams::default(),
            stop_tokens: stop.iter().copied().collect::<HashSet<_>>(),
            stop: StopMatcher::new::<&str>(&[]).unwrap(),
            sink,
        };
        (state, Sequence::new(id, prepared, None))
    }

    fn token(token: u32) -> SampledToken {
        SampledToken { token, logprob: None }
    }

    fn plan(sequence: SequenceId, input: StepInput, start: usize, samples: bool) -> Option<StepPlan> {
        Some(StepPlan { sequence, input, start, samples })
    }

    /// What the worker does before each step.
    fn step(scheduler: &mut Scheduler) -> Option<StepPlan> {
        scheduler.start();
        scheduler.plan()
    }

    /// Plays the engine loop with a runner whose n-th token is `100 + n`; returns tokens and the end.
    fn play(scheduler: &mut Scheduler, state: &RequestState) -> (Vec<u32>, FinishReason) {
        let mut in_flight: Option<SequenceId> = None;
        let (mut next, mut steps) = (100, 0);
        loop {
            steps += 1;
            assert!(steps < 1000, "the scheduler does not end");
            let planned = step(scheduler);
            if let Some(id) = in_flight.take() {
                scheduler.commit(id, token(next), Instant::now());
                next += 1;
            }
            in_flight = planned.as_ref().filter(|plan| plan.samples).map(|plan| plan.sequence);
            if planned.is_none() && in_flight.is_none() {
                break;
            }
        }
        let mut tokens = Vec::new();
        while let Ok(event) = state.next(Some(std::time::Duration::ZERO)) {
            match event {
                Event::Delta(delta) => tokens.extend(delta.tokens),
                Event::Done(done) => return (tokens, done.reason),
            }
        }
        panic!("no done event")
    }

    #[test]
    fn a_prompt_runs_in_chunks_and_decoding_runs_ahead_of_reading() {
        let mut scheduler = Scheduler::new(4);
        let (_state, one) = sequence(1, 10, 3, &[]);
        scheduler.admit(one);
        assert_eq!(step(&mut scheduler), plan(1, StepInput::Known(vec![0, 1, 2, 3]), 0, false));
        assert_eq!(step(&mut scheduler), plan(1, StepInput::Known(vec![4, 5, 6, 7]), 4, false));
        assert_eq!(step(&mut scheduler), plan(1, StepInput::Known(vec![8, 9]), 8, true));
        // The token at 10 is not read yet, and its successor is planned already.
        assert_eq!(step(&mut scheduler), plan(1, StepInput::Unread, 10, true));
        assert_eq!(scheduler.commit(1, token(7), Instant::now()), None);
        assert_eq!(step(&mut scheduler), plan(1, StepInput::Unread, 11, true));
        assert_eq!(scheduler.commit(1, token(8), Instant::now()), None);
        assert_eq!(step(&mut scheduler), None, "three tokens are asked for, three are on their way");
        assert_eq!(scheduler.commit(1, token(9), Instant::now()), Some(1));
    }

    #[test]
    fn every_length_ends_exactly() {
        for chunk in [1, 3, 8, 100] {
            for prompt in [1, 2, 8, 9] {
                for max_tokens in [1, 2, 5] {
                    let mut scheduler = Scheduler::new(chunk);
                    let (state, one) = sequence(1, prompt, max_tokens, &[]);
                    scheduler.admit(one);
                    let (tokens, reason) = play(&mut scheduler, &state);
                    let expected: Vec<u32> = (100..100 + max_tokens as u32).collect();
                    assert_eq!((tokens, reason), (expected, FinishReason::Length), "{chunk} {prompt} {max_tokens}");
                }
            }
        }
    }

    #[test]
    fn a_stop_is_noticed_one_step_late_and_the_extra_token_is_dropped() {
        let mut scheduler = Scheduler::new(64);
        let (state, one) = sequence(1, 3, 50, &[102]);
        let (after, two) = sequence(2, 3, 1, &[]);
        scheduler.admit(one);
        scheduler.admit(two);
        assert!(step(&mut scheduler).is_some_and(|plan| plan.samples));
        for read in [100, 101, 102] {
            assert!(step(&mut scheduler).is_some_and(|plan| plan.sequence == 1));
            scheduler.commit(1, token(read), Instant::now());
        }
        // The step planned before the stop was read comes back; the next sequence has begun.
        assert!(step(&mut scheduler).is_some_and(|plan| plan.sequence == 2 && plan.start == 0));
        assert_eq!(scheduler.commit(1, token(103), Instant::now()), None);
        scheduler.commit(2, token(9), Instant::now());
        for (state, tokens, reason) in
            [(state, vec![100, 101], FinishReason::Stop), (after, vec![9], FinishReason::Length)]
        {
            let Ok(Event::Delta(delta)) = state.next(None) else { panic!("no tokens") };
            let Ok(Event::Done(done)) = state.next(None) else { panic!("no end") };
            assert_eq!((delta.tokens, done.reason), (tokens, reason));
        }
    }

    #[test]
    fn cancelled_sequences_go_whether_waiting_or_running() {
        let mut scheduler = Scheduler::new(64);
        let (running, one) = sequence(1, 3, 50, &[]);
        let (waiting, two) = sequence(2, 3, 50, &[]);
        scheduler.admit(one);
        scheduler.admit(two);
        assert!(step(&mut scheduler).is_some());
        waiting.cancel();
        assert_eq!(scheduler.reap_cancelled(), None, "a waiting sequence has no state on the device");
        running.cancel();
        assert_eq!(scheduler.reap_cancelled(), Some(1));
        assert_eq!(step(&mut scheduler), None);
        for state in [running, waiting] {
            assert!(matches!(state.next(None), Ok(Event::Done(done)) if done.reason == FinishReason::Cancelled));
            assert_eq!(state.next(None), Err(Status::Closed));
        }
    }
}
