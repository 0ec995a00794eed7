//! What a host wants downloaded: JSON, checked once.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

use crate::error::{Error, Result};

/// Connections of one download at most; more would look like an attack.
pub(super) const MAX_CONNECTIONS: usize = 32;

/// Names or patterns in one request at most.
const MAX_NAMES: usize = 1000;

/// Bytes of a repository's name or a revision at most.
const MAX_NAME_BYTES: usize = 256;

/// An access token of the hub. It is shown nowhere.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// A token, which is of visible ASCII characters.
    pub fn new(text: &str) -> Result<Self> {
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Error::invalid_request("the token has characters that tokens do not have"));
        }
        Ok(Self(text.to_owned()))
    }

    /// The token itself: for the header of a request alone.
    pub(super) fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// A checked request; its fields are the keys of the JSON. What is `None` comes from the environment, or from the default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct DownloadRequest {
    /// `org/name`, or a bare name.
    pub repo: String,
    /// Branch, tag or commit; `main` if absent and nothing is there yet.
    pub revision: Option<String>,
    /// Exactly these files.
    pub files: Option<Vec<String>>,
    /// The files that any of these patterns describes: `*` is any text within one folder, `**` any text, `?` one
    /// character. Without `files` and `patterns`, what a model needs.
    pub patterns: Option<Vec<String>>,
    /// Folder of models; `None` is the pool's.
    pub folder: Option<PathBuf>,
    /// The hub or its mirror, without a path behind.
    pub endpoint: Option<String>,
    /// Access token.
    pub token: Option<Token>,
    /// Do not use the network.
    pub offline: Option<bool>,
    /// Connections at the same time.
    pub connections: Option<usize>,
}

impl DownloadRequest {
    /// Parses and checks `json`. Keys that are not known are an error.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let mut unknown = Vec::new();
        let mut reader = serde_json::Deserializer::from_slice(json);
        let mut request: Self = serde_ignored::deserialize(&mut reader, |path| unknown.push(path.to_string()))
            .and_then(|request| reader.end().map(|()| request))
            // Only where it is: the message may quote a value, and that may be the token.
            .map_err(|e| {
                let what = match e.classify() {
                    serde_json::error::Category::Data => "a key is missing or a value of the wrong type",
                    _ => "not JSON",
                };
                let place = format!("line {} column {}", e.line(), e.column());
                Error::invalid_request(format!("the download request is not valid: {what} at {place}"))
            })?;
        if !unknown.is_empty() {
            unknown.truncate(8);
            return Err(Error::invalid_request(format!("unknown keys: {}", unknown.join(", "))));
        }
        request.token = request.token.map(|token| Token::new(&token.0)).transpose()?;
        request.check()?;
        Ok(request)
    }

    /// A request for what a model in `repo` needs.
    pub fn new(repo: &str) -> Result<Self> {
        Self::from_json(serde_json::json!({ "repo": repo }).to_string().as_bytes())
    }

    /// Organisation, if there is one, and name.
    pub(super) fn names(&self) -> (Option<&str>, &str) {
        self.repo.split_once('/').map_or((None, self.repo.as_str()), |(org, name)| (Some(org), name))
    }

    fn check(&self) -> Result<()> {
        if !self.repo.split('/').all(is_repo_name) || self.repo.split('/').count() > 2 {
            return Err(Error::invalid_request(format!("\"repo\" must be like org/name, not {:?}", self.repo)));
        }
        let unusable =
            |text: &str| text.is_empty() || text.len() > MAX_NAME_BYTES || text.chars().any(char::is_control);
        if self.revision.as_deref().is_some_and(unusable) {
            return Err(Error::invalid_request("\"revision\" must be a branch, a tag or a commit"));
        }
        if self.files.is_some() && self.patterns.is_some() {
            return Err(Error::invalid_request("either \"files\" or \"patterns\", not both"));
        }
        if let Some(names) = self.files.as_ref().or(self.patterns.as_ref())
            && (names.is_empty() || names.len() > MAX_NAMES || names.iter().any(|n| n.len() > 4 * MAX_NAME_BYTES))
        {
            return Err(Error::invalid_request(format!("1 to {MAX_NAMES} names of files or patterns are possible")));
        }
        for file in self.files.iter().flatten() {
            check_path(file).map_err(|e| Error::invalid_request(e.message()))?;
        }
        if self.folder.as_ref().is_some_and(|folder| folder.as_os_str().is_empty()) {
            return Err(Error::invalid_request("\"folder\" is empty"));
        }
        if self.connections.is_some_and(|n| n == 0 || n > MAX_CONNECTIONS) {
            return Err(Error::invalid_request(format!("\"connections\" must lie between 1 and {MAX_CONNECTIONS}")));
        }
        Ok(())
    }
}

