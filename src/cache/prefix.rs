//! The prefix index: which tokens are cached, and in which blocks. Pure.
//!
//! A tree whose edges are the tokens of a block: a node stands for all tokens from the beginning to the end of its
//! block. Children are ordered by their tokens, so that the longest common beginning is next to where a sequence would
//! be; tokens are compared as they are, and a hash is never taken for them. The chain key of a node names the same tokens
//! outside this process.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::rc::Rc;

use super::blocks::BlockId;

/// BLAKE3 over the key of the tokens before and the tokens of a block: the same tokens of the same model have the same
/// key in every process.
pub type BlockKey = [u8; 32];

/// Names a node of the tree; used again after the node is removed.
pub type NodeId = u32;

/// The node before all tokens.
pub const ROOT: NodeId = 0;

/// Cached tokens of a model.
#[derive(Debug)]
pub struct PrefixIndex {
    nodes: Vec<Node>,
    vacant: Vec<NodeId>,
    groups: usize,
    /// Nodes and groups whose rows are in the pools alone.
    unsaved: BTreeSet<(NodeId, usize)>,
}

#[derive(Debug)]
struct Node {
    parent: NodeId,
    key: BlockKey,
    /// Fewer than a whole block only in a leaf.
    tokens: Rc<[u32]>,
    children: BTreeMap<Rc<[u32]>, NodeId>,
    /// Of each cache group: where the tokens' rows are.
    blocks: Box<[Option<BlockId>]>,
    /// The step that wrote the newest of the rows.
    written: u64,
}

/// The key of `tokens` behind a prefix.
pub fn chain_key(parent: &BlockKey, tokens: &[u32]) -> BlockKey {
    let mut hasher = blake3::Hasher::new();
    hasher.update(parent);
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

impl PrefixIndex {
    /// An empty index for `groups` cache groups; `key` stands for the model.
    pub fn new(groups: usize, key: BlockKey) -> Self {
        let root = Node {
            parent: ROOT,
            key,
            tokens: Rc::from([]),
            children: BTreeMap::new(),
            blocks: vec![None; groups].into(),
            written: 0,
        };
        Self { nodes: vec![root], vacant: Vec::new(), groups, unsaved: BTreeSet::new() }
    }

    /// The child of `node` with exactly these tokens.
    pub fn child(&self, node: NodeId, tokens: &[u32]) -> Option<NodeId> {
        self.node(node).children.get(tokens).copied()
    }

    /// The child of `node` with blocks in all groups that begins with most of `tokens`, and with how many; `None` if no such
    /// child has the first.
    pub fn closest_child(&self, node: NodeId, tokens: &[u32]) -> Option<(NodeId, usize)> {
        let children = &self.node(node).children;
        let whole = |(_, id): &(&Rc<[u32]>, &NodeId)| self.node(**id).blocks.iter().all(Option::is_some);
        // Whatever shares most with `tokens` is next to the place of `tokens` in the order.
        let before = children.range::<[u32], _>((Bound::Unbounded, Bound::Included(tokens))).rev().find(whole);
        let after = children.range::<[u32], _>((Bound::Excluded(tokens), Bound::Unbounded)).find(whole);
        let common =
            |(found, &id): (&Rc<[u32]>, &NodeId)| (id, found.iter().zip(tokens).take_while(|(a, b)| a == b).count());
        let best = before.into_iter().chain(after).map(common).max_by_key(|&(_, common)| common);
        best.filter(|&(_, common)| common > 0)
    }

    /// Adds a child without blocks.
    pub fn insert(&mut self, parent: NodeId, tokens: &[u32]) -> NodeId {
        let key = chain_key(&self.node(parent).key, tokens);
        let tokens: Rc<[u32]> = tokens.into();
        let node = Node {
            parent,
            key,
            tokens: Rc::clone(&tokens),
            children: BTreeMap::new(),
            blocks: vec![None; self.groups].into(),
            written: 0,
        };
        let id = match self.vacant.pop() {
            Some(id) => {
                self.nodes[id as usize] = node;
                id
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as NodeId
            }
        };
        self.nodes[parent as usize].children.insert(tokens, id);
        id
    }

    /// A child of `parent` whose tokens are fewer than, and the beginning of, `tokens`.
    pub fn shorter_child(&self, parent: NodeId, tokens: &[u32]) -> Option<NodeId> {
        let (found, &id) =
            self.node(parent).children.range::<[u32], _>((Bound::Unbounded, Bound::Excluded(tokens))).next_back()?;
        tokens.starts_with(found).then_some(id)
    }

    /// The block of a node in a group.
    pub fn block(&self, node: NodeId, group: usize) -> Option<BlockId> {
        self.node(node).blocks[group]
    }

    /// The step that wrote the newest rows of a node.
    pub fn written(&self, node: NodeId) -> u64 {
        self.node(node).written
    }

    /// The tokens of a node's own block.
    pub fn tokens(&self, node: NodeId) -> &[u32] {
        &self.node(node).tokens
    }

    /// The key of a node.
    pub fn key(&self, node: NodeId) -> &BlockKey {
        &self.node(node).key
    }

    /// The node before a node.
    pub fn parent(&self, node: NodeId) -> NodeId {
        self.node(node).parent
    }

    /// The nodes behind a node.
    pub fn children(&self, node: NodeId) -> impl Iterator<Item = NodeId> {
        self.node(node).children.values().copied()
    }

    /// All tokens up to the end of a node.
    pub fn all_tokens(&self, mut node: NodeId) -> Vec<u32> {
        let mut path = Vec::new();
        while node != ROOT {
            path.push(node);
            node = self.parent(node);
        }
        path.iter().rev().flat_map(|&node| self.tokens(node)).copied().collect()
    }

    /// Whether the rows of a node's block in a group are nowhere else.
    pub fn is_unsaved(&self, node: NodeId, group: usize) -> bool {
        self.unsaved.contains(&(node, group))
    }

    /// All nodes and groups of which that is true.
    pub fn unsaved(&self) -> impl ExactSizeIterator<Item = (NodeId, usize)> {
        self.unsaved.iter().copied()
    }

    /// The rows of a node's block in a group are somewhere else too.
    pub fn set_saved(&mut self, node: NodeId, group: usize) {
        self.unsaved.remove(&(node, group));
    }

    /// Sets the block of a node in a group, whose rows `step` has written at the latest.
    pub fn set_block(&mut self, node: NodeId, group: usize, block: BlockId, step: u64) {
        self.unsaved.insert((node, group));
        let node = &mut self.nodes[node as usize];
        node.blocks[group] = Some(block);
        node.written = node.written.max(step);
    }

    /// Removes the block of a node in a group. A node that nothing needs any more is removed, and so are those
    /// before it that only led to it.
    pub fn remove_block(&mut self, node: NodeId, group: usize) {
        self.nodes[node as usize].blocks[group] = None;
        self.unsaved.remove(&(node, group));
        self.prune(node);
    }

    /// Nodes but for the root.
    pub fn entries(&self) -> usize {
        self.nodes.len() - self.vacant.len() - 1
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    fn prune(&mut self, mut id: NodeId) {
        while id != ROOT {
            let node = self.node(id);
            if !node.children.is_empty() || node.blocks.iter().any(Option::is_some) {
                return;
            }
            let parent = node.parent;
            let tokens = Rc::clone(&node.tokens);
            self.nodes[parent as usize].children.remove(&tokens);
            self.vacant.push(id);
            id = parent;
        }
    }
}
