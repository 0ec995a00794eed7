//! How the cache groups of a model share the bytes that its cache may have. Pure.
//!
//! All groups get blocks for as many tokens. A window group needs no more than the windows of the sequences that run, and of
//! some others that may come back; where groups that keep all tokens can use the rest, it is theirs. So each group has a
//! limit of its own from the beginning, nobody has to give blocks to another group, and a group at its limit evicts what it
//! used longest ago.

use super::group::GroupKind;

/// Sequences whose windows are kept at least: those that run, and ends of others.
const WINDOWS: usize = 16;

/// Who uses the blocks.
#[derive(Debug, Clone, Copy)]
pub struct Users {
    /// Sequences that run at the same time.
    pub sequences: usize,
    /// Tokens of a step at most.
    pub chunk: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
}

/// Blocks that each group may have, given as its kind and the bytes of its blocks, of `bytes` in all: one at least.
pub fn shares(bytes: usize, groups: &[(GroupKind, usize)], users: Users) -> Vec<usize> {
    let all_kept = groups.iter().any(|&(kind, _)| kind == GroupKind::Full);
    let most: Vec<usize> =
        groups.iter().map(|&(kind, _)| if all_kept { most(kind, users) } else { usize::MAX }).collect();
    let mut capped = vec![false; groups.len()];
    loop {
        let (mut left, mut block) = (bytes, 0);
        for (at, &(_, block_bytes)) in groups.iter().enumerate() {
            match capped[at] {
                true => left = left.saturating_sub(most[at] * block_bytes),
                false => block += block_bytes,
            }
        }
        let blocks = left / block.max(1);
        // Whoever has enough leaves more to the others, so that nobody who has enough now has too little then.
        let more = (0..groups.len()).filter(|&at| !capped[at] && most[at] < blocks).collect::<Vec<_>>();
        if more.is_empty() {
            let share = |at: usize| if capped[at] { most[at] } else { blocks };
            return (0..groups.len()).map(|at| share(at).max(1)).collect();
        }
        more.into_iter().for_each(|at| capped[at] = true);
    }
}

/// Blocks that a group can use.
fn most(kind: GroupKind, users: Users) -> usize {
    let Users { sequences, chunk, block_tokens } = users;
    match kind {
        GroupKind::Full => usize::MAX,
        GroupKind::Window(_) => {
            let window = kind.most_blocks(usize::MAX, 1, block_tokens);
            sequences.max(WINDOWS).saturating_mul(window).saturating_add(chunk.div_ceil(block_tokens) + 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: Users = Users { sequences: 4, chunk: 64, block_tokens: 32 };

    #[test]
    fn a_single_group_has_everything() {
        for kind in [GroupKind::Full, GroupKind::Window(100)] {
            assert_eq!(shares(10_000, &[(kind, 10)], USERS), [1000]);
        }
        assert_eq!(shares(5, &[(GroupKind::Full, 10)], USERS), [1]);
    }

    #[test]
    fn windows_leave_what_they_do_not_need() {
        let groups = [(GroupKind::Full, 10), (GroupKind::Window(100), 50)];
        // The same number of tokens, as long as windows need them.
        assert_eq!(shares(60 * 50, &groups, USERS), [50, 50]);
        // 16 windows of five blocks each, and the tokens of a step.
        let most = 16 * 5 + 3;
        assert_eq!(shares(60 * most, &groups, USERS), [most, most]);
        assert_eq!(shares(60 * most + 10_000, &groups, USERS), [most + 1000, most]);
        // A second window group takes its part of what the first one leaves.
        let groups = [(GroupKind::Full, 10), (GroupKind::Window(100), 50), (GroupKind::Window(1000), 30)];
        let shares = shares(200_000, &groups, USERS);
        assert_eq!(shares[1..], [most, 16 * 33 + 3]);
        let bytes: usize = groups.iter().zip(&shares).map(|(group, blocks)| group.1 * blocks).sum();
        assert!(bytes <= 200_000 && bytes + 10 > 200_000 - 10, "{bytes}");
    }

    #[test]
    fn a_single_sequence_goes_on_within_any_share() {
        for bytes in (60..60_000).step_by(60) {
            let groups = [(GroupKind::Full, 10), (GroupKind::Window(100), 50)];
            let shares = shares(bytes, &groups, USERS);
            let tokens = shares[0] * USERS.block_tokens;
            assert!(groups[1].0.most_blocks(tokens, USERS.chunk, USERS.block_tokens) <= shares[1], "{bytes}");
        }
    }
}