/// Whether `name` is one part of a repository's name. Hidden names are none: the catalogue would not find them.
fn is_repo_name(name: &str) -> bool {
    let usual = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty()
        && name.len() <= 96
        && name.chars().all(usual)
        && !name.starts_with(['.', '-'])
        && !name.contains("..")
}

/// Refuses paths that would leave the model's folder, or that this library keeps for itself.
pub(super) fn check_path(path: &str) -> Result<()> {
    let unusable = |part: &str| {
        matches!(part, "" | "." | "..") || part.len() > 255 || part.contains('\\') || part.chars().any(char::is_control)
    };
    if path.len() > 1024
        || path.split('/').any(unusable)
        || path.to_ascii_lowercase().starts_with(super::staging::MARKER)
    {
        return Err(Error::invalid_model(format!("{path:?} is not a usable file name")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    fn parse(json: &str) -> Result<DownloadRequest> {
        DownloadRequest::from_json(json.as_bytes())
    }

    #[test]
    fn all_keys_arrive() {
        let request = parse(
            r#"{"repo":"org/m.1","revision":"refs/pr/1","patterns":["*.json"],"folder":"/models","endpoint":"http://x",
                "token":" hf_abc ","offline":true,"connections":2}"#,
        )
        .unwrap();
        assert_eq!(request.names(), (Some("org"), "m.1"));
        assert_eq!(request.token.as_ref().map(Token::secret), Some("hf_abc"));
        assert!(!format!("{request:?}").contains("hf_abc"));
        assert_eq!((request.connections, request.offline), (Some(2), Some(true)));
        assert_eq!(parse(r#"{"repo":"gpt2"}"#).unwrap().names(), (None, "gpt2"));
    }

    #[test]
    fn bad_requests_are_refused_without_telling_the_token() {
        for json in [
            "",
            "{}",
            r#"{"repo":"a/b"} x"#,
            r#"{"repo":"a/b","unheard_of":1}"#,
            r#"{"repo":"a/b/c"}"#,
            r#"{"repo":"../b"}"#,
            r#"{"repo":"a/.b"}"#,
            r#"{"repo":"a/"}"#,
            r#"{"repo":"/a"}"#,
            r#"{"repo":"a b"}"#,
            r#"{"repo":"a/b","revision":""}"#,
            r#"{"repo":"a/b","files":[]}"#,
            r#"{"repo":"a/b","files":["../x"]}"#,
            r#"{"repo":"a/b","files":["x"],"patterns":["x"]}"#,
            r#"{"repo":"a/b","connections":0}"#,
            r#"{"repo":"a/b","connections":33}"#,
            r#"{"repo":"a/b","folder":""}"#,
            r#"{"repo":"a/b","token":"hf_sec\nret"}"#,
            r#"{"repo":"a/b","token":["hf_secret"]}"#,
            r#"{"repo":"a/b","offline":"hf_secret"}"#,
        ] {
            let error = parse(json).expect_err(json);
            assert_eq!(error.status(), Status::InvalidRequest, "{json}");
            assert!(!error.message().contains("hf_"), "{error}");
        }
    }

    #[test]
    fn paths_stay_in_the_folder() {
        for good in ["config.json", "1_Pooling/config.json", ".gitattributes", "a..b", "ü.json"] {
            assert!(check_path(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a//b",
            "a/",
            "./a",
            "a\\..\\b",
            "a\0b",
            ".omlx-download.json",
            ".OMLX-download.json",
        ] {
            assert!(check_path(bad).is_err(), "{bad}");
        }
    }
}
