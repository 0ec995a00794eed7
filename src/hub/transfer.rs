//! Fetches the files of a download by a few connections.
//!
//! Large files are fetched in pieces of [`Tuning::piece`] bytes, each by a request of its own, so that one file can use
//! all connections; a broken piece goes on where it broke. A server that ignores ranges sends the whole file: then one
//! connection takes it alone, and keeps what is missing. The connection that writes a file's last block checks it.

use std::io::Read;
use std::ops::Range;
use std::sync::{Condvar, Mutex};
use std::time::Instant;

use super::api::{RemoteFile, file_path};
use super::control::{Control, add, take};
use super::download::Tuning;
use super::http::{Answer, Client, Failure, Patience};
use super::partial::{Found, Partial};
use super::url::Url;
use crate::error::{Error, Result};
use crate::panics;
use crate::sync::lock;

/// Bytes read at a time.
const CHUNK: usize = 128 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Missing,
    /// A connection has it.
    Taken,
    Written,
}

/// A file that is not complete.
struct Job {
    file: RemoteFile,
    partial: Partial,
    url: Url,
    state: Mutex<JobState>,
}

struct JobState {
    blocks: Vec<Block>,
    /// Blocks that are not written.
    left: usize,
    checking: bool,
    done: bool,
    /// Connections that may be writing to it: it is checked when there are none.
    writers: usize,
    /// One connection fetches all of it, since the server ignores ranges.
    whole: bool,
    restarts: u32,
}

/// All files of a download that are not complete.
pub struct Transfer<'a> {
    client: &'a Client,
    control: &'a Control,
    tuning: &'a Tuning,
    commit: &'a str,
    jobs: Vec<Job>,
    /// Guards the choice of what to do next.
    turn: Mutex<()>,
    changed: Condvar,
}

