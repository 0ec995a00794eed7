//! What follows the encoder, from the files of sentence-transformers (Reimers and Gurevych 2019).

use std::path::{Component, Path};

use serde_json::Value;

use super::Pooling;
use crate::config::read_json;
use crate::error::{Error, Result, Status};

/// Pooling and normalisation of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pipeline {
    /// The vectors of all of these, side by side.
    pub poolings: Vec<Pooling>,
    /// Whether vectors have length 1.
    pub normalize: bool,
}

impl Default for Pipeline {
    /// The mean, as sentence-transformers does with a bare encoder.
    fn default() -> Self {
        Self { poolings: vec![Pooling::Mean], normalize: false }
    }
}

impl Pipeline {
    /// Reads `modules.json` in `folder` and the configs it points to; without it `bare`.
    ///
    /// A module that is not an encoder, a pooling or a normalisation is `Unsupported`.
    pub fn load(folder: &Path, bare: Self) -> Result<Self> {
        let path = folder.join("modules.json");
        let Some(modules) = optional(&path)? else { return Ok(bare) };
        let invalid = |what: &str| Error::invalid_model(format!("{}: {what}", path.display()));
        let modules = modules.as_array().ok_or_else(|| invalid("it must be a list"))?;
        let mut pipeline = Self { poolings: Vec::new(), normalize: false };
        for module in modules {
            let kind = module.get("type").and_then(Value::as_str).ok_or_else(|| invalid("a module has no type"))?;
            let place = module.get("path").and_then(Value::as_str).unwrap_or_default();
            if is_outside(place) {
                return Err(invalid("a module lies outside of the model's folder"));
            }
            match kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" if place.is_empty() => {}
                "Transformer" => return Err(Error::unsupported(format!("the encoder lies in the folder {place:?}"))),
                "Pooling" => pipeline.poolings = poolings(&folder.join(place).join("config.json"))?,
                "Normalize" => pipeline.normalize = true,
                "Dropout" => {}
                other => return Err(Error::unsupported(format!("modules of type {other:?} are not supported"))),
            }
        }
        if pipeline.poolings.is_empty() {
            return Err(invalid("there is no pooling"));
        }
        Ok(pipeline)
    }
}

/// The poolings of a `1_Pooling/config.json`, in the order of sentence-transformers.
fn poolings(path: &Path) -> Result<Vec<Pooling>> {
    const FLAGS: [(&str, &str, Option<Pooling>); 6] = [
        ("pooling_mode_cls_token", "cls", Some(Pooling::Cls)),
        ("pooling_mode_max_tokens", "max", Some(Pooling::Max)),
        ("pooling_mode_mean_tokens", "mean", Some(Pooling::Mean)),
        ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", None),
        ("pooling_mode_weightedmean_tokens", "weightedmean", None),
        ("pooling_mode_lasttoken", "lasttoken", Some(Pooling::LastToken)),
    ];
    let config = read_json(path)?;
    let mode = config.get("pooling_mode").and_then(Value::as_str);
    let chosen = FLAGS.iter().filter(|(flag, name, _)| match mode {
        Some(mode) => mode == *name,
        None => config.get(flag).and_then(Value::as_bool).unwrap_or(false),
    });
    let unsupported = |name: &str| Error::unsupported(format!("{}: {name:?} is not supported", path.display()));
    let chosen = chosen.map(|(flag, _, pooling)| pooling.ok_or_else(|| unsupported(flag)));
    let chosen = chosen.collect::<Result<Vec<_>>>()?;
    match (chosen.is_empty(), mode) {
        (false, _) => Ok(chosen),
        (true, Some(mode)) => Err(unsupported(mode)),
        (true, None) => Err(Error::invalid_model(format!("{}: no pooling mode is set", path.display()))),
    }
}

/// Whether `place` may lie outside of the folder that it is joined to.
pub(super) fn is_outside(place: &str) -> bool {
    Path::new(place).components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir))
}

/// The content of the JSON file at `path`, if there is one.
pub(super) fn optional(path: &Path) -> Result<Option<Value>> {
    match read_json(path) {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.status() == Status::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn folder(modules: Value, pooling: Value) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("1_Pooling")).unwrap();
        std::fs::write(folder.path().join("modules.json"), modules.to_string()).unwrap();
        std::fs::write(folder.path().join("1_Pooling/config.json"), pooling.to_string()).unwrap();
        folder
    }

    fn modules(last: &str) -> Value {
        json!([
            {"path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"path": "2_Last", "type": format!("sentence_transformers.models.{last}")},
        ])
    }

    #[test]
    fn files_say_what_follows() {
        let pooling = json!({"pooling_mode_cls_token": true, "pooling_mode_lasttoken": true});
        let both = folder(modules("Normalize"), pooling);
        let expected = Pipeline { poolings: vec![Pooling::Cls, Pooling::LastToken], normalize: true };
        let load = |folder: &Path| Pipeline::load(folder, Pipeline::default()).unwrap();
        assert_eq!(load(both.path()), expected);
        let named = folder(modules("Dropout"), json!({"pooling_mode": "max"}));
        assert_eq!(load(named.path()).poolings, [Pooling::Max]);
        let last = || Pipeline { poolings: vec![Pooling::LastToken], normalize: false };
        assert_eq!(Pipeline::load(&named.path().join("1_Pooling"), last()).unwrap(), last());
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let mean = || json!({"pooling_mode_mean_tokens": true});
        let status = |modules, pooling| {
            Pipeline::load(folder(modules, pooling).path(), Pipeline::default()).unwrap_err().status()
        };
        assert_eq!(status(modules("Dense"), mean()), Status::Unsupported);
        assert_eq!(
            status(modules("Normalize"), json!({"pooling_mode_weightedmean_tokens": true})),
            Status::Unsupported
        );
        assert_eq!(status(modules("Normalize"), json!({"pooling_mode": "newer"})), Status::Unsupported);
        assert_eq!(status(modules("Normalize"), json!({})), Status::InvalidModel);
        assert_eq!(status(json!({}), mean()), Status::InvalidModel);
        let outside = json!([{"path": "../1_Pooling", "type": "Pooling"}]);
        assert_eq!(status(outside, mean()), Status::InvalidModel);
    }
}
