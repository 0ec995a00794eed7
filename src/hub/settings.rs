//! Where to download from and as whom: the request's own settings, else the environment's, as the hub's own tools read
//! it.

use std::path::{Path, PathBuf};

use super::request::{DownloadRequest, Token};
use super::url::Url;
use crate::error::{Error, Result};

const HUB: &str = "https://huggingface.co";

/// Reads an environment variable.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// What a download's requests have in common.
#[derive(Debug)]
pub struct Settings {
    /// The hub or its mirror.
    pub endpoint: Url,
    /// Sent to `endpoint` and to nobody else.
    pub token: Option<Token>,
    /// The network must not be used.
    pub offline: bool,
    /// A PEM file of the certificates to trust instead of the built-in ones.
    pub certificates: Option<PathBuf>,
}

impl Settings {
    /// The settings of `request` in an environment: `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME`,
    /// `XDG_CACHE_HOME`, `HF_HUB_DISABLE_IMPLICIT_TOKEN`, `HF_HUB_OFFLINE`, `SSL_CERT_FILE`.
    pub fn resolve(request: &DownloadRequest, environment: Environment<'_>) -> Result<Self> {
        let variable = |name: &str| environment(name).filter(|value| !value.trim().is_empty());
        let endpoint = request.endpoint.clone().or_else(|| variable("HF_ENDPOINT")).unwrap_or_else(|| HUB.to_owned());
        let endpoint = Url::parse(endpoint.trim().trim_end_matches('/'))
            .map_err(|e| Error::invalid_request(format!("the hub's endpoint: {}", e.message())))?;
        let is_set = |name: &str| {
            let value = variable(name).unwrap_or_default().to_ascii_uppercase();
            matches!(value.as_str(), "1" | "ON" | "YES" | "TRUE")
        };
        let token = match &request.token {
            Some(token) => Some(token.clone()),
            // Nobody said that this server may have it.
            None if endpoint.is_open() || is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") => None,
            None => environments_token(&variable)?,
        };
        Ok(Self {
            endpoint,
            token,
            offline: request.offline.unwrap_or_else(|| is_set("HF_HUB_OFFLINE")),
            certificates: variable("SSL_CERT_FILE").map(PathBuf::from),
        })
    }
}

/// `HF_TOKEN`, else what the hub's login command left in a file.
fn environments_token(variable: Environment<'_>) -> Result<Option<Token>> {
    if let Some(token) = variable("HF_TOKEN") {
        return Token::new(&token).map(Some).map_err(|e| e.context("HF_TOKEN"));
    }
    let file = variable("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home(variable)?.join("token")));
    // Nobody has to be logged in: a file that is not there or cannot be read is no token.
    let text = file.and_then(|file| std::fs::read_to_string(file).ok()).filter(|text| !text.trim().is_empty());
    text.map(|text| Token::new(&text).map_err(|e| e.context("the hub's token file"))).transpose()
}

/// Where the hub's tools keep what they keep.
fn home(variable: Environment<'_>) -> Option<PathBuf> {
    variable("HF_HOME").map(PathBuf::from).or_else(|| {
        let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
        Some(cache.or_else(|| Some(Path::new(&variable("HOME")?).join(".cache")))?.join("huggingface"))
    })
}

/// Where the hub's tools keep models by the environment: `HF_HUB_CACHE`, else `hub` in `HF_HOME`, by default
/// `~/.cache/huggingface`. `None` without a home.
pub fn standard_cache() -> Option<PathBuf> {
    cache(&|name| std::env::var(name).ok())
}

fn cache(environment: Environment<'_>) -> Option<PathBuf> {
    let variable = |name: &str| environment(name).filter(|value| !value.trim().is_empty());
    variable("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home(&variable)?.join("hub")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(json: &str, variables: &[(&str, &str)]) -> Settings {
        let environment = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Settings::resolve(&DownloadRequest::from_json(json.as_bytes()).unwrap(), &environment).unwrap()
    }

    fn token(settings: &Settings) -> Option<&str> {
        settings.token.as_ref().map(Token::secret)
    }

    #[test]
    fn the_request_goes_before_the_environment() {
        let variables = [("HF_ENDPOINT", "https://mirror.example/"), ("HF_TOKEN", "hf_e"), ("HF_HUB_OFFLINE", "1")];
        let settings = resolve(r#"{"repo":"a/b"}"#, &variables);
        assert_eq!(settings.endpoint.text(), "https://mirror.example/");
        assert_eq!((token(&settings), settings.offline), (Some("hf_e"), true));
        let json = r#"{"repo":"a/b","endpoint":"https://own.example","token":"hf_r","offline":false}"#;
        let settings = resolve(json, &variables);
        assert_eq!(settings.endpoint.text(), "https://own.example/");
        assert_eq!((token(&settings), settings.offline), (Some("hf_r"), false));
        let settings = resolve(r#"{"repo":"a/b"}"#, &[]);
        assert_eq!((settings.endpoint.text().as_str(), settings.offline), ("https://huggingface.co/", false));
        assert_eq!(
            token(&resolve(r#"{"repo":"a/b"}"#, &[("HF_TOKEN", "t"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")])),
            None
        );
    }

    #[test]
    fn the_token_file_is_found() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("huggingface")).unwrap();
        std::fs::write(folder.path().join("huggingface/token"), "hf_file\n").unwrap();
        let home = folder.path().to_str().unwrap();
        let hub = folder.path().join("huggingface");
        for variables in [("XDG_CACHE_HOME", home), ("HF_HOME", hub.to_str().unwrap())] {
            assert_eq!(token(&resolve(r#"{"repo":"a/b"}"#, &[variables])), Some("hf_file"));
        }
        assert_eq!(token(&resolve(r#"{"repo":"a/b"}"#, &[("HF_HOME", "/nowhere")])), None);
    }

    #[test]
    fn the_environment_says_where_the_cache_is() {
        let cache = |variables: &[(&str, &str)]| {
            cache(&|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
        };
        let all = [("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/u")];
        let expected = ["/c", "/h/hub", "/x/huggingface/hub", "/u/.cache/huggingface/hub"];
        for (at, expected) in expected.iter().enumerate() {
            assert_eq!(cache(&all[at..]), Some(PathBuf::from(expected)));
        }
        assert_eq!(cache(&[("HF_HUB_CACHE", " "), ("HF_HOME", "/h")]), Some(PathBuf::from("/h/hub")));
        assert_eq!(cache(&[]), None);
    }

    #[test]
    fn an_environments_token_is_not_sent_in_the_open() {
        let open = r#"{"repo":"a/b","endpoint":"http://mirror.example"}"#;
        assert_eq!(token(&resolve(open, &[("HF_TOKEN", "hf_e")])), None);
        let own = r#"{"repo":"a/b","endpoint":"http://mirror.example","token":"hf_r"}"#;
        assert_eq!(token(&resolve(own, &[])), Some("hf_r"));
        let here = r#"{"repo":"a/b","endpoint":"http://127.0.0.1:5000"}"#;
        assert_eq!(token(&resolve(here, &[("HF_TOKEN", "hf_e")])), Some("hf_e"));
    }
}