/// What a connection does next.
enum Work<'a> {
    Fetch(&'a Job, Range<usize>),
    Check(&'a Job),
    Wait,
    Nothing,
}

impl<'a> Transfer<'a> {
    /// Prepares `files`, of which `found` says what is there.
    pub fn new(
        client: &'a Client,
        control: &'a Control,
        tuning: &'a Tuning,
        (repo, commit): (&str, &'a str),
        files: Vec<(RemoteFile, Partial, Found)>,
    ) -> Self {
        let mut jobs = Vec::new();
        for (file, partial, found) in files {
            let Found::Blocks(found) = found else { continue };
            let blocks: Vec<_> =
                found.into_iter().map(|there| if there { Block::Written } else { Block::Missing }).collect();
            let left = blocks.iter().filter(|block| **block != Block::Written).count();
            let url = client.url(&file_path(repo, commit, &file.path));
            let state = JobState { blocks, left, writers: 0, checking: false, done: false, whole: false, restarts: 0 };
            jobs.push(Job { file, partial, url, state: Mutex::new(state) });
        }
        // Small ones first: what is wrong with a repository shows before gigabytes have come.
        jobs.sort_by_key(|job| job.file.size);
        Self { client, control, tuning, commit, jobs, turn: Mutex::new(()), changed: Condvar::new() }
    }

    /// Bytes that are still to come.
    pub fn missing(&self) -> u64 {
        let missing = |job: &Job| {
            let state = lock(&job.state);
            let blocks = state.blocks.iter().enumerate().filter(|(_, block)| **block != Block::Written);
            blocks
                .map(|(n, _)| job.partial.range(n))
                .fold(0, |sum: u64, range| sum.saturating_add(range.end - range.start))
        };
        self.jobs.iter().map(missing).fold(0, u64::saturating_add)
    }

    /// Fetches everything by `connections` at the same time, and returns when the last of them has ended.
    pub fn run(&self, connections: usize) -> Result<()> {
        std::thread::scope(|scope| {
            for n in 0..connections {
                let thread = std::thread::Builder::new().name(format!("omlx-download-{n}"));
                let started = thread.spawn_scoped(scope, || {
                    if let Err(error) = panics::catch(|| self.work()).and_then(|outcome| outcome) {
                        self.control.stop(error);
                        self.changed.notify_all();
                    }
                });
                if let Err(error) = started {
                    self.control.stop(Error::io("starting a download thread", &error));
                    break;
                }
            }
        });
        self.control.check()
    }

    fn work(&self) -> Result<()> {
        loop {
            self.control.check()?;
            let turn = lock(&self.turn);
            match self.next() {
                Work::Fetch(job, blocks) => {
                    drop(turn);
                    self.fetch(job, blocks)?;
                    lock(&job.state).writers -= 1;
                    self.notify();
                }
                Work::Check(job) => {
                    drop(turn);
                    self.check(job)?;
                    self.notify();
                }
                // Not for ever: a stop does not come through this condition.
                Work::Wait => {
                    let tick = std::time::Duration::from_millis(100);
                    drop(self.changed.wait_timeout(turn, tick).unwrap_or_else(|poisoned| poisoned.into_inner()));
                }
                Work::Nothing => return Ok(()),
            }
        }
    }

    fn notify(&self) {
        let _turn = lock(&self.turn);
        self.changed.notify_all();
    }

    fn next(&self) -> Work<'_> {
        let mut waiting = false;
        for job in &self.jobs {
            let mut state = lock(&job.state);
            if state.done {
                continue;
            }
            if state.left == 0 && state.writers == 0 && !state.checking {
                state.checking = true;
                return Work::Check(job);
            }
            waiting = true;
            if state.whole {
                continue;
            }
            let Some(first) = state.blocks.iter().position(|block| *block == Block::Missing) else { continue };
            let most = (self.tuning.piece / self.tuning.block).max(1) as usize;
            let run = state.blocks[first..].iter().take(most).take_while(|block| **block == Block::Missing).count();
            state.blocks[first..first + run].fill(Block::Taken);
            state.writers += 1;
            return Work::Fetch(job, first..first + run);
        }
        if waiting { Work::Wait } else { Work::Nothing }
    }

    /// Fetches a run of blocks, with as many requests as that takes.
    fn fetch(&self, job: &Job, blocks: Range<usize>) -> Result<()> {
        let end = job.partial.range(blocks.end - 1).end;
        let mut at = job.partial.range(blocks.start).start;
        let mut patience = Patience::new(self.control, self.tuning);
        let mut whole = false;
        loop {
            let left = lock(&job.state).left;
            let before = at;
            let failure = match self.attempt(job, &mut at, end, &mut whole) {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            };
            if at > before || lock(&job.state).left < left {
                patience.progressed();
            }
            patience.after(failure)?;
        }
    }

    /// Goes on at `at`, which moves with what is written. `whole`: this connection has to fetch all of the file.
    fn attempt(&self, job: &Job, at: &mut u64, end: u64, whole: &mut bool) -> Result<(), Failure> {
        let size = job.file.size;
        if lock(&job.state).whole && !*whole {
            return Ok(());
        }
        let range = (!*whole && (*at > 0 || end < size)).then_some(*at..end);
        let mut wanted = range.clone().unwrap_or(0..size);
        let (client, url, asked) = (self.client.clone(), job.url.clone(), range.clone());
        let answer = self.control.apart(move || client.get(&url, asked))??;
        self.check_headers(job, &answer)?;
        match &answer.range {
            Some((got, total)) if *got != wanted || total.is_some_and(|total| total != size) => {
                let what = format!("{}: bytes {got:?} of {total:?} came, {wanted:?} of {size} were asked for", job.url);
                return Err(Failure::last(Error::checksum(what)));
            }
            None if range.is_some() => {
                if std::mem::replace(&mut lock(&job.state).whole, true) {
                    // Another connection fetches all of it.
                    return Ok(());
                }
                tracing::info!(url = %job.url, "the server ignores ranges");
                (*whole, wanted) = (true, 0..size);
            }
            _ => {}
        }
        if let Some(length) = answer.length.filter(|length| *length != wanted.end - wanted.start) {
            let what = format!("{}: {length} bytes come instead of {wanted:?}", answer.url);
            return Err(Failure::last(Error::checksum(what).context(&job.file.path)));
        }
        if *whole { self.receive_whole(job, answer) } else { self.receive(job, answer, at, end) }
    }

    /// What the hub says of the file must be what it listed.
    fn check_headers(&self, job: &Job, answer: &Answer) -> Result<(), Failure> {
        let file = &job.file;
        if let Some(commit) = answer.hub.commit.as_ref().filter(|commit| !commit.eq_ignore_ascii_case(self.commit)) {
            let what = format!("{}: the hub answers with another commit, {commit}", job.url);
            return Err(Failure::last(Error::checksum(what)));
        }
        if answer.hub.size.is_some_and(|size| size != file.size) {
            let what =
                format!("{}: {:?} bytes instead of the {} that were listed", job.url, answer.hub.size, file.size);
            return Err(Failure::last(Error::checksum(what)));
        }
        if answer.hub.etag.as_ref().is_some_and(|etag| file.checksum.contradicts(etag)) {
            let what = format!("{}: the hub announces other content than it listed", job.url);
            return Err(Failure::last(Error::checksum(what)));
        }
        Ok(())
    }

    /// Writes what arrives from `at` on, up to `end`.
    fn receive(&self, job: &Job, answer: Answer, at: &mut u64, end: u64) -> Result<(), Failure> {
        let mut source = Source::new(answer, self.tuning);
        let mut chunk = vec![0; CHUNK];
        while *at < end {
            self.control.check()?;
            if lock(&job.state).whole {
                return Ok(());
            }
            // Never across the end of a block: it is noted as soon as it is complete.
            let block = (*at / self.tuning.block) as usize;
            let block_end = job.partial.range(block).end.min(end);
            let most = chunk.len().min((block_end - *at) as usize);
            let read = source.read(&mut chunk[..most])?;
            job.partial.write(*at, &chunk[..read])?;
            *at += read as u64;
            self.control.received(read as u64);
            if *at == block_end {
                self.wrote(job, block)?;
            }
        }
        source.end()
    }

    /// Reads a whole file and writes the blocks that are missing.
    fn receive_whole(&self, job: &Job, answer: Answer) -> Result<(), Failure> {
        let mut source = Source::new(answer, self.tuning);
        let mut buffer = vec![0; self.tuning.block as usize];
        for block in 0..job.partial.blocks() {
            let range = job.partial.range(block);
            let content = &mut buffer[..(range.end - range.start) as usize];
            let mut filled = 0;
            while filled < content.len() {
                self.control.check()?;
                filled += source.read(&mut content[filled..])?;
            }
            let missing = lock(&job.state).blocks[block] != Block::Written;
            if missing {
                job.partial.write(range.start, content)?;
                self.control.received(content.len() as u64);
                self.wrote(job, block)?;
            }
        }
        source.end()
    }

    fn wrote(&self, job: &Job, block: usize) -> Result<()> {
        job.partial.wrote(block)?;
        let mut state = lock(&job.state);
        if std::mem::replace(&mut state.blocks[block], Block::Written) != Block::Written {
            state.left -= 1;
        }
        Ok(())
    }

    /// Checks a file that has all its blocks. One that is wrong is fetched anew once: an earlier attempt may have lost
    /// power.
    fn check(&self, job: &Job) -> Result<()> {
        if job.partial.fits(&job.file.checksum, || self.control.check())? {
            job.partial.finish()?;
            lock(&job.state).done = true;
            add(&self.control.files_done, 1);
            return Ok(());
        }
        let mut state = lock(&job.state);
        job.partial.restart()?;
        if state.restarts > 0 {
            let what = format!("{}: the content is not what was announced ({})", job.url, job.file.checksum);
            return Err(Error::checksum(what));
        }
        tracing::warn!(url = %job.url, "wrong checksum: the file is fetched anew");
        take(&self.control.bytes_done, job.file.size);
        add(&self.control.retries, 1);
        state.restarts += 1;
        state.whole = false;
        state.blocks.fill(Block::Missing);
        state.left = state.blocks.len();
        state.checking = false;
        Ok(())
    }
}

/// The content of an answer, with a limit for how slow it may come.
struct Source<'a> {
    url: Url,
    reader: Box<dyn Read>,
    tuning: &'a Tuning,
    since: Instant,
    bytes: u64,
}

