//! Spans: runs of tokens whose rows were stored outside the pools, and the index that finds them by their tokens. Pure.
//!
//! The hot and the cold tier keep rows in spans; this is what both know of them. A span has whole blocks, or a single
//! incomplete one (the end of a prompt or of an answer), which goes when a longer block that begins with it comes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::prefix::{BlockKey, chain_key};

/// Names a span within a tier; never reused.
pub type SpanId = u64;

/// Which tokens a span has rows of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Key of the tokens before it; the key of the model and cache group if there are none.
    pub parent: BlockKey,
    /// How many tokens are before it: a multiple of the block size, but for states.
    pub start: usize,
    /// Its tokens: whole blocks, or fewer tokens than one; of a state the last one that it stands for.
    pub tokens: Arc<[u32]>,
}

/// A part of a stored span that a sequence can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Which span.
    pub span: SpanId,
    /// Position of its first useful token in the sequence: a multiple of the block size, but for states.
    pub position: usize,
    /// Tokens of the span before that.
    pub skip: usize,
    /// Useful tokens.
    pub tokens: usize,
}

/// Finds spans by tokens, which are compared as they are: no hash is taken for them.
#[derive(Debug)]
pub struct SpanIndex {
    block_tokens: usize,
    /// Every block of every span. Blocks with the same parent are neighbours, in the order of their tokens.
    blocks: BTreeMap<Edge, Place>,
    /// Spans of one token, by how many tokens are before it: among them are all states.
    singles: BTreeMap<usize, BTreeSet<SpanId>>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Edge {
    parent: BlockKey,
    tokens: Arc<[u32]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    span: SpanId,
    /// Tokens of the span before the block.
    offset: usize,
}

/// The key before all tokens of a cache group: what `model` stands for is all that its rows depend on.
pub fn root_key(model: &[u8; 32], group: usize) -> BlockKey {
    chain_key(model, &[group as u32])
}

impl Span {
    /// Its blocks, each with the key of the tokens before it and the number of the span's tokens before it.
    fn blocks(&self, block_tokens: usize) -> impl Iterator<Item = (Edge, usize)> {
        let mut parent = self.parent;
        self.tokens.chunks(block_tokens).enumerate().map(move |(at, tokens)| {
            let edge = Edge { parent, tokens: tokens.into() };
            parent = chain_key(&parent, tokens);
            (edge, at * block_tokens)
        })
    }

    /// The key of all tokens up to its end.
    pub fn key(&self, block_tokens: usize) -> BlockKey {
        self.tokens.chunks(block_tokens).fold(self.parent, |key, tokens| chain_key(&key, tokens))
    }
}

impl SpanIndex {
    /// Without spans, whose blocks have `block_tokens` tokens.
    pub fn new(block_tokens: usize) -> Self {
        Self { block_tokens, blocks: BTreeMap::new(), singles: BTreeMap::new() }
    }

    /// What follows the first `from` of `tokens` (whole blocks) without a gap: pieces in order, the last one perhaps with
    /// a part of its last block. `root` is the key before all tokens.
    pub fn find(&self, root: &BlockKey, tokens: &[u32], from: usize) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut position = from.min(tokens.len()) / self.block_tokens * self.block_tokens;
        let before = tokens[..position].chunks(self.block_tokens);
        let mut key = before.fold(*root, |key, tokens| chain_key(&key, tokens));
        loop {
            let block = &tokens[position..tokens.len().min(position + self.block_tokens)];
            let Some((place, common)) = self.closest(&key, block) else { return pieces };
            match pieces.last_mut() {
                Some(piece) if piece.span == place.span && piece.skip + piece.tokens == place.offset => {
                    piece.tokens += common;
                }
                _ => pieces.push(Piece { span: place.span, position, skip: place.offset, tokens: common }),
            }
            if common < self.block_tokens {
                return pieces;
            }
            key = chain_key(&key, block);
            position += self.block_tokens;
        }
    }

    /// The longest beginning of `tokens`, of more than `from` of them, whose last token is a span by itself: that of a state,
    /// which stands for all tokens before it, too.
    pub fn find_state(&self, root: &BlockKey, tokens: &[u32], from: usize) -> Option<Piece> {
        let mut singles = self.singles.range(from.min(tokens.len())..tokens.len()).rev().peekable();
        singles.peek()?;
        // Before each block.
        let mut keys = vec![*root];
        for block in tokens.chunks_exact(self.block_tokens) {
            keys.push(chain_key(&keys[keys.len() - 1], block));
        }
        singles.find_map(|(&last, _)| {
            let before = &tokens[last / self.block_tokens * self.block_tokens..last];
            let key = keys[last / self.block_tokens];
            let parent = if before.is_empty() { key } else { chain_key(&key, before) };
            let place = self.blocks.get(&Edge { parent, tokens: [tokens[last]].into() })?;
            Some(Piece { span: place.span, position: last, skip: place.offset, tokens: 1 })
        })
    }

