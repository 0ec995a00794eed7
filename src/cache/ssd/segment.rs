//! Segments: one span of tokens with its rows in one safetensors file. `FORMAT.md` beside this file says what each byte is.

use std::fmt::Write;
use std::ops::Range;
use std::sync::Arc;

use serde::Deserialize;

use super::Codec;
use crate::cache::prefix::{BlockKey, chain_key};
use crate::cache::rows::{PAGE, RowBuffer, RowLayout};
use crate::cache::spans::Span;

/// Begins every segment of this version, behind the 8 bytes of the header's length.
const OPENING: &str = r#"{"__metadata__":{"format":"omlx.kv","version":"1","header":""#;
/// Between the checksum of the header and that of the data.
const BETWEEN: &str = r#"","data":""#;
/// Where the checksum of the header is: 64 hexadecimal digits.
const HEADER_SUM: Range<usize> = 8 + OPENING.len()..8 + OPENING.len() + 64;
/// Where the checksum of the data is.
const DATA_SUM: Range<usize> = HEADER_SUM.end + BETWEEN.len()..HEADER_SUM.end + BETWEEN.len() + 64;

/// The longest model name that is written, in bytes.
pub const MAX_NAME: usize = 256;
/// The largest header that is read: far more than any model needs.
const MAX_HEAD: usize = 4 << 20;

/// Names a segment: the same span of the same model, in the same codec, has the same name in every process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName(pub [u8; 16]);

/// Everything about a segment but its rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// What the rows depend on: model, options, namespace.
    pub fingerprint: [u8; 32],
    /// The cache group.
    pub group: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// How the rows are written.
    pub codec: Codec,
    /// Which tokens.
    pub span: Span,
    /// Seconds that it took to compute the rows.
    pub cost: f64,
    /// The model's name, for people.
    pub model: Arc<str>,
}

/// Why a file is not the segment that it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    /// Its beginning is not that of a segment.
    #[error("it is not a segment of this version")]
    Foreign,
    /// The header's checksum is another.
    #[error("its header is damaged")]
    Header,
    /// The checksum of what follows the header is another.
    #[error("its data is damaged")]
    Data,
    /// Its length is another.
    #[error("its length is not the one that its header asks for")]
    Length,
    /// Another model, layout, group or place, or other tokens.
    #[error("it belongs to another model or to other tokens")]
    Other,
}

impl SegmentName {
    /// The name of a segment whose tokens end with the key `end`.
    pub fn new(segment: &Segment, end: &BlockKey) -> Self {
        // The keys stand for fingerprint, group and all tokens; both ends, since spans of other lengths can end there too.
        let words = [segment.block_tokens as u32, segment.codec as u32];
        let key = chain_key(&chain_key(&segment.span.parent, &words), &tokens_of(end));
        let mut name = [0; 16];
        name.copy_from_slice(&key[..16]);
        Self(name)
    }

    /// Its folder.
    pub fn folder(self) -> String {
        format!("segments/{:02x}", self.0[0])
    }

    /// Its file.
    pub fn file(self) -> String {
        format!("{}/{}.safetensors", self.folder(), hex(&self.0))
    }

    /// The file while it is being written.
    pub fn temporary(self) -> String {
        format!("{}/{}.tmp", self.folder(), hex(&self.0))
    }

    /// The segment that a file of this name has.
    pub fn parse(file: &str) -> Option<Self> {
        unhex(file.strip_suffix(".safetensors")?).map(Self)
    }
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The bytes that lower-case hexadecimal digits stand for.
pub fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// A tensor of a segment, in the order of the file.
struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
}

/// All tensors of a segment with `tokens` tokens but for what fills the last page.
fn tensors(layout: &RowLayout, tokens: usize, codec: Codec) -> Vec<Tensor> {
    let mut all = Vec::with_capacity(4 * layout.layers.len() + 1);
    for rows in &layout.layers {
        let ([keys, values], types) = (layout.names(), layout.types());
        for (what, dtype, (heads, width)) in [(keys, types.0, rows.keys), (values, types.1, rows.values)] {
            let name = format!("layers.{}.{what}", rows.layer);
            let (shape, numbers) = (vec![tokens, heads, width], tokens * heads * width);
            match codec {
                Codec::Exact => {
                    let bytes = numbers * dtype.bytes();
                    all.push(Tensor { name, dtype: dtype.name(), shape, bytes });
                }
                Codec::Bits8 => {
                    let scales = format!("{name}.scales");
                    all.push(Tensor { name, dtype: "I8", shape, bytes: numbers });
                    let (shape, bytes) = (vec![tokens, heads], tokens * heads * size_of::<f32>());
                    all.push(Tensor { name: scales, dtype: "F32", shape, bytes });
                }
            }
        }
    }
    let (name, shape, bytes) = ("tokens".to_owned(), vec![tokens], tokens * size_of::<u32>());
    all.push(Tensor { name, dtype: "I32", shape, bytes });
    all
}