impl<'a> Source<'a> {
    fn new(answer: Answer, tuning: &'a Tuning) -> Self {
        let url = answer.url.clone();
        Self { url, reader: Box::new(answer.into_reader()), tuning, since: Instant::now(), bytes: 0 }
    }

    /// Some bytes; the end is a failure. So is a connection that has become so slow that a new one is worth its price.
    fn read(&mut self, chunk: &mut [u8]) -> Result<usize, Failure> {
        let url = &self.url;
        let failure = |what: &dyn std::fmt::Display| Failure::passing(Error::network(format!("{url}: {what}")));
        let read = self.reader.read(chunk).map_err(|e| failure(&e))?;
        if read == 0 {
            return Err(failure(&"the connection ended early"));
        }
        self.bytes += read as u64;
        if self.since.elapsed() >= self.tuning.stall {
            if self.bytes < self.tuning.least {
                return Err(failure(&format!("only {} bytes came in {:?}", self.bytes, self.tuning.stall)));
            }
            (self.since, self.bytes) = (Instant::now(), 0);
        }
        Ok(read)
    }

    /// Refuses more than was announced. A connection can serve another request only if it was read to its end.
    fn end(mut self) -> Result<(), Failure> {
        match self.reader.read(&mut [0]) {
            Ok(1..) => Err(Failure::last(Error::checksum(format!("{}: more comes than was announced", self.url)))),
            // Everything is there: how the connection ends does not matter.
            _ => Ok(()),
        }
    }
}
