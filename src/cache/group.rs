//! Kinds of cache groups. Pure.

/// Which tokens' rows the layers of a cache group need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum GroupKind {
    /// All of them.
    Full,
    /// The newest ones, as many as this.
    Window(usize),
}

impl GroupKind {
    /// The first position whose rows a token at `position` needs.
    pub fn first_position(self, position: usize) -> usize {
        match self {
            GroupKind::Full => 0,
            GroupKind::Window(window) => (position + 1).saturating_sub(window),
        }
    }

    /// The first block that a sequence needs which goes on at `position`; at the latest the last whole block before, because
    /// the sequence's place in the index hangs on that. Within a block it is the first one that the block's beginning needs: a
    /// hit is looked for there first.
    pub fn first_block(self, position: usize, block_tokens: usize) -> usize {
        let whole = position / block_tokens;
        (self.first_position(whole * block_tokens) / block_tokens).min(whole.saturating_sub(1))
    }

    /// Blocks that a sequence of `tokens` tokens holds at a time, at most, if a step computes at most `chunk` of them.
    pub fn most_blocks(self, tokens: usize, chunk: usize, block_tokens: usize) -> usize {
        let all = tokens.div_ceil(block_tokens);
        match self {
            GroupKind::Full => all,
            GroupKind::Window(window) => {
                // From the first key of the step's first token, or from the last whole block before it, to the step's end.
                let tokens = window.max(block_tokens + 1).saturating_add(chunk).saturating_sub(1);
                all.min((tokens - 1).div_ceil(block_tokens) + 1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_holds_its_window_and_a_step_wherever_that_begins() {
        for (window, chunk, block_tokens) in
            [(1, 1, 8), (1, 2, 3), (8, 1, 8), (9, 1, 8), (10, 1, 8), (5, 7, 4), (20, 3, 1)]
        {
            let kind = GroupKind::Window(window);
            let held = |start: usize| {
                let last = (start / block_tokens).saturating_sub(1);
                let first = (kind.first_position(start) / block_tokens).min(last);
                (start + chunk).div_ceil(block_tokens) - first
            };
            let most = (100..200).map(held).max();
            assert_eq!(
                most,
                Some(kind.most_blocks(usize::MAX, chunk, block_tokens)),
                "{window} {chunk} {block_tokens}"
            );
            assert_eq!(kind.most_blocks(1, chunk, block_tokens), 1);
            // The window and a block.
            assert!(kind.most_blocks(usize::MAX, 1, block_tokens) <= window.div_ceil(block_tokens) + 1);
        }
    }
}
