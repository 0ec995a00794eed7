use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::text::tokenizer::tests::{llama_decoder, sentencepiece, tiny};

/// The pieces of a streamed decoding, the last one from `finish`.
fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(skip_special);
    let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(tokenizer, *id).unwrap().to_owned()).collect();
    pieces.push(detokenizer.finish(tokenizer).unwrap().to_owned());
    pieces
}

#[test]
fn half_characters_are_withheld() {
    let tokenizer = tiny();
    let ids = tokenizer.encode("🙂é", false).unwrap();
    assert!(ids.len() > 2, "the characters spread over several tokens");
    let pieces = stream(&tokenizer, &ids, false);
    assert_eq!(pieces.concat(), "🙂é");
    assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
    // Cut inside the character: U+FFFD comes from `finish`, or from the token that shows it cannot be completed.
    assert_eq!(stream(&tokenizer, &ids[..1], false).last().unwrap(), "\u{fffd}");
    let a = tokenizer.encode("a", false).unwrap()[0];
    assert_eq!(stream(&tokenizer, &[ids[0], a], false), ["", "\u{fffd}a", ""]);
}

#[test]
fn utf8_maximal_subparts() {
    // The cases of the Unicode standard, table 3-8 and following, as `String::from_utf8_lossy` treats them.
    let all: &[&[u8]] = &[
        b"\xc0\xaf\xe0\x80\xbf\xf0\x81\x82A",
        b"\xed\xa0\x80\xed\xbf\xbfA",
        b"\xf4\x91\x92\x93\xffA\x80\xbfB",
        b"\xe1\x80\xe2\xf0\x91\x92\xf1\xbfA",
    ];
    for bytes in all {
        for chunk in 1..=bytes.len() {
            let (mut assembler, mut out) = (Utf8Assembler::default(), String::new());
            bytes.chunks(chunk).for_each(|part| assembler.push(part, &mut out));
            assembler.finish(&mut out);
            assert_eq!(out, String::from_utf8_lossy(bytes));
        }
    }
}

#[test]
fn sentencepiece_spaces_and_byte_runs() {
    let tokenizer = sentencepiece(llama_decoder());
    let id = |token: &str| tokenizer.token_id(token).unwrap();
    let ids = [
        id("<s>"),
        id("▁hello"),
        id("▁wor"),
        id("ld"),
        id("<0xF0>"),
        id("<0x9F>"),
        id("<0x99>"),
        id("<0x82>"),
        id("▁"),
        id("</s>"),
    ];
    assert_eq!(stream(&tokenizer, &ids, true), ["", "hello", " wor", "ld", "", "", "", "🙂", " ", "", ""]);
    assert_eq!(stream(&tokenizer, &[id("▁"), id("▁▁"), id("a")], true), ["", "  ", "a", ""]);
    // An incomplete run before a normal token, and a valid character in an invalid run.
    assert_eq!(stream(&tokenizer, &[id("<0xE2>"), id("a")], true).concat(), "\u{fffd}a");
    assert_eq!(stream(&tokenizer, &[id("<0x41>"), id("<0xFF>")], true).concat(), "A\u{fffd}");
}

#[test]
fn metaspace_drops_the_first_mark_only() {
    let decoder = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
    let tokenizer = sentencepiece(decoder);
    let id = |token: &str| tokenizer.token_id(token).unwrap();
    assert_eq!(stream(&tokenizer, &[id("</s>"), id("▁hello"), id("▁wor")], true), ["", "hello", " wor", ""]);
}

#[test]
fn kept_special_tokens_stay() {
    let tokenizer = tiny();
    let ids = tokenizer.encode("<|im_start|>a<|im_end|>", false).unwrap();
    let kept = Arc::new(HashSet::from([tokenizer.token_id("<|im_end|>").unwrap()]));
    let mut detokenizer = Detokenizer::keeping(true, kept);
    let text: String = ids.iter().map(|id| detokenizer.push(&tokenizer, *id).unwrap().to_owned()).collect();
    assert_eq!(text, "a<|im_end|>");
    assert_eq!(stream(&tokenizer, &ids, true).concat(), "a");
}

