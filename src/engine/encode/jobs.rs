//! The texts that wait at an encoder, and in what order they are computed. Pure.

use std::cmp::Reverse;

use super::output::Output;
use crate::engine::events::EventSink;
use crate::engine::queue::QueueTicket;
use crate::engine::request::Priority;
use crate::engine::sequence::cancelled;
use crate::error::Error;
use crate::text::TextTokens;

/// A request whose texts are tokens.
#[derive(Debug)]
pub struct Job {
    /// At least one.
    pub texts: Vec<TextTokens>,
    /// What becomes of the rows.
    pub output: Output,
    /// Before whom it runs.
    pub priority: Priority,
    /// Its place in the queue, until it runs.
    pub ticket: Option<QueueTicket>,
    /// Where its result goes.
    pub sink: EventSink,
}

/// A job that is being computed.
#[derive(Debug)]
struct Running {
    job: Job,
    /// Which of its texts have not been given to a batch, the next one last: longest first.
    left: Vec<usize>,
    /// What the model gave for each text.
    rows: Vec<Vec<f32>>,
    missing: usize,
    number: u64,
}

/// A text of a job in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Names the job; never reused.
    pub job: u64,
    /// Which of its texts.
    pub text: usize,
}

/// A job with all its rows.
#[derive(Debug)]
pub struct Computed {
    /// The job, texts included.
    pub job: Job,
    /// One for each text.
    pub rows: Vec<Vec<f32>>,
}

/// All jobs of an encoder. Jobs of one priority class give their texts in turns, so that one text does not wait for the
/// thousands of somebody else.
#[derive(Debug, Default)]
pub struct Jobs {
    /// Ordered by priority; within a class whoever is next to give a text comes first.
    running: Vec<Running>,
    next: u64,
}

impl Jobs {
    /// Adds a job.
    pub fn add(&mut self, job: Job) {
        let mut left: Vec<usize> = (0..job.texts.len()).collect();
        left.sort_by_key(|&text| (job.texts[text].ids.len(), Reverse(text)));
        let (missing, rows) = (left.len(), vec![Vec::new(); left.len()]);
        let running = Running { job, left, rows, missing, number: self.next };
        self.next += 1;
        self.put(running);
    }

