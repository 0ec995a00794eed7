//! API keys.

use std::fmt;
use std::hint::black_box;
use std::path::Path;

/// The keys of which a request must have one; without any, everybody may call.
#[derive(Clone, Default)]
pub struct Keys(Vec<Vec<u8>>);

/// Keys are in no log.
impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

impl Keys {
    /// From a file, one a line, and from the environment.
    pub fn read(file: Option<&Path>, environment: Option<String>) -> Result<Self, String> {
        let mut text = environment.unwrap_or_default();
        if let Some(file) = file {
            let keys = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
            if keys.trim().is_empty() {
                return Err(format!("{}: there is no key in it", file.display()));
            }
            text = text + "\n" + &keys;
        }
        let keys = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        Ok(Self(keys.map(|key| key.as_bytes().to_vec()).collect()))
    }

    /// Whether a key is needed.
    pub fn required(&self) -> bool {
        !self.0.is_empty()
    }

    /// Whether `candidate` is one of the keys, in a time that does not tell how much of it is right.
    pub fn accept(&self, candidate: &[u8]) -> bool {
        let mut found = false;
        for key in &self.0 {
            found |= black_box(same(key, candidate));
        }
        found
    }
}

/// Compares all of `candidate` in any case; only its length shows in the time.
fn same(key: &[u8], candidate: &[u8]) -> bool {
    let mut difference = key.len() ^ candidate.len();
    for (index, byte) in candidate.iter().enumerate() {
        difference |= usize::from(black_box(byte ^ key[index % key.len()]));
    }
    difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_keys_are_accepted_and_nothing_else() {
        let keys = Keys::read(None, Some("one\n# two\nthree".to_owned())).unwrap();
        for (candidate, accepted) in [
            ("one", true),
            ("three", true),
            ("# two", false),
            ("on", false),
            ("onee", false),
            ("oneone", false),
            ("", false),
        ] {
            assert_eq!(keys.accept(candidate.as_bytes()), accepted, "{candidate}");
        }
        assert!(!Keys::default().accept(b""));
        assert_eq!(format!("{keys:?}"), "Keys(2)");
    }
}
