//! One download from its request to the model's folder.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::api::{self, Listing, RemoteFile};
use super::checksum::Checksum;
use super::control::{Control, OnProgress, Progress, State, add};
use super::http::Client;
use super::partial::{Found, Partial};
use super::request::DownloadRequest;
use super::settings::Settings;
use super::staging::{Marker, Staging, is_there};
use super::transfer::Transfer;
use crate::error::{Error, Result, Status};
use crate::panics;
use crate::sync::lock;

/// Connections at the same time by default.
const CONNECTIONS: usize = 4;

/// Room that a download leaves on the disk.
const LEAST_FREE: u64 = 64 << 20;

/// Limits and sizes that hosts need not care about, and tests do.
#[derive(Debug, Clone)]
pub struct Tuning {
    /// Longest wait for a name server, and for a connection with its TLS handshake.
    pub connect: Duration,
    /// Longest silence of a connection, and the time in which `least` bytes must come.
    pub stall: Duration,
    /// Fewer bytes in `stall` and the connection is replaced.
    pub least: u64,
    /// Wait after the first failure; twice as long after each further one, up to a minute.
    pub backoff: Duration,
    /// Failures without progress between them after which a download gives up.
    pub attempts: u32,
    /// Bytes that are noted as one: what an interruption costs each connection at most.
    pub block: u64,
    /// Bytes of one request at most.
    pub piece: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            stall: Duration::from_secs(30),
            least: 16 << 10,
            backoff: Duration::from_millis(500),
            attempts: 6,
            block: 1 << 20,
            piece: 64 << 20,
        }
    }
}

/// A model that has been downloaded, or was there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// Name in requests: the repository's.
    pub id: String,
    /// Its folder.
    pub folder: PathBuf,
    /// The commit that is there; `None` for a folder that something else put there.
    pub commit: Option<String>,
    /// Whether anything in the folder is new.
    pub changed: bool,
}

struct Shared {
    control: Control,
    end: Mutex<End>,
    ended: Condvar,
}

#[derive(Default)]
struct End {
    outcome: Option<Result<Arrival>>,
    /// Whoever watches has been told of it.
    told: bool,
}

/// A download, which goes on whether or not anybody holds this.
#[derive(Clone)]
pub struct Download {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Download {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Download").field(&self.progress()).finish()
    }
}

impl Download {
    /// Starts a download into `models`, on threads of its own, and returns at once. `arrived` is called when the model
    /// is in its place, before the download is over.
    pub fn start(
        request: DownloadRequest,
        models: &Path,
        tuning: Tuning,
        arrived: impl FnOnce(&Arrival) + Send + 'static,
    ) -> Result<Self> {
        let settings = Settings::resolve(&request, &|name| std::env::var(name).ok())?;
        let shared = Arc::new(Shared { control: Control::new(), end: Mutex::default(), ended: Condvar::new() });
        let (own, models) = (Arc::clone(&shared), models.to_owned());
        let thread = std::thread::Builder::new().name("omlx-download".into()).spawn(move || {
            let outcome = panics::catch(|| {
                let arrival =
                    Run { request: &request, settings: &settings, tuning: &tuning, shared: &own }.run(&models)?;
                arrived(&arrival);
                Ok(arrival)
            });
            own.end(outcome.and_then(|outcome| outcome));
        });
        thread.map_err(|e| Error::io("starting a download", &e))?;
        Ok(Self { shared })
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.shared.control.progress()
    }

    /// Has `function` called with the progress: at once, with every new state, and ten times a second at most while
    /// bytes come; the last call is that with the last state, before a waiting [`wait`](Self::wait) returns. The first call is
    /// made on this thread, the others on the download's, one at a time: a slow function holds the download up, and one that
    /// waits for its end waits for ever. `None` removes it.
    pub fn watch(&self, function: Option<OnProgress>) {
        self.shared.control.watch(function);
    }

