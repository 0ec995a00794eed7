//! What the index has for a sequence.

use super::{BlockManager, Found, Table};
use crate::cache::prefix::{NodeId, ROOT};

/// Cached rows behind a table that a sequence could go on from.
struct Reach {
    /// The first so many of a path's blocks.
    blocks: usize,
    /// And of a block whose beginning is of use.
    tail: Option<NodeId>,
    /// Tokens in all, those of the table included.
    tokens: usize,
}

impl BlockManager {
    /// Adds to `table`, which holds the whole blocks of `tokens[..computed]`, what the index has of the tokens behind
    /// them, but none from `limit` on. Without effect unless `computed` is the end of the table's last indexed block, or, for models
    /// with states, within the block behind that.
    pub fn find(&mut self, table: &mut Table, tokens: &[u32], computed: usize, limit: usize) -> Found {
        self.find_with(table, tokens, (computed, limit), true)
    }

    /// The same for the table of a new sequence and without a state, which will come from elsewhere: of how many tokens it has
    /// the rows then.
    pub fn find_rows(&mut self, table: &mut Table, tokens: &[u32], limit: usize) -> usize {
        self.find_with(table, tokens, (0, limit), false).tokens
    }

    fn find_with(
        &mut self,
        table: &mut Table,
        tokens: &[u32],
        (computed, limit): (usize, usize),
        with_state: bool,
    ) -> Found {
        let nothing = Found { tokens: computed, rows: computed, more_soon: false };
        // Hits of models with states end anywhere in a block, so that their sequences go on from there.
        let behind = computed.checked_sub(table.indexed);
        let may =
            behind.is_some_and(|behind| behind == 0 || with_state && self.has_states() && behind < self.block_tokens);
        if !may || limit <= computed {
            return nothing;
        }
        let path = self.path(table, &tokens[..limit]);
        let served = self.served(table, &path);
        let most = served.iter().rposition(|&served| served).unwrap_or(0);
        let mut reach = self.reach(table, &path, most, &tokens[..limit]);
        let rows = reach.tokens;
        let mut state = None;
        if let Some(snapshots) = self.snapshots.as_ref().filter(|_| with_state) {
            let at = |position: usize| {
                let blocks = (position - table.indexed) / self.block_tokens;
                let reach = (blocks < served.len() && served[blocks])
                    .then(|| self.reach(table, &path, blocks, &tokens[..position]));
                reach.filter(|reach| reach.tokens == position)
            };
            let Some((slot, written, longest)) = snapshots.longest(&tokens[..limit], computed, at) else {
                return Found { rows, ..nothing };
            };
            if written == self.step {
                return Found { rows, more_soon: true, ..nothing };
            }
            reach = longest;
            state = Some(slot);
        }
        // Rows that are copied must be there.
        let early = reach.tail.is_some_and(|tail| self.index.written(tail) == self.step);
        if early {
            if state.is_some() {
                return Found { rows, more_soon: true, ..nothing };
            }
            reach.tail = None;
            reach.tokens = table.indexed + reach.blocks * self.block_tokens;
        }
        // What the sequence has of the block that it was in gives way.
        let whole = table.indexed / self.block_tokens;
        for (group, blocks) in self.groups.iter_mut().zip(&mut table.groups) {
            blocks.drain(whole.min(blocks.len())..).rev().flatten().for_each(|block| group.pool.release(block));
        }
        self.share(table, &path[..reach.blocks], reach.tail);
        if let (Some(snapshots), Some(slot)) = (&mut self.snapshots, state) {
            snapshots.take_up(&mut table.state, slot, reach.tokens);
        }
        Found { tokens: reach.tokens, rows, more_soon: early }
    }

