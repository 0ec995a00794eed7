//! Rows of keys and values outside the pools: the memory that tiers pass between pools and files. Pure.

use std::ops::Range;
use std::sync::Arc;

/// Number format of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 16-bit brain floats.
    Bf16,
}

impl RowType {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            RowType::F32 => 4,
            RowType::F16 | RowType::Bf16 => 2,
        }
    }

    /// Its name in safetensors files.
    pub fn name(self) -> &'static str {
        match self {
            RowType::F32 => "F32",
            RowType::F16 => "F16",
            RowType::Bf16 => "BF16",
        }
    }
}

/// What a token stores in one layer; of a state, the two arrays that a layer with one keeps: what its convolution still sees,
/// and what its recurrence has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerRows {
    /// The layer's place in the model.
    pub layer: usize,
    /// Heads and width of keys.
    pub keys: (usize, usize),
    /// Heads and width of values.
    pub values: (usize, usize),
}

/// What a token stores in the layers of a cache group.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RowLayout {
    /// Number format of all rows; of a state, of what convolutions see.
    pub dtype: RowType,
    /// Of a state: the number format of recurrences. A state is the one row of the last token that it stands for.
    pub state: Option<RowType>,
    /// The group's layers, in the order of the model.
    pub layers: Vec<LayerRows>,
}

impl RowLayout {
    /// Bytes of a token's keys and of its values in the layer `at` of the group.
    pub fn row_bytes(&self, at: usize) -> (usize, usize) {
        let (LayerRows { keys, values, .. }, types) = (self.layers[at], self.types());
        (keys.0 * keys.1 * types.0.bytes(), values.0 * values.1 * types.1.bytes())
    }

    /// Number formats of keys and of values.
    pub fn types(&self) -> (RowType, RowType) {
        (self.dtype, self.state.unwrap_or(self.dtype))
    }

    /// What keys and values are called in files.
    pub fn names(&self) -> [&'static str; 2] {
        if self.is_state() { ["convolution", "recurrence"] } else { ["keys", "values"] }
    }

    /// Whether it is that of a state.
    pub fn is_state(&self) -> bool {
        self.state.is_some()
    }

    /// Bytes of a token in all layers.
    pub fn token_bytes(&self) -> usize {
        (0..self.layers.len()).map(|at| self.row_bytes(at)).map(|(keys, values)| keys + values).sum()
    }
}

/// What direct input and output asks of addresses, lengths and places in files.
pub const PAGE: usize = 16 * 1024;

/// Rows of consecutive tokens in all layers of a group: layer by layer keys `[tokens, heads, width]`, then values. They
/// begin at a page, behind room for a header; room for the tokens themselves (4 bytes each) and whole pages follow, so that
/// all of it is one run of memory that can be written to a file, and read from one, without another copy.
#[derive(Debug)]
pub struct RowBuffer {
    layout: Arc<RowLayout>,
    tokens: usize,
    memory: Vec<u8>,
    /// Where the first page begins in `memory`, and how many pages there are for the header.
    first: usize,
    head: usize,
}

impl RowBuffer {
    /// Rows of zeros, behind `head` bytes (rounded up to pages) for a header.
    pub fn new(layout: Arc<RowLayout>, tokens: usize, head: usize) -> Self {
        let head = head.next_multiple_of(PAGE);
        let pages = head + ((layout.token_bytes() + size_of::<u32>()) * tokens).next_multiple_of(PAGE);
        let memory = vec![0; pages + PAGE];
        let first = memory.as_ptr().align_offset(PAGE).min(PAGE);
        Self { layout, tokens, memory, first, head }
    }

    /// The same rows in memory of their own.
    pub fn copy(&self) -> Self {
        let mut copy = Self::new(Arc::clone(&self.layout), self.tokens, self.head);
        copy.pages_mut().copy_from_slice(self.pages());
        copy
    }

