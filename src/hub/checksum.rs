//! What a file's content must be, as the hub announces it.

use std::fmt;
use std::io::Read;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Bytes that are read and hashed at a time: a cancel is heard between two of them.
const CHUNK: usize = 1 << 20;

/// What is known of a file's content beside its length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Checksum {
    /// SHA-256 of the content, in lower-case hex: large files (LFS).
    Sha256(String),
    /// SHA-1 of the content as a git blob, in lower-case hex: small files. It finds accidents; against forgery it is as
    /// weak as git's.
    Git(String),
    /// Nothing: a mirror does not say.
    Unknown,
}

impl Checksum {
    /// What an etag says: a hub's is the SHA-256 of a large file, or the git blob id of a small one.
    pub fn from_etag(etag: &str) -> Self {
        let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"').to_ascii_lowercase();
        match etag.len() {
            _ if !is_hex(&etag) => Self::Unknown,
            64 => Self::Sha256(etag),
            40 => Self::Git(etag),
            _ => Self::Unknown,
        }
    }

    /// Whether an etag names other content. One of another kind says nothing.
    pub fn contradicts(&self, etag: &str) -> bool {
        match (self, Self::from_etag(etag)) {
            (Self::Sha256(a), Self::Sha256(b)) | (Self::Git(a), Self::Git(b)) => *a != b,
            _ => false,
        }
    }

    /// Reads `content`, which must have `size` bytes, and says whether it is the right one. `interrupt` is asked every
    /// megabyte.
    pub fn fits(
        &self,
        content: &mut impl Read,
        size: u64,
        what: impl fmt::Display,
        mut interrupt: impl FnMut() -> Result<()>,
    ) -> Result<bool> {
        let (mut context, expected) = match self {
            Self::Sha256(expected) => (Context::new(&SHA256), expected),
            Self::Git(expected) => {
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {size}\0").as_bytes());
                (context, expected)
            }
            Self::Unknown => return Ok(true),
        };
        let mut chunk = vec![0; CHUNK];
        loop {
            interrupt()?;
            match content.read(&mut chunk).map_err(|e| Error::io(&what, &e))? {
                0 => break,
                read => context.update(&chunk[..read]),
            }
        }
        let found: String = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(found == *expected)
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(hash) => write!(f, "sha256:{hash}"),
            Self::Git(hash) => write!(f, "git:{hash}"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// Whether `text` is hex digits alone.
pub fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_checksums() {
        // Of "hello\n": sha256sum, git hash-object.
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        for etag in [sha256.to_owned(), format!("\"{}\"", sha256.to_uppercase()), format!("W/\"{git}\"")] {
            let checksum = Checksum::from_etag(&etag);
            assert_ne!(checksum, Checksum::Unknown);
            assert!(checksum.fits(&mut &b"hello\n"[..], 6, "test", || Ok(())).unwrap(), "{checksum}");
            assert!(!checksum.fits(&mut &b"hellO\n"[..], 6, "test", || Ok(())).unwrap(), "{checksum}");
        }
        assert_eq!(Checksum::from_etag("\"5f3-abc\""), Checksum::Unknown);
        assert!(Checksum::from_etag(git).contradicts(&git.replace('c', "d")));
        assert!(!Checksum::from_etag(git).contradicts(sha256) && !Checksum::from_etag(git).contradicts(git));
    }
}
