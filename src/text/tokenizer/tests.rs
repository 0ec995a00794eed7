use serde_json::{Value, json};

use super::*;
use crate::error::Status;
use crate::text::tests::tiny_chat;

pub(in crate::text) fn tiny() -> Tokenizer {
    Tokenizer::load(&tiny_chat()).unwrap().unwrap()
}

/// A SentencePiece-like vocabulary: three special tokens, 256 byte tokens, some pieces; no merges.
pub(in crate::text) fn sentencepiece(decoder: Value) -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let pieces = ["▁", "a", "b", "é", "▁hello", "▁wor", "ld", "▁▁", "x y"].map(str::to_owned);
    for token in ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(bytes).chain(pieces) {
        vocab.insert(token, json!(vocab.len()));
    }
    let special = |(id, content): (usize, &str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let added: Vec<Value> = ["<unk>", "<s>", "</s>"].into_iter().enumerate().map(special).collect();
    let file = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": []},
    });
    Tokenizer::from_json(&serde_json::to_vec(&file).unwrap()).unwrap()
}

/// Llama 2's decoder.
pub(in crate::text) fn llama_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

#[test]
fn truncation_and_padding_of_the_file_are_off() {
    let tokenizer = sentencepiece(llama_decoder());
    let ids = tokenizer.encode("a b a b a b", true).unwrap();
    assert_eq!(ids.len(), 13);
    assert_eq!(ids[0], tokenizer.token_id("<s>").unwrap());
    assert_eq!(tokenizer.encode("a b a b a b", false).unwrap(), ids[1..]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a b a b a b");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<s> a b a b a b");
}

#[test]
fn bytes_of_tokens() {
    let tokenizer = sentencepiece(llama_decoder());
    let bytes = |token: &str| tokenizer.token_bytes(tokenizer.token_id(token).unwrap()).unwrap();
    assert_eq!(bytes("▁hello"), b" hello");
    assert_eq!(bytes("<0xE2>"), [0xe2]);
    assert_eq!(bytes("</s>"), b"</s>");
    assert_eq!(tokenizer.token_text(tokenizer.token_id("<0xE2>").unwrap()).unwrap(), "\u{fffd}");
    assert_eq!(tokenizer.token_bytes(100_000), None);

    let tokenizer = tiny();
    let text = "Ünï \n🙂 <|im_end|>";
    let ids = tokenizer.encode(text, false).unwrap();
    let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap()).collect();
    assert_eq!(bytes, text.as_bytes());
}

#[test]
fn special_tokens() {
    let tokenizer = tiny();
    let id = |token| tokenizer.token_id(token).unwrap();
    assert!(tokenizer.is_special(id("<|im_end|>")));
    assert!(!tokenizer.is_special(id("<think>")));
    let ids = tokenizer.encode("<think>a<|im_end|>", false).unwrap();
    assert_eq!(ids.len(), 3);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "<think>a");
    assert!(tokenizer.vocab_size() > id("</tool_response>") as usize);
}

#[test]
fn files_that_cannot_be_understood() {
    let good = std::fs::read(tiny_chat().join("tokenizer.json")).unwrap();
    assert!(Tokenizer::from_json(&good).is_ok());
    let mut wrong: Value = serde_json::from_slice(&good).unwrap();
    wrong["model"]["merges"][0] = json!(["no", "such pair"]);
    for bytes in [&b""[..], b"null", b"{\"a\": 1}", &good[..good.len() / 2], &serde_json::to_vec(&wrong).unwrap()] {
        let error = Tokenizer::from_json(bytes).unwrap_err();
        assert_eq!(error.status(), Status::InvalidModel);
        assert!(error.message().starts_with("tokenizer.json: "), "{}", error.message());
    }
}

/// Long runs of one character are where backtracking pre-tokenisers fail: nothing may be lost, and in a bounded time.
#[test]
fn long_runs_survive() {
    let mut file: Value = serde_json::from_slice(&std::fs::read(tiny_chat().join("tokenizer.json")).unwrap()).unwrap();
    // The splitting pattern that Llama 3 and Qwen share in kind, with its look-ahead.
    let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]});
    for tokenizer in [tiny(), Tokenizer::from_json(&serde_json::to_vec(&file).unwrap()).unwrap()] {
        for unit in [" ", "\n", "a", "é", "1", " \n", "a ", "!"] {
            let text = unit.repeat(300_000) + "end";
            let start = std::time::Instant::now();
            let ids = tokenizer.encode(&text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            assert!(start.elapsed().as_secs() < 30, "{unit:?} took {:?}", start.elapsed());
        }
    }
}