/// Bytes of a segment's header, whole pages: enough for any number of tokens and any name.
pub fn head_bytes(layout: &RowLayout) -> usize {
    head_bytes_in(layout, Codec::Exact)
}

/// The same in any codec.
pub fn head_bytes_in(layout: &RowLayout, codec: Codec) -> usize {
    // A tensor's text around its name, with three dimensions and two offsets of 20 digits each; metadata around a name
    // that takes up to six bytes for each of its own in JSON.
    const TENSOR: usize = 64 + 5 * 20;
    const METADATA: usize = 1024;
    let tensors = tensors(layout, 1, codec);
    let names: usize = tensors.iter().map(|tensor| tensor.name.len() + TENSOR).sum();
    (names + METADATA + 6 * MAX_NAME + TENSOR).next_multiple_of(PAGE)
}

/// Bytes of the data behind the header, without and with what fills the last page.
pub fn data_bytes(layout: &RowLayout, tokens: usize, codec: Codec) -> (usize, usize) {
    let used = tensors(layout, tokens, codec).iter().map(|tensor| tensor.bytes).sum::<usize>();
    (used, used.next_multiple_of(PAGE))
}

/// Bytes of a whole file.
pub fn file_bytes(layout: &RowLayout, tokens: usize, codec: Codec) -> u64 {
    (head_bytes_in(layout, codec) + data_bytes(layout, tokens, codec).1) as u64
}

impl Segment {
    /// The key of all tokens up to its end.
    pub fn end(&self) -> BlockKey {
        self.span.key(self.block_tokens)
    }

    /// The header of its file, whose data has the checksum `data`.
    pub fn head(&self, layout: &RowLayout, data: &str) -> Vec<u8> {
        let tokens = self.span.tokens.len();
        let mut text = format!("{OPENING}{}{BETWEEN}{data}\"", "0".repeat(64));
        let strings = [
            ("fingerprint", hex(&self.fingerprint)),
            ("group", self.group.to_string()),
            ("parent", hex(&self.span.parent)),
            ("start", self.span.start.to_string()),
            ("block_tokens", self.block_tokens.to_string()),
            ("codec", self.codec.name().to_owned()),
            ("cost", format!("{:e}", self.cost)),
        ];
        for (key, value) in strings {
            let _ = write!(text, ",\"{key}\":\"{value}\"");
        }
        let model = serde_json::Value::from(clip(&self.model));
        let _ = write!(text, ",\"model\":{model}}}");
        let mut offset = 0;
        let mut add = |Tensor { name, dtype, shape, bytes }: Tensor| {
            let end = offset + bytes;
            let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
            let _ = write!(
                text,
                ",\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":[{shape}],\"data_offsets\":[{offset},{end}]}}"
            );
            offset = end;
        };
        tensors(layout, tokens, self.codec).into_iter().for_each(&mut add);
        let (used, whole) = data_bytes(layout, tokens, self.codec);
        if used < whole {
            let bytes = whole - used;
            add(Tensor { name: "_pad.0".to_owned(), dtype: "U8", shape: vec![bytes], bytes });
        }
        text.push('}');
        let mut head = vec![b' '; head_bytes_in(layout, self.codec)];
        let length = (head.len() - 8) as u64;
        head[..8].copy_from_slice(&length.to_le_bytes());
        head[8..8 + text.len()].copy_from_slice(text.as_bytes());
        let sum = blake3::hash(&head).to_hex();
        head[HEADER_SUM].copy_from_slice(sum.as_bytes());
        head
    }

    /// Fills in the pages of a file around its rows: header, tokens, zeros up to the end.
    pub fn finish(&self, layout: &RowLayout, pages: &mut [u8]) {
        let head = head_bytes_in(layout, self.codec);
        let tokens = data_bytes(layout, self.span.tokens.len(), self.codec).0 - 4 * self.span.tokens.len();
        let (room, data) = pages.split_at_mut(head);
        let tail = &mut data[tokens..];
        tail.fill(0);
        for (bytes, token) in tail.chunks_exact_mut(4).zip(self.span.tokens.iter()) {
            bytes.copy_from_slice(&token.to_le_bytes());
        }
        let sum = blake3::hash(data).to_hex();
        room.copy_from_slice(&self.head(layout, &sum));
    }

