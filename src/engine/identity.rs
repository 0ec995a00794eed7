//! What stands for a model in the tiers: all that its rows depend on.

use super::tiers::Tiers;
use super::{EngineOptions, ModelSource};
use crate::cache::fingerprint::{HashMemory, Identity, fingerprint, stamps};
use crate::cache::ssd::ColdTier;
use crate::error::{Error, Result, Status};
use crate::kernels::NUMERICS;
use crate::weights::weight_files;

/// Files of a model, besides its weights, that decide what rows there are and which tokens a text has.
const OTHER_FILES: &[&str] = &["config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"];

/// What rows of an engine's model depend on.
#[derive(Debug)]
pub struct ModelIdentity {
    identity: Identity,
    /// Of the files, when the model began to load.
    stamps: Vec<Vec<u8>>,
}

impl ModelIdentity {
    /// To be made before the model loads.
    pub fn new(options: &EngineOptions) -> Result<Self> {
        let mut identity = Identity { files: Vec::new(), parts: Vec::new() };
        let mut part = |name, text: String| identity.parts.push((name, text.into_bytes()));
        part("context", format!("{:?}", options.context));
        part("dtype", format!("{:?}", options.dtype));
        part("backend", options.backend.numerics());
        part("numerics", NUMERICS.to_string());
        part("block_tokens", options.block_tokens.to_string());
        match &options.source {
            ModelSource::Folder(folder) => {
                let others = OTHER_FILES.iter().map(|name| folder.join(name)).filter(|path| path.exists());
                identity.files.extend(others);
                identity.files.extend(weight_files(folder)?.into_iter().map(|(path, _)| path));
            }
            ModelSource::Random(config) => part("random", config.raw().to_string()),
        }
        identity.parts.push(("namespace", options.tiers.namespace.clone()));
        Ok(Self { stamps: stamps(&identity.files)?, identity })
    }

    /// What stands for the model in the tiers: reads all its files, unless their hashes are remembered.
    pub fn fingerprint(&self, tiers: &Tiers, interrupted: &dyn Fn() -> bool) -> Result<[u8; 32]> {
        match &tiers.cold {
            Some(cold) => fingerprint(&self.identity, &Remembered(&cold.tier), interrupted),
            None => fingerprint(&self.identity, &Forgotten, interrupted),
        }
    }

    /// An error if a file has changed since the model began to load: nobody knows then which one was read.
    pub fn check(&self) -> Result<()> {
        match stamps(&self.identity.files)? == self.stamps {
            true => Ok(()),
            false => Err(Error::new(Status::Io, "the model's files changed while it loaded")),
        }
    }
}

/// Hashes of files that the cold tier's index remembers.
struct Remembered<'a>(&'a ColdTier);

impl HashMemory for Remembered<'_> {
    fn get(&self, key: &[u8]) -> Option<[u8; 32]> {
        self.0.remembered_hash(key)
    }

    fn set(&self, key: &[u8], hash: [u8; 32]) {
        self.0.remember_hash(key, hash);
    }
}

/// Without a cold tier every process reads the files again.
struct Forgotten;

impl HashMemory for Forgotten {
    fn get(&self, _key: &[u8]) -> Option<[u8; 32]> {
        None
    }

    fn set(&self, _key: &[u8], _hash: [u8; 32]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_changes_while_the_model_loads_is_noticed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"weights").unwrap();
        let files = vec![file.path().to_owned()];
        let stamps = stamps(&files).unwrap();
        let identity = ModelIdentity { identity: Identity { files, parts: Vec::new() }, stamps };
        identity.check().unwrap();
        std::fs::write(file.path(), b"other weights").unwrap();
        assert!(identity.check().unwrap_err().message().contains("changed"));
    }
}