    /// Behind the others of its class.
    fn put(&mut self, running: Running) {
        let place = self.running.partition_point(|other| other.job.priority <= running.job.priority);
        self.running.insert(place, running);
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Jobs that have not ended.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// Ends the jobs that their hosts have cancelled.
    pub fn reap_cancelled(&mut self) {
        for gone in self.running.extract_if(.., |running| running.job.sink.state().is_cancelled()) {
            gone.job.sink.fail(cancelled());
        }
    }

    /// The texts to be computed next: as many as have `tokens` tokens together, but at least one.
    pub fn next_batch(&mut self, tokens: usize) -> Vec<Place> {
        let (mut batch, mut taken) = (Vec::new(), 0);
        // In turns, until nothing fits any more.
        let mut at = 0;
        while let Some(running) = self.running.get_mut(at) {
            let next = running.left.last().map(|&text| (text, running.job.texts[text].ids.len()));
            match next {
                Some((text, length)) if batch.is_empty() || taken + length <= tokens => {
                    running.left.pop();
                    running.job.ticket = None;
                    taken += length;
                    batch.push(Place { job: running.number, text });
                    let running = self.running.remove(at);
                    self.put(running);
                    at = 0;
                }
                Some(_) | None => at += 1,
            }
        }
        batch
    }

    /// The tokens of a text.
    pub fn text(&self, place: Place) -> Option<&TextTokens> {
        self.running.iter().find(|running| running.number == place.job)?.job.texts.get(place.text)
    }

    /// Takes what was computed of a batch; returns the jobs that are complete.
    pub fn commit(&mut self, batch: &[Place], rows: Vec<Vec<f32>>) -> Vec<Computed> {
        for (place, row) in batch.iter().zip(rows) {
            if let Some(running) = self.running.iter_mut().find(|running| running.number == place.job) {
                running.rows[place.text] = row;
                running.missing -= 1;
            }
        }
        let complete = self.running.extract_if(.., |running| running.missing == 0);
        complete.map(|running| Computed { job: running.job, rows: running.rows }).collect()
    }

    /// Ends the jobs that had texts in a batch which could not be computed.
    pub fn fail(&mut self, batch: &[Place], error: &Error) {
        let hit = |running: &mut Running| batch.iter().any(|place| place.job == running.number);
        for running in self.running.extract_if(.., hit) {
            running.job.sink.fail(error.clone());
        }
    }

    /// Ends all jobs.
    pub fn fail_all(&mut self, error: &Error) {
        for running in self.running.drain(..) {
            running.job.sink.fail(error.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, OnceLock};

    use super::*;
    use crate::engine::activity::Activity;
    use crate::engine::events::{Event, RequestState};
    use crate::error::Status;

    fn job(lengths: &[usize], priority: Priority) -> (Job, Arc<RequestState>) {
        let (state, sink) = RequestState::new("m".into(), Arc::new(OnceLock::new()), Activity::new().enter());
        let text = |&n: &usize| TextTokens { ids: vec![1; n], types: vec![0; n], truncated: false };
        let texts = lengths.iter().map(text).collect();
        (Job { texts, output: Output::Scores { top: None }, priority, ticket: None, sink }, state)
    }

    fn places(batch: &[Place]) -> Vec<(u64, usize)> {
        batch.iter().map(|place| (place.job, place.text)).collect()
    }

    #[test]
    fn jobs_give_their_texts_in_turns() {
        let mut jobs = Jobs::default();
        let mut states = Vec::new();
        for (lengths, priority) in [
            (&[10, 30, 20, 40][..], Priority::Normal),
            (&[10], Priority::Normal),
            (&[10, 10], Priority::Low),
            (&[5], Priority::High),
        ] {
            let (job, state) = job(lengths, priority);
            jobs.add(job);
            states.push(state);
        }
        // The class before the others first; the two normal ones in turns, the longest text first; low last.
        assert_eq!(places(&jobs.next_batch(55)), [(3, 0), (0, 3), (1, 0)]);
        assert_eq!(places(&jobs.next_batch(50)), [(0, 1), (0, 2)]);
        // A text that is longer than the batch is computed all the same.
        assert_eq!(places(&jobs.next_batch(3)), [(0, 0)]);
        assert_eq!(places(&jobs.next_batch(100)), [(2, 0), (2, 1)]);
        assert_eq!(places(&jobs.next_batch(100)), []);
        let all = [(3, 0), (0, 3), (1, 0), (0, 1), (0, 2), (0, 0)].map(|(job, text)| Place { job, text });
        let rows = |batch: &[Place]| batch.iter().map(|place| vec![place.text as f32]).collect();
        let computed = jobs.commit(&all[..5], rows(&all[..5]));
        assert_eq!(computed.len(), 2);
        let computed = jobs.commit(&all[5..], rows(&all[5..]));
        assert_eq!(computed.iter().map(|c| c.rows.concat()).collect::<Vec<_>>(), [[0.0, 1.0, 2.0, 3.0]]);
        assert_eq!(jobs.len(), 1);
    }

    #[test]
    fn jobs_end_once_when_they_are_cancelled_or_fail() {
        let mut jobs = Jobs::default();
        let (first, cancelled) = job(&[1, 2], Priority::Normal);
        let (second, failed) = job(&[3], Priority::Normal);
        let (third, ended) = job(&[4], Priority::Normal);
        for job in [first, second, third] {
            jobs.add(job);
        }
        let batch = jobs.next_batch(5);
        assert_eq!(places(&batch), [(0, 1), (1, 0)]);
        cancelled.cancel();
        jobs.reap_cancelled();
        // Its rows may come all the same.
        assert!(jobs.commit(&batch[..1], vec![vec![0.0]]).is_empty());
        jobs.fail(&batch, &Error::internal("x"));
        jobs.fail_all(&Error::invalid_request("y"));
        assert!(jobs.is_empty());
        for (state, status) in
            [(cancelled, Status::Cancelled), (failed, Status::Internal), (ended, Status::InvalidRequest)]
        {
            let Ok(Event::Done(done)) = state.next(Some(std::time::Duration::ZERO)) else { panic!("no end") };
            assert_eq!(done.error.unwrap().status(), status);
        }
    }
}
