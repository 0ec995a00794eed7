//! How the tokens of a vocabulary turn back into bytes, read from the `decoder` of `tokenizer.json`.
//!
//! Two families cover generating models and are decoded token by token here, which makes streaming exact: byte-level
//! vocabularies (GPT-2, Llama 3, Qwen) and SentencePiece ones (Llama 2, Mistral, Gemma). Every other decoder is left to
//! the `tokenizers` crate.

use std::sync::OnceLock;

use serde_json::Value;

/// The decoder of a vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Decoding {
    /// Each character of a token stands for one byte.
    ByteLevel,
    /// SentencePiece: a few rewriting steps per token, perhaps byte tokens.
    Pieces(Pieces),
    /// No decoder: tokens joined by spaces.
    Words,
    /// Anything else; only whole sequences can be decoded.
    Other,
}

/// The steps of a SentencePiece decoder, in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Pieces {
    steps: Vec<Step>,
    /// Tokens `<0x00>` to `<0xFF>` are single bytes.
    byte_fallback: bool,
    /// Up to so many of this character are removed from the start of the text.
    pub(super) strip_start: Option<(char, usize)>,
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Replace { from: String, to: String },
    Metaspace { mark: char, drop_first: bool },
}

/// A token after its steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    Byte(u8),
    Text(String),
}

impl Decoding {
    /// From the `decoder` entry of `tokenizer.json` (null or absent if there is none).
    pub(super) fn parse(decoder: &Value) -> Self {
        if decoder.is_null() {
            return Self::Words;
        }
        let single = std::slice::from_ref(decoder);
        let list = match kind(decoder) {
            "Sequence" => decoder["decoders"].as_array().map_or(single, Vec::as_slice),
            _ => single,
        };
        match list {
            [first, rest @ ..] if kind(first) == "ByteLevel" && rest.iter().all(|d| kind(d) == "Fuse") => {
                Self::ByteLevel
            }
            list => Pieces::parse(list).map_or(Self::Other, Self::Pieces),
        }
    }
}

impl Pieces {
    /// `[Replace | Metaspace]* ByteFallback? Fuse? Strip?`, the last only on the fused text; `None` for anything else.
    fn parse(list: &[Value]) -> Option<Self> {
        let mut pieces = Self::default();
        let mut fused = false;
        for decoder in list {
            let text_steps_done = fused || pieces.byte_fallback;
            match kind(decoder) {
                "Replace" if !text_steps_done => pieces.steps.push(Step::Replace {
                    from: decoder["pattern"]["String"].as_str().filter(|s| !s.is_empty())?.to_owned(),
                    to: decoder["content"].as_str()?.to_owned(),
                }),
                "Metaspace" if !text_steps_done => pieces.steps.push(Step::Metaspace {
                    mark: single_char(&decoder["replacement"])?,
                    drop_first: decoder["prepend_scheme"].as_str() != Some("never"),
                }),
                "ByteFallback" if !text_steps_done => pieces.byte_fallback = true,
                "Fuse" => fused = true,
                "Strip" if fused && pieces.strip_start.is_none() && decoder["stop"].as_u64() == Some(0) => {
                    let count = usize::try_from(decoder["start"].as_u64()?).ok()?;
                    pieces.strip_start = Some((single_char(&decoder["content"])?, count));
                }
                _ => return None,
            }
        }
        (!pieces.steps.is_empty() || pieces.byte_fallback).then_some(pieces)
    }

    /// One token; `first` if it is the first of the text (Metaspace drops the word marks there).
    pub(super) fn piece(&self, token: &str, first: bool) -> Piece {
        let mut text = token.to_owned();
        for step in &self.steps {
            text = match step {
                Step::Replace { from, to } => text.replace(from, to),
                Step::Metaspace { mark, drop_first: true } if first => text.replace(*mark, ""),
                Step::Metaspace { mark, .. } => text.replace(*mark, " "),
            };
        }
        match byte_token(&text) {
            Some(byte) if self.byte_fallback => Piece::Byte(byte),
            _ => Piece::Text(text),
        }
    }
}

/// The bytes of a byte-level token. A token with any character outside the byte alphabet is taken literally, as the
/// decoder of `tokenizers` does (added tokens may hold such characters).
pub(super) fn byte_level(token: &str) -> Vec<u8> {
    let table = byte_alphabet();
    let bytes: Option<Vec<u8>> =
        token.chars().map(|c| table.get(c as usize).copied().flatten().map(|b| b as u8)).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// GPT-2's byte alphabet, indexed by character: printable Latin-1 stands for itself, the 68 other bytes are U+0100
/// onward in order (`bytes_to_unicode` of the GPT-2 encoder).
fn byte_alphabet() -> &'static [Option<u16>; 0x144] {
    static TABLE: OnceLock<[Option<u16>; 0x144]> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = [None; 0x144];
        let mut next = 0x100;
        for byte in 0..=255u16 {
            let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
            let place = if printable { usize::from(byte) } else { next };
            next += usize::from(!printable);
            table[place] = Some(byte);
        }
        table
    })
}

/// The byte of a SentencePiece byte token such as `<0xE2>`.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

fn kind(decoder: &Value) -> &str {
    decoder["type"].as_str().unwrap_or_default()
}

fn single_char(value: &Value) -> Option<char> {
    let mut chars = value.as_str()?.chars();
    chars.next().filter(|_| chars.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let mut seen = [false; 256];
        for byte in byte_alphabet().iter().flatten() {
            assert!(!std::mem::replace(&mut seen[usize::from(*byte)], true));
        }
        assert!(seen.iter().all(|s| *s));
        assert_eq!(byte_level("ĠaĊ"), b" a\n");
        assert_eq!(byte_level("<｜end｜>"), "<｜end｜>".as_bytes());
    }

    #[test]
    fn families() {
        let llama = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let Decoding::Pieces(pieces) = Decoding::parse(&llama) else { panic!() };
        assert_eq!(pieces.strip_start, Some((' ', 1)));
        assert_eq!(pieces.piece("▁a", true), Piece::Text(" a".into()));
        assert_eq!(pieces.piece("<0xE2>", false), Piece::Byte(0xe2));
        assert_eq!(pieces.piece("<0xE>", false), Piece::Text("<0xE>".into()));

        let t5 = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let Decoding::Pieces(pieces) = Decoding::parse(&t5) else { panic!() };
        assert_eq!(pieces.piece("▁a", true), Piece::Text("a".into()));
        assert_eq!(pieces.piece("▁a", false), Piece::Text(" a".into()));

        assert_eq!(Decoding::parse(&json!({"type": "ByteLevel"})), Decoding::ByteLevel);
        assert_eq!(Decoding::parse(&json!({"type": "WordPiece", "prefix": "##", "cleanup": true})), Decoding::Other);
        assert_eq!(Decoding::parse(&Value::Null), Decoding::Words);
    }
}