    /// The block behind `parent` that begins with most of `tokens`, and with how many: more than none.
    fn closest(&self, parent: &BlockKey, tokens: &[u32]) -> Option<(Place, usize)> {
        let wanted = Edge { parent: *parent, tokens: tokens.into() };
        // Whatever shares most with `tokens` is a neighbour of their place in the order.
        let before = self.blocks.range(..=&wanted).next_back();
        let after = self.blocks.range(&wanted..).next();
        let sibling = |found: &(&Edge, &Place)| found.0.parent == *parent;
        let common = |(edge, place): (&Edge, &Place)| {
            (*place, edge.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count())
        };
        let best = before.into_iter().chain(after).filter(sibling).map(common).max_by_key(|&(_, common)| common);
        best.filter(|&(_, common)| common > 0)
    }

    /// Whether anything that is stored behind the first `at` of `tokens` (whole blocks) agrees with the rest of them, as far
    /// as both go; `None` if nothing is stored there.
    pub fn agrees_behind(&self, root: &BlockKey, tokens: &[u32], at: usize) -> Option<bool> {
        let key = tokens[..at].chunks(self.block_tokens).fold(*root, |key, tokens| chain_key(&key, tokens));
        let mut children = self.children(key).peekable();
        children.peek()?;
        Some(children.any(|(edge, _)| edge.tokens.iter().zip(&tokens[at..]).all(|(one, other)| one == other)))
    }

    /// Blocks behind a key.
    fn children(&self, key: BlockKey) -> impl Iterator<Item = (&Edge, &Place)> {
        let first = Edge { parent: key, tokens: Arc::from([]) };
        self.blocks.range(first..).take_while(move |(edge, _)| edge.parent == key)
    }

    /// How many of the span's tokens are there already, from its beginning.
    pub fn held(&self, span: &Span) -> usize {
        let mut held = 0;
        for (edge, offset) in span.blocks(self.block_tokens) {
            let common = self.closest(&edge.parent, &edge.tokens).map_or(0, |(_, common)| common);
            held = offset + common;
            if common < self.block_tokens {
                break;
            }
        }
        held
    }

    /// Adds a span; a block that is there already stays with the span that has it. Returns the incomplete blocks that it
    /// makes useless: their spans can go.
    pub fn insert(&mut self, id: SpanId, span: &Span) -> Vec<SpanId> {
        let mut useless = Vec::new();
        self.note(id, span);
        for (edge, offset) in span.blocks(self.block_tokens) {
            while let Some((shorter, place)) = self.blocks.range(..&edge).next_back() {
                if shorter.parent != edge.parent || !edge.tokens.starts_with(&shorter.tokens) {
                    break;
                }
                useless.push(place.span);
                let shorter = shorter.clone();
                self.blocks.remove(&shorter);
            }
            self.blocks.entry(edge).or_insert(Place { span: id, offset });
        }
        useless
    }

    fn note(&mut self, id: SpanId, span: &Span) {
        if span.tokens.len() == 1 {
            self.singles.entry(span.start).or_default().insert(id);
        }
    }