    /// Makes a table hold what was found.
    fn share(&mut self, table: &mut Table, path: &[NodeId], tail: Option<NodeId>) {
        let end = table.indexed + path.len() * self.block_tokens;
        if !path.is_empty() {
            for at in 0..self.groups.len() {
                self.leave(table, at, self.groups[at].kind.first_block(end, self.block_tokens));
            }
        }
        for &node in path {
            let place = table.indexed / self.block_tokens;
            for (at, group) in self.groups.iter_mut().enumerate() {
                let kept = place >= group.kind.first_block(end, self.block_tokens);
                let block = self.index.block(node, at).filter(|_| kept);
                block.into_iter().for_each(|block| group.pool.retain(block));
                table.groups[at].push(block);
            }
            table.node = node;
            table.indexed += self.block_tokens;
        }
        let Some(tail) = tail else { return };
        for (at, group) in self.groups.iter_mut().enumerate() {
            let block = self.index.block(tail, at);
            block.into_iter().for_each(|block| group.pool.retain(block));
            table.groups[at].push(block);
        }
    }

    /// How many tokens the states of beginnings of `tokens` stand for that are in slots, whatever there is of rows.
    pub fn state_lengths(&self, tokens: &[u32]) -> Vec<usize> {
        self.snapshots.as_ref().map_or_else(Vec::new, |snapshots| snapshots.lengths(tokens))
    }

    /// How many of `tokens` are cached, from the beginning.
    pub fn peek(&mut self, tokens: &[u32]) -> usize {
        self.look(tokens).tokens
    }

    /// What a new sequence of `tokens` would find.
    pub fn look(&mut self, tokens: &[u32]) -> Found {
        let mut table = self.table();
        let found = self.find(&mut table, tokens, 0, tokens.len());
        self.release(table);
        found
    }

    /// Whether other tokens are cached where `tokens` leave what is cached of them.
    pub fn goes_on_after(&self, tokens: &[u32]) -> bool {
        let path = self.path(&self.table(), tokens);
        let node = path.last().copied().unwrap_or(ROOT);
        let rest = &tokens[path.len() * self.block_tokens..];
        // Cached tokens of which these are the beginning, or the other way round, are no other ones.
        let agrees = |child| self.index.tokens(child).iter().zip(rest).all(|(a, b)| a == b);
        !self.index.children(node).any(agrees) && self.index.children(node).next().is_some()
    }

    /// Nodes of the whole blocks of `tokens` behind those of `table`.
    fn path(&self, table: &Table, tokens: &[u32]) -> Vec<NodeId> {
        let mut path = Vec::new();
        let mut node = table.node;
        for block in tokens[table.indexed..].chunks_exact(self.block_tokens) {
            let Some(child) = self.index.child(node, block) else { break };
            path.push(child);
            node = child;
        }
        path
    }

    /// Behind how many nodes of `path`, which follow `table`, every group has the rows that a sequence there needs: none, one,
    /// and so on.
    fn served(&self, table: &Table, path: &[NodeId]) -> Vec<bool> {
        let before = table.indexed / self.block_tokens;
        // Of each group: blocks without a gap up to the one at hand.
        let run = |blocks: &Vec<Option<_>>| blocks.iter().take(before).rev().take_while(|b| b.is_some()).count();
        let mut runs: Vec<usize> = table.groups.iter().map(run).collect();
        let mut served = vec![true];
        for (i, &node) in path.iter().enumerate() {
            let blocks = before + i + 1;
            let mut all = true;
            for (at, group) in self.groups.iter().enumerate() {
                runs[at] = if self.index.block(node, at).is_some() { runs[at] + 1 } else { 0 };
                let first = group.kind.first_block(blocks * self.block_tokens, self.block_tokens);
                all &= runs[at] >= blocks - first;
            }
            served.push(all);
        }
        served
    }

    /// The first `blocks` nodes of `path`, and what a block behind them has of the rest of `tokens`.
    fn reach(&self, table: &Table, path: &[NodeId], blocks: usize, tokens: &[u32]) -> Reach {
        let whole = table.indexed + blocks * self.block_tokens;
        let node = path[..blocks].last().copied().unwrap_or(table.node);
        let rest = &tokens[whole..tokens.len().min(whole + self.block_tokens)];
        let tail = self.index.closest_child(node, rest);
        Reach { blocks, tail: tail.map(|(tail, _)| tail), tokens: whole + tail.map_or(0, |(_, common)| common) }
    }
}
