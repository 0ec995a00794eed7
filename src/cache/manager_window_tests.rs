//! Groups that keep a window.

use super::*;

/// Blocks of a window that are one place off, while those of the other group are right.
#[test]
fn a_wrong_block_of_a_window_is_noticed() {
    let run = |wrong: bool| {
        let mut machine = Machine::new(4, &[GroupKind::Full, GroupKind::Window(6)], 20);
        let at = start(&mut machine, &(0..30).collect::<Vec<_>>());
        machine.step(at, 1, 20).unwrap();
        if wrong {
            machine.sequences[at].table.groups[1].rotate_right(1);
        }
        machine.step(at, 1, 4)
    };
    run(false).unwrap();
    assert!(run(true).is_err());
}

/// A long prompt in small pieces holds its window and no more, and leaves the windows at the ends of others alone.
#[test]
fn windows_hold_their_own_blocks_and_outlive_long_prompts() {
    let kind = GroupKind::Window(8);
    let mut machine = Machine::new(4, &[GroupKind::Full, kind], 100);
    machine.manager.shrink(1, 0);
    machine.manager.grow(1, 12);
    let first: Vec<u32> = (0..22).collect();
    let at = start(&mut machine, &first);
    machine.act(&Action::Step { first: at, count: 1, tokens: 22 }).unwrap();
    machine.act(&Action::End { which: at, tail: true }).unwrap();
    let at = start(&mut machine, &(100..300).collect::<Vec<_>>());
    for _ in 0..50 {
        machine.act(&Action::Step { first: at, count: 1, tokens: 4 }).unwrap();
        // The window of the first token, the others, and a block that both do not fill.
        assert!(machine.sequences[at].table.held(1) <= 4, "{:?}", machine.sequences[at].table);
    }
    assert_eq!(machine.sequences[at].table.held(0), 50);
    assert_eq!(machine.manager.peek(&first), 22, "the window at the end of the first one was driven out");
    // What somebody found is worth as much as that: it goes in its turn.
    let again = start(&mut machine, &first);
    machine.act(&Action::Step { first: again, count: 1, tokens: 22 }).unwrap();
    assert_eq!((machine.hits, machine.sequences[again].computed), (21, 22));
}

/// The end of a prompt whose window was evicted is there again when somebody has computed it.
#[test]
fn an_end_without_its_window_is_replaced() {
    let mut machine = Machine::new(4, &[GroupKind::Full, GroupKind::Window(3)], 40);
    let tokens: Vec<u32> = (0..11).collect();
    for (known, forgets) in [(11, true), (11, true), (10, false), (11, false)] {
        let at = start(&mut machine, &tokens[..known]);
        machine.act(&Action::Step { first: at, count: 1, tokens: 11 }).unwrap();
        machine.act(&Action::End { which: at, tail: true }).unwrap();
        machine.manager.next_step();
        assert_eq!(machine.manager.peek(&tokens), known, "{known} tokens");
        if forgets {
            let cached: Vec<BlockId> = machine.manager.groups[1].pool.cached().collect();
            for block in cached {
                let node = machine.manager.groups[1].pool.content(block).unwrap();
                machine.manager.groups[1].pool.forget(block);
                machine.manager.index.remove_block(node, 1);
            }
            assert_eq!(machine.manager.peek(&tokens), 0);
        }
    }
}

/// A prefix hit is as long as every group can serve, no longer and no shorter.
#[test]
fn a_hit_needs_the_window_before_its_end_only() {
    let mut machine = Machine::new(4, &[GroupKind::Full, GroupKind::Window(8)], 40);
    let tokens: Vec<u32> = (0..40).collect();
    let at = start(&mut machine, &tokens);
    machine.act(&Action::Step { first: at, count: 1, tokens: 40 }).unwrap();
    machine.act(&Action::End { which: at, tail: true }).unwrap();
    machine.manager.next_step();
    let forget = |machine: &mut Machine, place: usize| {
        let mut node = ROOT;
        for block in tokens.chunks(4).take(place + 1) {
            node = machine.manager.index.child(node, block).unwrap();
        }
        let block = machine.manager.index.block(node, 1).unwrap();
        machine.manager.groups[1].pool.forget(block);
        machine.manager.index.remove_block(node, 1);
    };
    assert_eq!(machine.manager.peek(&tokens), 40);
    // Far behind the window at the end: nobody needs it there.
    forget(&mut machine, 2);
    assert_eq!((machine.manager.peek(&tokens), machine.manager.peek(&tokens[..12])), (40, 8));
    // The token at 36 sees 29..=36, the one at 32 sees 25..=32.
    forget(&mut machine, 9);
    assert_eq!(machine.manager.peek(&tokens), 36);
    forget(&mut machine, 7);
    assert_eq!(machine.manager.peek(&tokens), 28);
}

/// Rows that come back for an end within a block are found: also the block is brought that only the block's beginning needs.
#[test]
fn an_end_within_a_block_is_found_by_the_beginning_of_that() {
    let mut machine = Machine::new(7, &[GroupKind::Window(9)], 6);
    let history = [
        Action::Start { family: 0, shared: 18, own: 10 },
        Action::Step { first: 0, count: 1, tokens: 29 },
        Action::Fork { which: 0 },
        Action::Sample { which: 0, tokens: vec![0; 6] },
        Action::Sample { which: 1, tokens: vec![0] },
        Action::Step { first: 0, count: 2, tokens: 7 },
        Action::Clear,
        Action::Save { runs: 1 },
        Action::Restore { which: 0 },
    ];
    history.iter().for_each(|action| machine.act(action).unwrap());
    let kind = GroupKind::Window(9);
    assert_eq!([28, 33, 34, 35].map(|end| kind.first_block(end, 7)), [2, 2, 2, 3]);
}
