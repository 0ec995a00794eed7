//! What a model folder can be used for.

use std::path::Path;

use serde_json::Value;

use super::encoder::{self, AnswerTokens};
use crate::config::{ModelConfig, read_json};

/// What a model does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelKind {
    /// Continues texts.
    Llm,
    /// Gives vectors of texts.
    Embedding,
    /// Gives scores of pairs of texts.
    Reranker,
    /// Continues texts with pictures.
    Vision,
}

impl ModelKind {
    /// Its name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llm => "llm",
            Self::Embedding => "embedding",
            Self::Reranker => "reranker",
            Self::Vision => "vision",
        }
    }

    /// The kind of the model in `folder`, from its config and the files of sentence-transformers. It says what a model is meant
    /// for, not whether this build can load it.
    pub fn detect(folder: &Path, config: &ModelConfig) -> Self {
        // First of all: what gives vectors of pictures is nothing that this build can load either. Of a model that also sees, the
        // language model is loaded if it is known.
        let sees = config.raw().get("vision_config").is_some_and(Value::is_object);
        let text = config.is_wrapped() && super::is_known(config);
        if sees && !text {
            Self::Vision
        } else if encoder::is_classifier(config) || is_cross_encoder(folder) {
            Self::Reranker
        } else if encoder::is_supported(config) || folder.join("modules.json").is_file() {
            Self::Embedding
        } else {
            Self::Llm
        }
    }
}

/// Whether the files of sentence-transformers (from 5 on) say so. Files that cannot be read say nothing.
fn is_cross_encoder(folder: &Path) -> bool {
    let own = read_json(&folder.join("config_sentence_transformers.json"));
    own.is_ok_and(|own| own.get("model_type").and_then(Value::as_str) == Some("CrossEncoder"))
        || AnswerTokens::declared(folder)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn configs_and_files_tell_the_kind() {
        let folder = tempfile::tempdir().unwrap();
        let kind = |value: Value| ModelKind::detect(folder.path(), &ModelConfig::from_value(value).unwrap());
        let qwen = || json!({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]});
        assert_eq!(kind(json!({"model_type": "bert"})), ModelKind::Embedding);
        assert_eq!(
            kind(json!({"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]})),
            ModelKind::Embedding
        );
        let head = json!(["XLMRobertaForSequenceClassification"]);
        assert_eq!(kind(json!({"model_type": "xlm-roberta", "architectures": head})), ModelKind::Reranker);
        assert_eq!(kind(json!({"model_type": "qwen2_vl", "vision_config": {"depth": 2}})), ModelKind::Vision);
        let seeing =
            json!({"model_type": "qwen2_vl", "vision_config": {}, "architectures": ["XForSequenceClassification"]});
        assert_eq!(kind(seeing), ModelKind::Vision);
        let wrapped = |text: &str| json!({"model_type": "x", "vision_config": {}, "text_config": {"model_type": text}});
        assert_eq!(kind(wrapped("llama")), ModelKind::Llm);
        assert_eq!(kind(wrapped("unheard_of")), ModelKind::Vision);
        assert_eq!(kind(qwen()), ModelKind::Llm);
        std::fs::write(folder.path().join("modules.json"), "[]").unwrap();
        assert_eq!(kind(qwen()), ModelKind::Embedding);
        let modules = json!([{"path": "", "type": "Transformer"}, {"path": "1_LogitScore", "type": "x.LogitScore"}]);
        std::fs::write(folder.path().join("modules.json"), modules.to_string()).unwrap();
        assert_eq!(kind(qwen()), ModelKind::Reranker);
        std::fs::remove_file(folder.path().join("modules.json")).unwrap();
        let own = folder.path().join("config_sentence_transformers.json");
        std::fs::write(&own, r#"{"model_type": "SentenceTransformer"}"#).unwrap();
        assert_eq!(kind(qwen()), ModelKind::Llm);
        std::fs::write(&own, r#"{"model_type": "CrossEncoder"}"#).unwrap();
        assert_eq!(kind(qwen()), ModelKind::Reranker);
    }
}