    /// What a token stores.
    pub fn layout(&self) -> &Arc<RowLayout> {
        &self.layout
    }

    /// Tokens that it has rows of.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Header, rows, room for the tokens, and what fills the last page: whole pages.
    pub fn pages(&self) -> &[u8] {
        &self.memory[self.first..self.first + self.pages_len()]
    }

    /// The same, to be filled.
    pub fn pages_mut(&mut self) -> &mut [u8] {
        let len = self.pages_len();
        &mut self.memory[self.first..self.first + len]
    }

    /// Bytes for the header.
    pub fn head(&self) -> usize {
        self.head
    }

    /// All rows, without header and filling.
    pub fn all_rows(&self) -> &[u8] {
        &self.pages()[self.head..self.head + self.layout.token_bytes() * self.tokens]
    }

    /// Keys and values of `tokens` in the layer `at` of the group.
    pub fn rows(&self, at: usize, tokens: Range<usize>) -> (&[u8], &[u8]) {
        let (keys, values) = self.places(at, tokens);
        (&self.pages()[keys], &self.pages()[values])
    }

    /// The same, to be filled.
    pub fn rows_mut(&mut self, at: usize, tokens: Range<usize>) -> (&mut [u8], &mut [u8]) {
        let (keys, values) = self.places(at, tokens);
        let (before, after) = self.pages_mut().split_at_mut(values.start);
        (&mut before[keys], &mut after[..values.len()])
    }

    fn places(&self, at: usize, tokens: Range<usize>) -> (Range<usize>, Range<usize>) {
        assert!(tokens.start <= tokens.end && tokens.end <= self.tokens, "rows that exist");
        let before: usize = (0..at).map(|at| self.layout.row_bytes(at)).map(|(keys, values)| keys + values).sum();
        let (keys, values) = self.layout.row_bytes(at);
        let key_rows = self.head + before * self.tokens;
        let value_rows = key_rows + keys * self.tokens;
        let range = |first: usize, bytes: usize| first + tokens.start * bytes..first + tokens.end * bytes;
        (range(key_rows, keys), range(value_rows, values))
    }

    fn pages_len(&self) -> usize {
        self.head + ((self.layout.token_bytes() + size_of::<u32>()) * self.tokens).next_multiple_of(PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lie_layer_by_layer_behind_the_header() {
        let layers = vec![
            LayerRows { layer: 0, keys: (2, 3), values: (2, 5) },
            LayerRows { layer: 4, keys: (1, 1), values: (1, 2) },
        ];
        let layout = Arc::new(RowLayout { dtype: RowType::Bf16, state: None, layers });
        assert_eq!(layout.token_bytes(), 2 * (6 + 10 + 1 + 2));
        let mut buffer = RowBuffer::new(Arc::clone(&layout), 3, 1);
        let mut fill = 1;
        for at in 0..2 {
            for token in 0..3 {
                let (keys, values) = buffer.rows_mut(at, token..token + 1);
                keys.fill(fill);
                values.fill(fill + 100);
                fill += 1;
            }
        }
        assert_eq!((buffer.head(), buffer.pages().len()), (PAGE, 2 * PAGE));
        assert_eq!(buffer.pages().as_ptr().align_offset(PAGE), 0);
        assert!(buffer.pages()[..PAGE].iter().all(|&byte| byte == 0));
        let mut expected = Vec::new();
        for (first, keys, values) in [(1, 12, 20), (4, 2, 4)] {
            (first..first + 3).for_each(|n: u8| expected.extend(vec![n; keys]));
            (first..first + 3).for_each(|n: u8| expected.extend(vec![n + 100; values]));
        }
        assert_eq!(buffer.all_rows(), expected);
        assert_eq!(buffer.rows(0, 1..3).0, [vec![2; 12], vec![3; 12]].concat());
        assert_eq!(buffer.rows(1, 0..1).1, [104; 4]);
    }
}
