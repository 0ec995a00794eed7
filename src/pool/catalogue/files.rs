//! What a folder's files tell about a model. No weight file is opened: a folder of many large models is listed at once.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, Status};
use crate::weights;

/// Bytes of `README.md` that are read for its front matter.
const README_BYTES: u64 = 64 << 10;

const CONFIG: &str = "config.json";

/// The names in a folder, hidden folders left out.
#[derive(Debug)]
pub struct Listing {
    /// The folder.
    pub folder: PathBuf,
    /// Folders in it, in the order of their names.
    pub folders: Vec<PathBuf>,
    /// Files by name; false for links that lead nowhere.
    files: BTreeMap<String, bool>,
}

impl Listing {
    /// Reads the names in `folder`.
    pub fn read(folder: &Path) -> Result<Self> {
        let unreadable = |e: io::Error| Error::io(folder.display(), &e);
        let mut listing = Self { folder: folder.to_owned(), folders: Vec::new(), files: BTreeMap::new() };
        for item in fs::read_dir(folder).map_err(unreadable)?.flatten() {
            let Ok(kind) = item.file_type() else { continue };
            let name = item.file_name().to_string_lossy().into_owned();
            // Only links have to be followed; everything else is in the folder itself.
            let target = kind.is_symlink().then(|| fs::metadata(item.path()).ok());
            let (is_folder, is_file) = match &target {
                None => (kind.is_dir(), kind.is_file()),
                Some(target) => (
                    target.as_ref().is_some_and(fs::Metadata::is_dir),
                    target.as_ref().is_none_or(fs::Metadata::is_file),
                ),
            };
            if is_folder && !name.starts_with('.') {
                listing.folders.push(item.path());
            } else if is_file {
                listing.files.insert(name, !matches!(target, Some(None)));
            }
        }
        listing.folders.sort();
        Ok(listing)
    }

    /// Whether it has a config, be it a link that leads nowhere.
    pub fn has_config(&self) -> bool {
        self.files.contains_key(CONFIG)
    }

    /// Whether it has weights as a model or a converter leaves them.
    pub fn has_weights(&self) -> bool {
        self.has("safetensors") || self.has("gguf")
    }

    fn has(&self, extension: &str) -> bool {
        self.names(extension).next().is_some()
    }

    fn names(&self, extension: &str) -> impl Iterator<Item = &str> {
        let names = self.files.keys().map(String::as_str);
        names.filter(move |name| Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case(extension)))
    }

    /// Bytes of the safetensors files.
    pub fn weight_bytes(&self) -> u64 {
        let files = self.names("safetensors").filter_map(|name| fs::metadata(self.folder.join(name)).ok());
        files.map(|meta| meta.len()).sum()
    }

    /// Whether all weight files are there, by their names.
    pub fn check_weights(&self) -> Result<()> {
        for name in ["model.safetensors.index.json", "model.safetensors"] {
            if self.files.get(name) == Some(&false) {
                return Err(self.dangling(name));
            }
        }
        let files = match weights::weight_files(&self.folder) {
            Err(error) if error.status() == Status::NotFound => return Err(self.foreign_weights().unwrap_or(error)),
            files => files?,
        };
        let mut missing = files.iter().filter(|(path, _)| !path.is_file()).map(|(path, _)| path);
        let Some(first) = missing.next() else { return Ok(()) };
        let (name, more) = (first.file_name().unwrap_or_default().to_string_lossy(), missing.count());
        if self.files.get(&*name) == Some(&false) {
            return Err(self.dangling(&name));
        }
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        Err(Error::not_found(format!(
            "{}: {name}{more} of {} weight files missing",
            self.folder.display(),
            files.len()
        )))
    }

    /// What is wrong with weights in other formats, if there are no others.
    pub fn foreign_weights(&self) -> Option<Error> {
        let gguf = self.has("gguf").then_some("GGUF");
        let pytorch = ["bin", "pt", "pth"].iter().any(|e| self.has(e)).then_some("PyTorch");
        let formats: Vec<_> = gguf.into_iter().chain(pytorch).collect();
        if formats.is_empty() || self.has("safetensors") {
            return None;
        }
        let (folder, formats) = (self.folder.display(), formats.join(" and "));
        Some(Error::unsupported(format!("{folder}: only {formats} weights, not safetensors")))
    }

    fn dangling(&self, name: &str) -> Error {
        Error::not_found(format!("{}: {name} is a link to a file that is missing", self.folder.display()))
    }

    /// The file with the licence's text.
    pub fn license_file(&self) -> Option<PathBuf> {
        let is_license = |name: &str| {
            let name = name.to_ascii_lowercase();
            ["license", "licence", "copying"].iter().any(|start| name.starts_with(start))
        };
        let found = self.files.iter().find(|(name, there)| **there && is_license(name));
        found.map(|(name, _)| self.folder.join(name))
    }

    /// The licence that `README.md` names in its front matter.
    pub fn license(&self) -> Option<String> {
        let start = match self.files.get("README.md") {
            Some(true) => read_start(&self.folder.join("README.md"), README_BYTES).ok()?,
            _ => return None,
        };
        license_of(&String::from_utf8_lossy(&start))
    }
}

/// At most `limit` bytes of a regular file: anything else might never end, or never begin.
pub fn read_start(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut start = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut start)?;
    Ok(start)
}

/// The text of `license:` in the YAML between the first two lines of dashes. Lists and objects are not understood.
fn license_of(readme: &str) -> Option<String> {
    let mut lines = readme.trim_start_matches('\u{feff}').lines().map(str::trim_end);
    if lines.next() != Some("---") {
        return None;
    }
    let lines: Vec<_> = lines.collect();
    let end = lines.iter().position(|line| *line == "---")?;
    let value = lines[..end].iter().find_map(|line| line.strip_prefix("license:"))?.trim();
    let value = match value.chars().next()? {
        '[' | '{' | '|' | '>' => return None,
        quote @ ('"' | '\'') => value[1..].split(quote).next()?,
        _ => value.split(" #").next()?.trim_end(),
    };
    (!value.is_empty() && !value.starts_with('#')).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_matter_names_the_licence() {
        let license = |text: &str| license_of(text);
        assert_eq!(license("---\nlicense: mit\n---\n# x").as_deref(), Some("mit"));
        assert_eq!(
            license("\u{feff}---\r\ntags: [a]\r\nlicense: \"apache-2.0\"\r\n---\r\n").as_deref(),
            Some("apache-2.0")
        );
        assert_eq!(license("---\nlicense:  gemma # see there\n---\n").as_deref(), Some("gemma"));
        for none in [
            "",
            "license: mit",
            "# x\n---\nlicense: mit\n---\n",
            "---\nlicense: mit\n",
            "---\na: b\n---\nlicense: mit\n---\n",
            "---\nbase:\n  license: mit\n---\n",
            "---\nlicense:\n- mit\n---\n",
            "---\nlicense: # none\n---\n",
        ] {
            assert_eq!(license(none), None, "{none:?}");
        }
    }

    #[test]
    fn no_more_of_a_file_is_read_than_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("README.md");
        let far = format!("---\n{}license: mit\n---\n", "# filler\n".repeat(8000));
        fs::write(&path, &far).unwrap();
        assert_eq!(read_start(&path, README_BYTES).unwrap().len() as u64, README_BYTES);
        assert_eq!(Listing::read(folder.path()).unwrap().license(), None);
        assert_eq!(license_of(&far).as_deref(), Some("mit"), "it was too far away, nothing else");
        assert!(read_start(folder.path(), 1).is_err());
    }
}