#[test]
fn unknown_ids_give_nothing() {
    let tokenizer = tiny();
    assert_eq!(stream(&tokenizer, &[u32::MAX, 1 << 20], false).concat(), "");
    assert_eq!(tokenizer.decode(&[u32::MAX], false).unwrap(), "");
}

#[test]
fn a_long_sequence_costs_the_same_per_token() {
    for tokenizer in [tiny(), sentencepiece(llama_decoder()), sentencepiece(word_piece())] {
        let mut detokenizer = Detokenizer::new(false);
        let start = std::time::Instant::now();
        let mut length = 0;
        for step in 0..200_000u32 {
            length += detokenizer.push(&tokenizer, step % 250).unwrap().len();
        }
        // A quadratic method would take minutes.
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
        assert!(length > 200_000);
    }
}

/// A decoder without a streaming form here.
fn word_piece() -> serde_json::Value {
    json!({"type": "WordPiece", "prefix": "##", "cleanup": false})
}

/// Texts that byte pieces can cut anywhere.
fn texts() -> impl Strategy<Value = String> {
    prop::collection::vec(prop_oneof!["[a-z ]{0,5}", "[àéü日本🙂👩‍👧\n]{0,3}", Just("<|im_end|>".to_owned())], 0..8)
        .prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn byte_level_streams_like_the_whole(ids in prop::collection::vec(0u32..3000, 0..40), skip: bool) {
        let tokenizer = shared_tiny();
        let whole = tokenizer.decode_whole(&ids, skip).unwrap();
        prop_assert_eq!(&stream(tokenizer, &ids, skip).concat(), &whole);
        prop_assert_eq!(tokenizer.decode(&ids, skip).unwrap(), whole);
    }

    #[test]
    fn valid_text_never_shows_a_replacement(text in texts()) {
        let tokenizer = shared_tiny();
        let pieces = stream(tokenizer, &tokenizer.encode(&text, false).unwrap(), false);
        prop_assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
        prop_assert_eq!(pieces.concat(), text);
    }

    #[test]
    fn sentencepiece_streams_like_the_whole(text in texts(), cut in 0usize..20, skip: bool) {
        let tokenizer = shared_sentencepiece();
        let mut ids = tokenizer.encode(&text, true).unwrap();
        ids.drain(..cut.min(ids.len()));
        let joined = stream(tokenizer, &ids, skip).concat();
        prop_assert_eq!(&joined, &tokenizer.decode(&ids, skip).unwrap());
        // The one documented difference from `tokenizers`: invalid runs of byte tokens.
        let whole = tokenizer.decode_whole(&ids, skip).unwrap();
        if !whole.contains('\u{fffd}') {
            prop_assert_eq!(joined, whole);
        }
    }

    #[test]
    fn any_sentencepiece_ids(ids in prop::collection::vec(0u32..270, 0..30), skip: bool) {
        let tokenizer = shared_sentencepiece();
        let joined = stream(tokenizer, &ids, skip).concat();
        let whole = tokenizer.decode_whole(&ids, skip).unwrap();
        prop_assert_eq!(&joined, &tokenizer.decode(&ids, skip).unwrap());
        prop_assert!(joined == whole || whole.contains('\u{fffd}'), "{joined:?} {whole:?}");
    }

    #[test]
    fn other_decoders_stream_like_the_whole(ids in prop::collection::vec(259u32..268, 0..30)) {
        let tokenizer = shared_word_piece();
        prop_assert_eq!(stream(tokenizer, &ids, false).concat(), tokenizer.decode(&ids, false).unwrap());
    }
}

macro_rules! shared {
    ($name:ident, $make:expr) => {
        fn $name() -> &'static Tokenizer {
            static SHARED: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
            SHARED.get_or_init(|| $make)
        }
    };
}

shared!(shared_tiny, tiny());
shared!(shared_sentencepiece, sentencepiece(llama_decoder()));
shared!(shared_word_piece, sentencepiece(word_piece()));