    /// What came of it; `None` while it runs.
    pub fn outcome(&self) -> Option<Result<Arrival>> {
        lock(&self.shared.end).outcome.clone()
    }

    /// Waits until it is over, `timeout` at most, or for ever. `Timeout` if it is not.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Arrival> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut end = lock(&self.shared.end);
        loop {
            let left = deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now()));
            if let Some(outcome) = end.outcome.as_ref().filter(|_| end.told || left.is_zero()) {
                return outcome.clone();
            }
            if left.is_zero() {
                return Err(Error::new(Status::Timeout, "the download is still running"));
            }
            let waited = self.shared.ended.wait_timeout(end, left.min(Duration::from_secs(3600)));
            end = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }

    /// Asks it to end; it is over within a second, whatever its connections are waiting for, unless the disk takes
    /// longer to write a file through. What has been fetched stays for the next attempt.
    pub fn cancel(&self) {
        self.shared.control.cancel();
    }
}

impl Shared {
    fn end(&self, outcome: Result<Arrival>) {
        let state = match &outcome {
            Ok(_) => State::Done,
            Err(error) if error.status() == Status::Cancelled => State::Cancelled,
            Err(_) => State::Failed,
        };
        let mut end = lock(&self.end);
        end.outcome = Some(outcome);
        self.control.enter(state);
        drop(end);
        // Who is told of the end can ask for the outcome; who waits for it goes on when that was told.
        self.control.tell();
        lock(&self.end).told = true;
        self.ended.notify_all();
        // Idle connections go, too.
        self.control.cancel();
    }
}

/// What the steps of a download need.
struct Run<'a> {
    request: &'a DownloadRequest,
    settings: &'a Settings,
    tuning: &'a Tuning,
    shared: &'a Shared,
}

