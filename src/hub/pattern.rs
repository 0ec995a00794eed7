//! Which files of a repository a model needs.

/// What is fetched by default: weights as safetensors, configs, tokenizers, chat templates, and in folders like
/// `1_Pooling` the modules of sentence-transformers.
pub const DEFAULT: [&str; 11] = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "README.md",
    "additional_chat_templates/*.jinja",
    "?_*/*.safetensors",
    "?_*/*.json",
    "?_*/*.txt",
];

/// Whether `pattern` describes `path`. `*` is any text within one folder, `**` any text, `?` one character that is no
/// slash.
pub fn matches(pattern: &str, path: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let path: Vec<char> = path.chars().collect();
    // `reached[i]`: the pattern so far describes the first `i` characters. No backtracking: hostile patterns cost their
    // length times the path's.
    let mut reached = vec![false; path.len() + 1];
    reached[0] = true;
    let mut at = 0;
    while at < pattern.len() {
        let deep = pattern[at..].starts_with(&['*', '*']);
        let mut next = vec![false; path.len() + 1];
        for i in 0..=path.len() {
            next[i] = match pattern[at] {
                '*' => reached[i] || (i > 0 && next[i - 1] && (deep || path[i - 1] != '/')),
                '?' => i > 0 && reached[i - 1] && path[i - 1] != '/',
                literal => i > 0 && reached[i - 1] && path[i - 1] == literal,
            };
        }
        reached = next;
        at += if deep { 2 } else { 1 };
    }
    reached[path.len()]
}

/// The paths that any of `patterns` describes.
pub fn select<'a>(patterns: &[&str], paths: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    paths.filter(|path| patterns.iter().any(|pattern| matches(pattern, path))).collect()
}

/// The default selection. Weights that some repositories hold a second time, as their authors' own tools read them, are
/// left out where there are others.
pub fn select_default<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut selected = select(&DEFAULT, paths);
    let second = |path: &str| path.starts_with("consolidated") && path.ends_with(".safetensors");
    let first = |path: &&str| path.ends_with(".safetensors") && !path.contains('/') && !second(path);
    if selected.iter().any(first) {
        selected.retain(|path| !second(path));
    }
    selected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_describe_paths() {
        for (pattern, path, expected) in [
            ("*.json", "config.json", true),
            ("*.json", "onnx/config.json", false),
            ("**.json", "onnx/config.json", true),
            ("onnx/**", "onnx/a/b.onnx", true),
            ("?_*/*.json", "1_Pooling/config.json", true),
            ("?_*/*.json", "/_x/a.json", false),
            ("LICENSE*", "LICENSE", true),
            ("LICENSE*", "LICENSES/MIT", false),
            ("a*b*c", "aXbXbc", true),
            ("a*b*c", "aXbXbcd", false),
            ("", "", true),
            ("", "a", false),
            ("ü?", "üä", true),
        ] {
            assert_eq!(matches(pattern, path), expected, "{pattern} {path}");
        }
        assert!(!matches(&"*a".repeat(2000), &"a".repeat(1999)), "and it ends");
    }

    #[test]
    fn models_come_without_what_they_do_not_need() {
        let files = [
            ".gitattributes",
            "1_Pooling/config.json",
            "LICENSE",
            "README.md",
            "config.json",
            "consolidated.safetensors",
            "flax_model.msgpack",
            "merges.txt",
            "model-Q4.gguf",
            "model.onnx",
            "model.safetensors",
            "onnx/config.json",
            "original/model.safetensors",
            "pytorch_model.bin",
            "tokenizer.model",
        ];
        let selected = select_default(files.into_iter());
        let expected = [
            "1_Pooling/config.json",
            "LICENSE",
            "README.md",
            "config.json",
            "merges.txt",
            "model.safetensors",
            "tokenizer.model",
        ];
        assert_eq!(selected, expected);
        assert_eq!(select_default(["consolidated.safetensors"].into_iter()), ["consolidated.safetensors"]);
    }
}