    /// Adds many spans to an empty index, in a fraction of the time of one after the other. Of spans with the same block
    /// the first one has it. Returns the spans of incomplete blocks that longer ones make useless.
    pub fn fill<'a>(&mut self, spans: impl Iterator<Item = (SpanId, &'a Span)>) -> Vec<SpanId> {
        let mut blocks: Vec<(Edge, Place)> = Vec::new();
        for (id, span) in spans {
            self.note(id, span);
            blocks.extend(span.blocks(self.block_tokens).map(|(edge, offset)| (edge, Place { span: id, offset })));
        }
        blocks.sort_by(|(one, _), (other, _)| one.cmp(other));
        blocks.dedup_by(|(later, _), (first, _)| later == first);
        // A block that begins with another one comes right behind it.
        let follows = |one: &Edge, next: &Edge| next.parent == one.parent && next.tokens.starts_with(&one.tokens);
        let longer = |at: usize| blocks.get(at + 1).is_some_and(|next: &(Edge, Place)| follows(&blocks[at].0, &next.0));
        let useless: Vec<bool> = (0..blocks.len()).map(longer).collect();
        let (gone, kept): (Vec<_>, Vec<_>) = blocks.into_iter().zip(useless).partition(|(_, useless)| *useless);
        self.blocks = kept.into_iter().map(|(block, _)| block).collect();
        gone.into_iter().map(|((_, place), _)| place.span).collect()
    }

    /// Removes a span.
    pub fn remove(&mut self, id: SpanId, span: &Span) {
        if let Some(ids) = self.singles.get_mut(&span.start) {
            ids.remove(&id);
            if ids.is_empty() {
                self.singles.remove(&span.start);
            }
        }
        for (edge, offset) in span.blocks(self.block_tokens) {
            if self.blocks.get(&edge) == Some(&Place { span: id, offset }) {
                self.blocks.remove(&edge);
            }
        }
    }

    /// Other spans that go on from blocks of this one, each with the key of the tokens before it.
    pub fn followers(&self, id: SpanId, span: &Span) -> impl Iterator<Item = (BlockKey, SpanId)> {
        // A block that another span has too is not missed there.
        let own =
            move |(edge, offset): &(Edge, usize)| self.blocks.get(edge) == Some(&Place { span: id, offset: *offset });
        span.blocks(self.block_tokens).filter(own).flat_map(move |(edge, _)| {
            let key = chain_key(&edge.parent, &edge.tokens);
            self.children(key).map(move |(_, place)| (key, place.span)).filter(move |&(_, span)| span != id)
        })
    }

    /// Whether no other span goes on from a block of this one: it can go without making others useless.
    pub fn is_leaf(&self, id: SpanId, span: &Span) -> bool {
        self.followers(id, span).next().is_none()
    }

    /// Blocks of all spans.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there is no span.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: BlockKey = [7; 32];

    fn span(prefix: &[u32], tokens: &[u32]) -> Span {
        let parent = prefix.chunks(4).fold(ROOT, |key, tokens| chain_key(&key, tokens));
        Span { parent, start: prefix.len(), tokens: tokens.into() }
    }

    #[test]
    fn spans_are_found_by_their_tokens() {
        let mut index = SpanIndex::new(4);
        let first: Vec<u32> = (0..12).collect();
        assert!(index.insert(1, &span(&[], &first)).is_empty());
        assert!(index.insert(2, &span(&first, &[12, 13])).is_empty());
        let piece = |span, position, skip, tokens| Piece { span, position, skip, tokens };
        let all: Vec<u32> = (0..20).collect();
        assert_eq!(index.find(&ROOT, &all, 0), [piece(1, 0, 0, 12), piece(2, 12, 0, 2)]);
        assert_eq!(index.find(&ROOT, &all, 8), [piece(1, 8, 8, 4), piece(2, 12, 0, 2)]);
        assert_eq!(index.find(&ROOT, &all[..6], 0), [piece(1, 0, 0, 6)]);
        assert_eq!(index.find(&ROOT, &[0, 1, 2, 3, 4, 9, 9, 9, 9], 0), [piece(1, 0, 0, 5)]);
        assert_eq!(index.find(&ROOT, &[1], 0), []);
        assert_eq!(index.find(&[8; 32], &all, 0), [], "another model");
        // Another way on from the middle of a span.
        index.insert(3, &span(&first[..8], &[50, 51, 52, 53]));
        assert_eq!(
            index.find(&ROOT, &[&first[..8], &[50, 51, 52, 53]].concat(), 0),
            [piece(1, 0, 0, 8), piece(3, 8, 0, 4)]
        );
        assert_eq!(index.held(&span(&[], &all)), 14);
        assert_eq!(index.held(&span(&first, &[12])), 1);
        assert_eq!(index.held(&span(&first, &[13])), 0);
    }

    #[test]
    fn states_are_found_by_all_tokens_that_they_stand_for() {
        let mut index = SpanIndex::new(4);
        let all: Vec<u32> = (0..20).collect();
        assert_eq!(index.find_state(&ROOT, &all, 0), None);
        let ends = [3, 4, 10, 12];
        for (id, end) in (1..).zip(ends) {
            assert!(index.insert(id, &span(&all[..end - 1], &all[end - 1..end])).is_empty());
        }
        let found = |tokens: &[u32], from| index.find_state(&ROOT, tokens, from).map(|piece| piece.position + 1);
        let longest = |tokens: usize| ends.into_iter().filter(|&end| end <= tokens).max();
        for tokens in 0..20 {
            assert_eq!(found(&all[..tokens], 0), longest(tokens), "{tokens}");
            assert_eq!(found(&all[..tokens], 9), longest(tokens).filter(|&end| end > 9), "{tokens}");
        }
        let mut other = all.clone();
        other[2] = 99;
        assert_eq!(found(&other, 0), None, "one token is another one");
        assert_eq!(index.find_state(&[8; 32], &all, 0), None, "another model");
        assert_eq!(index.held(&span(&all[..9], &all[9..10])), 1);
    }

    #[test]
    fn what_follows_agrees_or_not() {
        let mut index = SpanIndex::new(4);
        index.insert(1, &span(&[], &[0, 1, 2, 3, 4, 5, 6, 7]));
        index.insert(2, &span(&[0, 1, 2, 3], &[4, 9]));
        let agrees = |tokens: &[u32], at| index.agrees_behind(&ROOT, tokens, at);
        assert_eq!(agrees(&[0, 1, 2, 3, 4, 5, 6, 7, 8], 4), Some(true));
        assert_eq!(agrees(&[0, 1, 2, 3, 4, 5], 4), Some(true), "as far as both go");
        assert_eq!(agrees(&[0, 1, 2, 3, 4, 9, 9, 9], 4), Some(true), "as far as both go");
        assert_eq!(agrees(&[0, 1, 2, 3, 4, 6], 4), Some(false));
        assert_eq!(agrees(&[1], 0), Some(false));
        assert_eq!(agrees(&[0, 1, 2, 3, 4, 5, 6, 7, 8], 8), None, "nothing follows");
        assert_eq!(index.agrees_behind(&[8; 32], &[0, 1], 0), None, "another model");
    }

    #[test]
    fn longer_blocks_replace_incomplete_ones() {
        let mut index = SpanIndex::new(4);
        index.insert(1, &span(&[], &[1]));
        assert_eq!(index.insert(2, &span(&[], &[1, 2, 9])), [1]);
        assert!(index.insert(3, &span(&[], &[1, 2, 3])).is_empty(), "neither begins with the other");
        assert_eq!(index.insert(4, &span(&[], &[1, 2, 3, 4, 5, 6, 7, 8])), [3]);
        assert_eq!(index.len(), 3);
        for (id, tokens) in [(2, vec![1, 2, 9]), (4, vec![1, 2, 3, 4, 5, 6, 7, 8])] {
            index.remove(id, &span(&[], &tokens));
        }
        assert!(index.is_empty());
    }

    #[test]
    fn many_spans_at_once_are_found_like_one_after_the_other() {
        let first: Vec<u32> = (0..12).collect();
        let spans = [
            span(&[], &first),
            span(&first[..4], &[4, 5, 6]),
            span(&first, &[12]),
            span(&first, &[12, 13, 14]),
            span(&first, &[13]),
            span(&[], &first[..4]),
        ];
        let numbered = || (1..).zip(&spans);
        let (mut one, mut other) = (SpanIndex::new(4), SpanIndex::new(4));
        numbered().for_each(|(id, span)| drop(one.insert(id, span)));
        let mut useless = other.fill(numbered());
        useless.sort_unstable();
        assert_eq!(useless, [2, 3]);
        let all: Vec<u32> = (0..20).collect();
        for end in 0..20 {
            let held =
                |index: &SpanIndex| index.find(&ROOT, &all[..end], 0).iter().map(|piece| piece.tokens).sum::<usize>();
            assert_eq!((held(&one), held(&other)), (end.min(15), end.min(15)));
        }
    }

    #[test]
    fn leaves_are_spans_that_nothing_goes_on_from() {
        let mut index = SpanIndex::new(4);
        let first: Vec<u32> = (0..8).collect();
        let (one, two, same) = (span(&[], &first), span(&first[..4], &[9, 9]), span(&[], &first[..4]));
        index.insert(1, &one);
        assert!(index.is_leaf(1, &one), "its own blocks do not count");
        index.insert(2, &two);
        index.insert(3, &same);
        assert!(!index.is_leaf(1, &one) && index.is_leaf(2, &two) && index.is_leaf(3, &same));
        index.remove(3, &same);
        assert_eq!(index.find(&ROOT, &first, 0).len(), 1, "the block is the other span's");
        index.remove(2, &two);
        assert!(index.is_leaf(1, &one));
    }
}
