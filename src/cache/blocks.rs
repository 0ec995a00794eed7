//! Which blocks of a pool are in use: reference counts, and what is given up first. Pure.
//!
//! A block is *free* (nothing worth keeping), *used* (somebody holds references) or *cached* (nobody does, but the
//! prefix index knows its content). Free blocks are handed out lowest id first, so that a pool can shrink from its
//! end; then cached ones, the longest unused first. Those that a sequence has left behind its window go before all others,
//! unless somebody has found them: a long prompt does not drive out the windows at the ends of others.

use std::collections::{BTreeMap, BTreeSet};

/// Names a block of a pool, from 0 on.
pub type BlockId = u32;

/// The blocks of one pool. `T` names the content of a block in the prefix index.
#[derive(Debug)]
pub struct BlockPool<T> {
    blocks: Vec<Block<T>>,
    free: BTreeSet<BlockId>,
    /// Cached blocks in the order in which they go.
    cached: BTreeMap<Rank, BlockId>,
    clock: u64,
}

/// Whether a block goes later than those that were left behind, and the time of its last use.
type Rank = (bool, u64);

#[derive(Debug)]
struct Block<T> {
    references: u32,
    content: Option<T>,
    /// Somebody has found what it holds.
    found: bool,
    /// Key in `cached` while the block is there.
    rank: Rank,
}

/// How many blocks are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Held by sequences or pins.
    pub used: usize,
    /// Kept for their content; handed out when needed.
    pub cached: usize,
    /// Empty.
    pub free: usize,
}

impl<T: Copy> BlockPool<T> {
    /// A pool of `capacity` free blocks.
    pub fn new(capacity: usize) -> Self {
        let mut pool = Self { blocks: Vec::new(), free: BTreeSet::new(), cached: BTreeMap::new(), clock: 0 };
        pool.grow(capacity);
        pool
    }

    /// Blocks that exist.
    pub fn capacity(&self) -> usize {
        self.blocks.len()
    }

    /// How many blocks are in which state.
    pub fn counts(&self) -> BlockCounts {
        let (cached, free) = (self.cached.len(), self.free.len());
        BlockCounts { used: self.capacity() - cached - free, cached, free }
    }

    /// Blocks that [`take`](Self::take) can hand out.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// A block with one reference, and what it held if it was cached: the caller forgets that content. `None` when all
    /// are in use.
    pub fn take(&mut self) -> Option<(BlockId, Option<T>)> {
        let (id, evicted) = match self.free.pop_first() {
            Some(id) => (id, None),
            None => {
                let (_, id) = self.cached.pop_first()?;
                (id, self.block(id).content.take())
            }
        };
        let block = self.block(id);
        (block.references, block.found) = (1, false);
        Some((id, evicted))
    }

    /// One more reference to a block that is used or cached.
    pub fn retain(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        if block.references == 0 {
            let was = self.cached.remove(&block.rank);
            debug_assert_eq!(was, Some(id), "a free block has nothing to hold on to");
        }
        block.references += 1;
        block.found = true;
    }

    /// One reference less. Without any the block is cached if its content is known, and free otherwise.
    ///
    /// Of several blocks of a sequence the last one should be released first: it is of use only with those before it.
    pub fn release(&mut self, id: BlockId) {
        self.release_as(id, true);
    }

    /// The same for a block that its sequence needs no more although it goes on: of less use than others, unless somebody
    /// has found it.
    pub fn leave(&mut self, id: BlockId) {
        let found = self.blocks[id as usize].found;
        self.release_as(id, found);
    }

    fn release_as(&mut self, id: BlockId, later: bool) {
        let block = &mut self.blocks[id as usize];
        block.references = block.references.checked_sub(1).expect("a reference for every release");
        if block.references == 0 {
            self.settle(id, later);
        }
    }

    /// References to a block.
    pub fn references(&self, id: BlockId) -> u32 {
        self.blocks[id as usize].references
    }

    /// What the index knows of a block.
    pub fn content(&self, id: BlockId) -> Option<T> {
        self.blocks[id as usize].content
    }

    /// Says what a block in use holds from now on.
    pub fn set_content(&mut self, id: BlockId, content: T) {
        debug_assert!(self.references(id) > 0, "only a block in use gets content");
        self.block(id).content = Some(content);
    }

    /// The content of a block is of no use any more; a cached block becomes free.
    pub fn forget(&mut self, id: BlockId) {
        let block = self.block(id);
        block.content = None;
        if block.references == 0 {
            let rank = block.rank;
            if self.cached.remove(&rank).is_some() {
                self.free.insert(id);
            }
        }
    }

    /// All cached blocks, in the order in which they go.
    pub fn cached(&self) -> impl Iterator<Item = BlockId> {
        self.cached.values().copied()
    }

    /// More blocks exist.
    pub fn grow(&mut self, capacity: usize) {
        for id in self.capacity()..capacity {
            self.blocks.push(Block { references: 0, content: None, found: false, rank: (true, 0) });
            self.free.insert(id as BlockId);
        }
    }

    /// The smallest capacity that loses no block with content or references.
    pub fn least_capacity(&self) -> usize {
        (0..self.capacity()).rev().find(|&id| !self.free.contains(&(id as BlockId))).map_or(0, |last| last + 1)
    }

    /// Fewer blocks exist: at least [`least_capacity`](Self::least_capacity).
    pub fn shrink(&mut self, capacity: usize) {
        let capacity = capacity.clamp(self.least_capacity(), self.capacity());
        self.free.split_off(&(capacity as BlockId));
        self.blocks.truncate(capacity);
    }

    fn block(&mut self, id: BlockId) -> &mut Block<T> {
        &mut self.blocks[id as usize]
    }

    /// Puts a block without references where it belongs.
    fn settle(&mut self, id: BlockId, later: bool) {
        if self.block(id).content.is_none() {
            self.free.insert(id);
            return;
        }
        self.clock += 1;
        let rank = (later, self.clock);
        self.block(id).rank = rank;
        self.cached.insert(rank, id);
    }
}
