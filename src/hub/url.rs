//! The little of URLs that downloads need: where one leads, and whether that is the same server.

use std::fmt;

use crate::error::{Error, Result};

/// An absolute `http` or `https` URL. Displayed without its query, which may hold a signature.
#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    secure: bool,
    /// Host in lower case and, where it is not the scheme's own, port.
    authority: String,
    /// Begins with a slash; with the query.
    path: String,
}

impl Url {
    /// Parses an absolute URL; a fragment is dropped.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| Error::network(format!("not a usable URL ({why})"));
        if text.bytes().any(|b| !b.is_ascii_graphic()) {
            return Err(bad("spaces or other characters that URLs do not have"));
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(|| bad("no scheme"))?;
        let secure = match scheme.to_ascii_lowercase().as_str() {
            "https" => true,
            "http" => false,
            _ => return Err(bad("neither http nor https")),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        if authority.is_empty() || authority.contains('@') {
            return Err(bad("no host, or a password in it"));
        }
        let authority = authority.to_ascii_lowercase();
        let standard = if secure { ":443" } else { ":80" };
        let authority = authority.strip_suffix(standard).unwrap_or(&authority).to_owned();
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        Ok(Self { secure, authority, path })
    }

    /// Where a redirect to `location` leads. One from https to http is refused.
    pub fn redirected(&self, location: &str) -> Result<Self> {
        let same_server = |path: String| Self { path, ..self.clone() };
        let path = self.path.split('?').next().unwrap_or_default();
        let target = if location.contains("://") && !location.starts_with('/') {
            Self::parse(location)?
        } else if let Some(rest) = location.strip_prefix("//") {
            Self::parse(&format!("{}://{rest}", self.scheme()))?
        } else if location.starts_with('/') {
            Self::parse(&same_server(location.to_owned()).text())?
        } else {
            let folder = &path[..path.rfind('/').map_or(0, |at| at + 1)];
            Self::parse(&same_server(format!("{folder}{location}")).text())?
        };
        if self.secure && !target.secure {
            return Err(Error::network(format!("{self} redirects to {target}, which is not encrypted")));
        }
        Ok(target)
    }

    /// The same server with `path`, percent-encoded, behind this URL's own.
    pub fn join(&self, path: &str) -> Self {
        Self { path: format!("{}{path}", self.path.trim_end_matches('/')), ..self.clone() }
    }

    /// Whether both are the same server: scheme, host and port.
    pub fn same_server(&self, other: &Self) -> bool {
        self.secure == other.secure && self.authority == other.authority
    }

    /// Whether what is sent there can be read on its way.
    pub fn is_open(&self) -> bool {
        !self.secure && !self.is_loopback()
    }

    /// Whether the server is this machine.
    pub fn is_loopback(&self) -> bool {
        let host = match self.authority.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => self.authority.split(':').next().unwrap_or_default(),
        };
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    fn scheme(&self) -> &'static str {
        if self.secure { "https" } else { "http" }
    }

    /// The whole URL: for requests, not for messages.
    pub fn text(&self) -> String {
        format!("{}://{}{}", self.scheme(), self.authority, self.path)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme(), self.authority, self.path.split('?').next().unwrap_or_default())
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// `text` with everything encoded that is not a letter, a digit or one of `-._~`; a slash only if `slashes` is false.
pub fn encode(text: &str, slashes: bool) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b) || (slashes && b == b'/');
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn redirects_lead_where_they_should() {
        let from = url("https://hub.example/org/model/resolve/main/a.json?x=1");
        for (location, target) in [
            ("https://cdn.example/f?sig=secret", "https://cdn.example/f?sig=secret"),
            ("//cdn.example:444/f", "https://cdn.example:444/f"),
            ("/api/cache/a.json", "https://hub.example/api/cache/a.json"),
            ("/login?next=https://other.example", "https://hub.example/login?next=https://other.example"),
            ("b.json", "https://hub.example/org/model/resolve/main/b.json"),
        ] {
            assert_eq!(from.redirected(location).unwrap().text(), target);
        }
        assert!(from.redirected("http://cdn.example/f").is_err(), "not from https to http");
        assert!(url("http://a.example/").redirected("https://a.example/").is_ok());
        assert!(from.redirected("ftp://a.example/").is_err() && from.redirected("/a b").is_err());
    }

    #[test]
    fn servers_are_told_apart() {
        let hub = url("https://Hub.example:443");
        assert!(hub.same_server(&url("https://hub.example/x")));
        for other in
            ["http://hub.example", "https://hub.example:444", "https://hub.example.org", "https://cdn.hub.example"]
        {
            assert!(!hub.same_server(&url(other)), "{other}");
        }
        assert!(url("http://127.0.0.1:8").is_loopback() && url("http://[::1]:8").is_loopback());
        assert!(!url("http://127.0.0.1.example").is_loopback() && url("http://example").is_open());
        assert!(!url("https://example").is_open() && Url::parse("https://user:secret@example").is_err());
    }

    #[test]
    fn messages_do_not_hold_signatures() {
        let text = format!("{0} {0:?}", url("https://cdn.example/f?X-Signature=secret"));
        assert!(text.contains("cdn.example/f") && !text.contains("secret"));
        assert_eq!(encode("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(encode("a b/ü#?.json", true), "a%20b/%C3%BC%23%3F.json");
    }
}
