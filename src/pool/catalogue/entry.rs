//! One model of the catalogue.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::Listing;
use super::folders::name;
use crate::config::ModelConfig;
use crate::engine::ModelSource;
use crate::error::{Error, Result};
use crate::mlx::QuantFormat;
use crate::models::{self, ModelKind, encoder};

/// One model, usable or not.
#[derive(Debug, Clone)]
pub struct ModelEntry {
    /// Name in requests: the folder's name, or `org/model`.
    pub id: String,
    /// Its folder; `None` for random weights.
    pub folder: Option<PathBuf>,
    /// Architecture, where the config could be read.
    pub model_type: Option<String>,
    /// Tokens of context, where known.
    pub context_length: Option<usize>,
    /// Bytes of its weight files.
    pub file_bytes: u64,
    /// Format of quantised weights, but for exceptions; `None` for dense weights.
    pub quantization: Option<QuantFormat>,
    /// What it is used for: settled, or else detected where the config could be read.
    pub kind: Option<ModelKind>,
    /// The licence that its `README.md` names.
    pub license: Option<String>,
    /// The file with its licence.
    pub license_file: Option<PathBuf>,
    /// Why it cannot be loaded, if that is already known.
    pub problem: Option<Error>,
    config: Option<Arc<ModelConfig>>,
    detected: Option<ModelKind>,
    /// What is wrong with it whatever it is used for.
    defect: Option<Error>,
}

impl ModelEntry {
    /// Where its weights come from, or why it cannot be loaded.
    pub fn source(&self) -> Result<ModelSource> {
        match (&self.problem, &self.folder, &self.config) {
            (Some(problem), _, _) => Err(problem.clone()),
            (None, Some(folder), _) => Ok(ModelSource::Folder(folder.clone())),
            (None, None, Some(config)) => Ok(ModelSource::Random(ModelConfig::clone(config))),
            (None, None, None) => Err(Error::internal("a model without folder and config")),
        }
    }

    /// The model in `folder`, named `id` or like its folder, usable or not.
    pub fn from_folder(folder: &Path, id: Option<&str>) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::not_found(format!("{}: no such model folder", folder.display())));
        }
        match id {
            Some(id) => Ok(Self::listed(id.to_owned(), folder)),
            None => Ok(Self::listed(name(folder).utf8()?, folder)),
        }
    }

    /// A model of random weights.
    pub fn random(id: &str, config: ModelConfig) -> Self {
        let config = Some(Arc::new(config));
        Self { detected: Some(ModelKind::Llm), config, ..Self::empty(id.to_owned()) }.settled(None)
    }

    /// The model in `folder`, usable or not.
    pub(in crate::pool) fn listed(id: String, folder: &Path) -> Self {
        match Listing::read(folder) {
            Ok(listing) => Self::from_listing(id, &listing, None),
            Err(error) => Self::rejected(id, folder, error),
        }
    }

    /// What was found at `folder`, and why it is no model.
    pub(super) fn rejected(id: String, folder: &Path, why: Error) -> Self {
        Self { folder: Some(folder.to_owned()), defect: Some(why), ..Self::empty(id) }.settled(None)
    }

    /// The model whose files were listed; `defect` is what is wrong with its name.
    pub(super) fn from_listing(id: String, listing: &Listing, defect: Option<Error>) -> Self {
        let folder = &listing.folder;
        let found = Self {
            folder: Some(folder.clone()),
            file_bytes: listing.weight_bytes(),
            license: listing.license(),
            license_file: listing.license_file(),
            ..Self::empty(id)
        };
        let foreign = if listing.has_config() { None } else { listing.foreign_weights() };
        let described = match foreign.map_or_else(|| ModelConfig::load(folder), Err) {
            Ok(config) => Self {
                detected: Some(ModelKind::detect(folder, &config)),
                defect: defect.or_else(|| listing.check_weights().err()),
                config: Some(Arc::new(config)),
                ..found
            },
            Err(error) => Self { defect: Some(defect.unwrap_or(error)), ..found },
        };
        described.settled(None)
    }

    fn empty(id: String) -> Self {
        Self {
            id,
            folder: None,
            model_type: None,
            context_length: None,
            file_bytes: 0,
            quantization: None,
            kind: None,
            license: None,
            license_file: None,
            problem: None,
            config: None,
            detected: None,
            defect: None,
        }
    }

    /// The same, used for `kind`, or for what it was made for.
    pub(super) fn settled(mut self, kind: Option<ModelKind>) -> Self {
        self.kind = kind.or(self.detected);
        self.model_type = self.config.as_ref().map(|config| config.model_type().to_owned());
        let format = self.config.as_ref().and_then(|config| config.quantization());
        self.quantization = format.map(|format| format.default_format());
        let context = match (&self.config, self.kind) {
            (Some(config), Some(kind)) => self.supported(config, kind).map(Some),
            _ => Ok(None),
        };
        (self.context_length, self.problem) = match context {
            Ok(context) => (context, self.defect.clone()),
            Err(problem) => (None, Some(problem)),
        };
        self
    }

    /// Tokens of context that a model of this config has as a `kind`, or why there is no such model.
    fn supported(&self, config: &ModelConfig, kind: ModelKind) -> Result<usize> {
        match kind {
            ModelKind::Vision => {
                Err(Error::unsupported(format!("unsupported: vision (model type {:?})", config.model_type())))
            }
            ModelKind::Embedding | ModelKind::Reranker if self.folder.is_none() => {
                Err(Error::unsupported("random weights are for language models"))
            }
            ModelKind::Embedding | ModelKind::Reranker if encoder::is_supported(config) => encoder::max_tokens(config),
            ModelKind::Embedding | ModelKind::Reranker if models::check_supported(config).is_err() => {
                let known: Vec<_> = encoder::supported_types().chain(models::supported_types()).collect();
                let (wanted, known) = (config.model_type(), known.join(", "));
                Err(Error::unsupported(format!("unknown model type {wanted:?}; known types: {known}")))
            }
            ModelKind::Embedding | ModelKind::Reranker | ModelKind::Llm => {
                models::check_supported(config)?;
                models::context_length(config, None)
            }
        }
    }
}