    /// Whether `pages` are this segment, byte for byte but for the rows, which only have to agree with their checksum.
    pub fn verify(&self, layout: &RowLayout, pages: &[u8]) -> Result<(), Defect> {
        let (head, data) = pages.split_at_checked(head_bytes_in(layout, self.codec)).ok_or(Defect::Length)?;
        let sum = std::str::from_utf8(&head[DATA_SUM]).map_err(|_| Defect::Foreign)?;
        if head != self.head(layout, sum) {
            // The same rows may have been written again with another cost or under another name of the model.
            let Segment { cost, model, .. } = Head::parse(head)?.segment;
            if head != (Segment { cost, model, ..self.clone() }).head(layout, sum) {
                return Err(Defect::Other);
            }
        }
        if blake3::hash(data).to_hex().as_str() != sum {
            return Err(Defect::Data);
        }
        let tokens = data_bytes(layout, self.span.tokens.len(), self.codec).0 - 4 * self.span.tokens.len();
        if tokens_of(&data[tokens..][..4 * self.span.tokens.len()]) != *self.span.tokens {
            return Err(Defect::Other);
        }
        Ok(())
    }
}

/// A name as it is written: short enough for the room in the header.
pub fn clip(name: &str) -> &str {
    &name[..name.floor_char_boundary(MAX_NAME)]
}

/// Tokens as a file has them.
pub fn tokens_of(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|token| u32::from_le_bytes([token[0], token[1], token[2], token[3]])).collect()
}

/// What the header of a file says, without knowing the model.
#[derive(Debug)]
pub struct Head {
    /// Everything but the tokens, which are empty.
    pub segment: Segment,
    /// Where the tokens are in the file.
    pub tokens: Range<u64>,
    /// Bytes of the file.
    pub bytes: u64,
}

#[derive(Deserialize)]
struct Json {
    #[serde(rename = "__metadata__")]
    metadata: Metadata,
    tokens: Place,
    #[serde(rename = "_pad.0")]
    pad: Option<Place>,
}

#[derive(Deserialize)]
struct Metadata {
    fingerprint: String,
    group: String,
    parent: String,
    start: String,
    block_tokens: String,
    codec: String,
    cost: String,
    model: String,
}

#[derive(Deserialize)]
struct Place {
    data_offsets: (u64, u64),
}

impl Head {
    /// How many bytes a file's header takes, from its first 8 bytes.
    pub fn length(first: [u8; 8]) -> Result<usize, Defect> {
        let length = u64::from_le_bytes(first).saturating_add(8);
        let length = usize::try_from(length).map_err(|_| Defect::Foreign)?;
        if length > MAX_HEAD || length % PAGE != 0 { Err(Defect::Foreign) } else { Ok(length) }
    }

    /// Reads a whole header.
    pub fn parse(head: &[u8]) -> Result<Self, Defect> {
        if head.get(8..8 + OPENING.len()) != Some(OPENING.as_bytes()) || head.len() < DATA_SUM.end {
            return Err(Defect::Foreign);
        }
        let mut plain = head.to_vec();
        plain[HEADER_SUM].fill(b'0');
        if blake3::hash(&plain).to_hex().as_bytes() != &head[HEADER_SUM] {
            return Err(Defect::Header);
        }
        // What follows has been written by this code: a defect here is that of another version.
        Self::fields(head).ok_or(Defect::Foreign)
    }

    fn fields(head: &[u8]) -> Option<Self> {
        let Json { metadata, tokens, pad } = serde_json::from_slice(&head[8..]).ok()?;
        let span =
            Span { parent: unhex(&metadata.parent)?, start: metadata.start.parse().ok()?, tokens: Arc::from([]) };
        let segment = Segment {
            fingerprint: unhex(&metadata.fingerprint)?,
            group: metadata.group.parse().ok()?,
            block_tokens: metadata.block_tokens.parse().ok().filter(|&tokens| tokens > 0)?,
            codec: Codec::parse(&metadata.codec)?,
            span,
            cost: metadata.cost.parse().ok()?,
            model: metadata.model.into(),
        };
        let (first, end) = tokens.data_offsets;
        let data = head.len() as u64;
        let bytes = data.checked_add(pad.map_or(end, |pad| pad.data_offsets.1))?;
        let tokens = data.checked_add(first)?..data.checked_add(end)?;
        (tokens.start < tokens.end && tokens.end <= bytes).then_some(Self { segment, tokens, bytes })
    }
}

/// Empty rows for a segment of `tokens` tokens, with room for its header.
pub fn row_buffer(layout: &Arc<RowLayout>, tokens: usize) -> RowBuffer {
    RowBuffer::new(Arc::clone(layout), tokens, head_bytes(layout))
}