impl Run<'_> {
    fn run(&self, models: &Path) -> Result<Arrival> {
        let staging = Staging::open(models, self.request)?;
        let installed = Marker::read(staging.target(), &self.request.repo);
        if let Some(arrival) = self.already_there(&staging, installed.as_ref())? {
            return Ok(arrival);
        }
        if self.settings.offline {
            let what = format!("{} is not there, and offline mode forbids to fetch it", self.request.repo);
            return Err(Error::new(Status::Offline, what));
        }
        let control = &self.shared.control;
        let client = Client::new(self.settings, self.tuning, control, &self.request.repo)?;
        let revision = match (&installed, &self.request.revision) {
            (_, Some(revision)) => revision,
            (Some(installed), None) => &installed.commit,
            (None, None) => "main",
        };
        let listing = api::list(&client, control, self.tuning, &self.request.repo, revision)?;
        self.fetch(staging, installed, listing, &client)
    }

    /// What can be told without the network: a model that is there is left alone unless another revision is asked for.
    fn already_there(&self, staging: &Staging, installed: Option<&Marker>) -> Result<Option<Arrival>> {
        let DownloadRequest { repo, revision, files, .. } = self.request;
        let target = staging.target();
        let arrival = |commit| Some(Arrival { id: repo.clone(), folder: target.to_owned(), commit, changed: false });
        match installed {
            Some(installed) => {
                let same = revision.as_ref().is_none_or(|revision| *revision == installed.commit);
                let there = same && installed.satisfies(self.request, target);
                Ok(there.then(|| arrival(Some(installed.commit.clone()))).flatten())
            }
            None if !target.exists() => Ok(None),
            None => {
                let missing = files.iter().flatten().any(|file| !target.join(file).is_file());
                if revision.is_none() && !missing {
                    return Ok(arrival(None));
                }
                let what = "is there already, but no download put it there: move it away to download it";
                Err(Error::invalid_request(format!("{} {what}", target.display())))
            }
        }
    }

    fn fetch(&self, staging: Staging, installed: Option<Marker>, listing: Listing, client: &Client) -> Result<Arrival> {
        let (request, control) = (self.request, &self.shared.control);
        let same_commit = installed.as_ref().filter(|installed| installed.commit == listing.commit);
        // Of the same commit, what is there stays.
        let more = same_commit.map_or(&[][..], |installed| &installed.content);
        let paths = listing.select(request, more)?;
        let wanted = listing.describe(&paths, client, control, self.tuning, &request.repo)?;
        let arrival = Arrival {
            id: request.repo.clone(),
            folder: staging.target().to_owned(),
            commit: Some(listing.commit.clone()),
            changed: true,
        };
        let complete = |installed: &Marker| {
            wanted.iter().all(|file| installed.content.contains(file) && is_there(staging.target(), file))
        };
        if same_commit.is_some_and(complete) {
            return Ok(Arrival { changed: false, ..arrival });
        }
        let total = wanted.iter().try_fold(0u64, |sum, file| sum.checked_add(file.size));
        let total = total.ok_or_else(|| Error::checksum(format!("{}: impossible file sizes", request.repo)))?;
        add(&control.bytes_total, total);
        add(&control.files_total, wanted.len() as u64);
        control.enter(State::Fetching);
        control.tell();

        let files = self.prepare(&staging, installed.as_ref(), &wanted)?;
        let transfer = Transfer::new(client, control, self.tuning, (&request.repo, &listing.commit), files);
        let missing = transfer.missing();
        add(&control.bytes_kept, total - missing);
        add(&control.bytes_done, total - missing);
        transfer.run(request.connections.unwrap_or(CONNECTIONS))?;

        control.check()?;
        control.enter(State::Installing);
        control.tell();
        let (files, patterns) = match same_commit {
            // Several selections together are what each of them was.
            Some(installed) if (&installed.files, &installed.patterns) == (&None, &None) => (None, None),
            _ => (request.files.clone(), request.patterns.clone()),
        };
        let marker = Marker { repo: request.repo.clone(), commit: listing.commit, files, patterns, content: wanted };
        staging.install(&marker)?;
        tracing::info!(repo = request.repo, commit = marker.commit, "a model was downloaded");
        Ok(arrival)
    }

    /// Finds out what is there of each file, from an earlier attempt or in the installed version, and whether the rest
    /// has room. No file is created before that is known.
    fn prepare(
        &self,
        staging: &Staging,
        installed: Option<&Marker>,
        wanted: &[RemoteFile],
    ) -> Result<Vec<(RemoteFile, Partial, Found)>> {
        let control = &self.shared.control;
        let (files, journals, block) = (staging.files(), staging.journals(), self.tuning.block);
        staging.prune(wanted)?;
        for file in wanted {
            control.check()?;
            let known = file.checksum != Checksum::Unknown;
            let unchanged = known && installed.is_some_and(|installed| installed.content.contains(file));
            if !unchanged || !is_there(staging.target(), file) {
                continue;
            }
            let path = staging.target().join(&file.path);
            let mut content = std::fs::File::open(&path).map_err(|e| Error::io(path.display(), &e))?;
            // Somebody may have edited it; then what an earlier attempt linked is the same file.
            if file.checksum.fits(&mut content, file.size, path.display(), || control.check())? {
                staging.link(&file.path)?;
                Partial::adopt(file, &journals, block)?;
            } else {
                Partial::forget(file, &journals)?;
            }
        }
        let needed = wanted.iter().map(|file| Partial::missing(file, &files, &journals, block));
        let needed = needed.fold(LEAST_FREE, u64::saturating_add);
        let free = staging.free_bytes()?;
        if needed > free {
            let what = format!("{}: {needed} bytes are needed, {free} are free", staging.target().display());
            return Err(Error::new(Status::NoSpace, what));
        }
        let open = |file: &RemoteFile| {
            let (partial, found) = Partial::open(file, &files, &journals, block)?;
            if matches!(found, Found::Checked) {
                add(&control.files_done, 1);
            }
            Ok((file.clone(), partial, found))
        };
        wanted.iter().map(open).collect()
    }
}
