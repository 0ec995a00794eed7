//! Which files a revision of a repository has, and what they must be.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::checksum::{Checksum, is_hex};
use super::control::Control;
use super::download::Tuning;
use super::http::{Client, Failure, Patience};
use super::pattern;
use super::request::{DownloadRequest, check_path};
use super::url::encode;
use crate::error::{Error, Result};

/// Bytes of a listing at most: of some hundred thousand files.
const MAX_LISTING: usize = 64 << 20;

/// A file of a repository, and what its content must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteFile {
    /// Relative, with slashes.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// What is known of the content.
    pub checksum: Checksum,
}

/// The files of one commit.
pub struct Listing {
    pub commit: String,
    files: Vec<Sibling>,
}

/// The hub's answer.
#[derive(Deserialize)]
struct Info {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// Resolves a revision and lists its files.
pub fn list(client: &Client, control: &Control, tuning: &Tuning, repo: &str, revision: &str) -> Result<Listing> {
    let url = client.url(&format!("/api/models/{repo}/revision/{}?blobs=true", encode(revision, false)));
    let json = Patience::new(control, tuning).run(|| {
        let (client, url) = (client.clone(), url.clone());
        control.apart(move || client.read(&url, MAX_LISTING))?
    })?;
    let info: Info =
        serde_json::from_slice(&json).map_err(|e| Error::network(format!("{url}: not the answer of a hub: {e}")))?;
    if !is_hex(&info.sha) || !matches!(info.sha.len(), 40 | 64) {
        return Err(Error::network(format!("{url}: the revision has no commit")));
    }
    if is_hex(revision) && revision.len() == info.sha.len() && !revision.eq_ignore_ascii_case(&info.sha) {
        return Err(Error::checksum(format!("{repo}: the hub answered with another commit than {revision}")));
    }
    Ok(Listing { commit: info.sha.to_ascii_lowercase(), files: info.siblings })
}

impl Listing {
    /// The paths that `request` means, and of `more` those that the commit has.
    pub fn select(&self, request: &DownloadRequest, more: &[RemoteFile]) -> Result<Vec<String>> {
        let all = || self.files.iter().map(|file| file.rfilename.as_str());
        let mut selected: HashSet<&str> = match (&request.files, &request.patterns) {
            (Some(files), _) => {
                let listed: HashSet<&str> = all().collect();
                if let Some(missing) = files.iter().find(|file| !listed.contains(file.as_str())) {
                    let what = format!("{} has no file {missing:?} at {}", request.repo, self.commit);
                    return Err(Error::not_found(what));
                }
                files.iter().map(String::as_str).collect()
            }
            (None, Some(patterns)) => {
                let patterns: Vec<_> = patterns.iter().map(String::as_str).collect();
                pattern::select(&patterns, all()).into_iter().collect()
            }
            (None, None) => pattern::select_default(all()).into_iter().collect(),
        };
        if selected.is_empty() {
            return Err(Error::not_found(format!("{} has none of the wanted files at {}", request.repo, self.commit)));
        }
        selected.extend(more.iter().map(|file| file.path.as_str()));
        let paths: Vec<String> = all().filter(|path| selected.contains(path)).map(str::to_owned).collect();
        let mut seen = HashSet::new();
        for path in &paths {
            check_path(path).map_err(|e| e.context(&request.repo))?;
            if !seen.insert(path) {
                return Err(Error::invalid_model(format!("{}: {path:?} is listed twice", request.repo)));
            }
        }
        Ok(paths)
    }

    /// What the files at `paths` must be. Where the listing does not say (some mirrors), the hub is asked for each.
    pub fn describe(
        &self,
        paths: &[String],
        client: &Client,
        control: &Control,
        tuning: &Tuning,
        repo: &str,
    ) -> Result<Vec<RemoteFile>> {
        let wanted: HashSet<&str> = paths.iter().map(String::as_str).collect();
        let files = self.files.iter().filter(|file| wanted.contains(file.rfilename.as_str()));
        files.map(|file| file.known().map_or_else(|| self.ask(file, client, control, tuning, repo), Ok)).collect()
    }

    fn ask(
        &self,
        file: &Sibling,
        client: &Client,
        control: &Control,
        tuning: &Tuning,
        repo: &str,
    ) -> Result<RemoteFile> {
        let url = client.url(&file_path(repo, &self.commit, &file.rfilename));
        Patience::new(control, tuning).run(|| {
            let (client, url) = (client.clone(), url.clone());
            let answer = control.apart(move || client.head(&url).map(|a| (a.hub, a.length, a.url)))??;
            let (hub, length, url) = answer;
            let no_size =
                || Failure::last(Error::network(format!("{url}: the server does not say how long the file is")));
            let size = hub.size.or(length).ok_or_else(no_size)?;
            let checksum = hub.etag.map_or(Checksum::Unknown, |etag| Checksum::from_etag(&etag));
            Ok(RemoteFile { path: file.rfilename.clone(), size, checksum })
        })
    }
}

impl Sibling {
    /// The file, if the listing says all of it.
    fn known(&self) -> Option<RemoteFile> {
        let file = |size, checksum| Some(RemoteFile { path: self.rfilename.clone(), size, checksum });
        match &self.lfs {
            Some(lfs) => {
                let hash = lfs.sha256.as_ref().filter(|hash| hash.len() == 64 && is_hex(hash))?;
                file(lfs.size.or(self.size)?, Checksum::Sha256(hash.to_ascii_lowercase()))
            }
            None => {
                let id = self.blob_id.as_ref().filter(|id| id.len() == 40 && is_hex(id))?;
                file(self.size?, Checksum::Git(id.to_ascii_lowercase()))
            }
        }
    }
}

/// Where a hub has a file of a commit.
pub fn file_path(repo: &str, commit: &str, path: &str) -> String {
    format!("/{repo}/resolve/{commit}/{}", encode(path, true))
}
