//! Which rows of a step's arrays the tokens of each run take. Pure.
//!
//! On the CPU rows follow each other without gaps. A GPU compiles and caches by shape, so there the rows are in buckets,
//! filled up with spare ones that belong to nobody: first the *singles*, rows that are attended to one by one (decoding
//! sequences and short pieces of prompts), then longer pieces, each in a bucket of its own.

use std::ops::Range;

/// Longest run whose rows are attended to one by one.
const SHORT: usize = 16;

/// Longer runs in a step that MLX's attention takes; others are singles, however long. The number of different graphs
/// grows with the square of it.
const CHUNKS: usize = 4;

/// Where the rows are.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Where the rows of each run begin, in the order of the runs.
    pub first: Vec<usize>,
    /// Rows in all.
    pub rows: usize,
    /// Rows at the front that are attended to one by one, spare ones included.
    pub singles: usize,
    /// Spare rows, in order.
    pub spare: Vec<Range<usize>>,
}

impl Shape {
    /// Runs of these lengths without gaps.
    pub fn exact(lengths: impl Iterator<Item = usize>) -> Self {
        let mut shape = Self::default();
        for length in lengths {
            shape.first.push(shape.rows);
            shape.rows += length;
        }
        shape
    }

    /// Runs of these starts in their sequences and lengths, in buckets.
    pub fn in_buckets(runs: &[(usize, usize)]) -> Self {
        let mut shape = Self { first: vec![0; runs.len()], ..Self::default() };
        // The longest ones; of the same length, the first.
        let mut chunks: Vec<usize> = (0..runs.len()).filter(|&run| runs[run].1 > SHORT).collect();
        chunks.sort_by_key(|&run| std::cmp::Reverse(runs[run].1));
        chunks.truncate(CHUNKS);
        for (run, &(_, length)) in runs.iter().enumerate().filter(|(run, _)| !chunks.contains(run)) {
            shape.first[run] = shape.rows;
            shape.rows += length;
        }
        shape.fill_up(single_rows(shape.rows));
        shape.singles = shape.rows;
        // Those that begin sequences make a different graph than those that go on: always in the same order.
        chunks.sort_by_key(|&run| (runs[run].0 == 0, run));
        for run in chunks {
            shape.first[run] = shape.rows;
            let end = shape.rows + chunk_rows(runs[run].1);
            shape.rows += runs[run].1;
            shape.fill_up(end);
        }
        shape
    }

    fn fill_up(&mut self, rows: usize) {
        if rows > self.rows {
            self.spare.push(self.rows..rows);
            self.rows = rows;
        }
    }
}

/// Rows for that many singles. MLX's quantised product on CUDA has a kernel for one row, which takes two in turn, and one
/// that takes as long for three rows as for eight, or for 17 as for 32.
fn single_rows(rows: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=64 => rows.next_power_of_two().max(8),
        _ => rows.next_multiple_of(64),
    }
}

/// Rows for a piece of a prompt of that many tokens: at most a third more, from 128 on.
pub fn chunk_rows(tokens: usize) -> usize {
    match tokens {
        0..=64 => tokens.next_power_of_two().max(32),
        65..=512 => tokens.next_multiple_of(128),
        513..=1024 => tokens.next_multiple_of(256),
        _ => tokens.next_multiple_of(512),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rows_without_buckets_have_no_gaps() {
        let shape = Shape::exact([1, 1, 30].into_iter());
        assert_eq!(shape, Shape { first: vec![0, 1, 2], rows: 32, singles: 0, spare: vec![] });
    }

    #[test]
    fn a_decoding_sequence_is_one_row_and_several_fill_a_bucket() {
        assert_eq!(Shape::in_buckets(&[(70, 1)]).rows, 1);
        let shape = Shape::in_buckets(&[(70, 1), (5, 1), (9, 1)]);
        assert_eq!((shape.rows, shape.singles, &shape.first[..]), (8, 8, &[0, 1, 2][..]));
        assert!(shape.spare.iter().cloned().eq(std::iter::once(3..8)));
    }

    #[test]
    fn chunks_follow_the_singles_and_those_that_go_on_come_first() {
        let shape = Shape::in_buckets(&[(70, 1), (0, 100), (64, 40), (3, 7)]);
        assert_eq!(shape.first, [0, 8 + 64, 8, 1]);
        assert_eq!((shape.rows, shape.singles), (8 + 64 + 128, 8));
        assert_eq!(shape.spare, [48..72, 172..200]);
    }

    #[test]
    fn of_many_chunks_the_shortest_are_singles() {
        let runs: Vec<(usize, usize)> = (0..10).map(|i| (0, 20 + i)).collect();
        let shape = Shape::in_buckets(&runs);
        assert_eq!(shape.singles, (20..26usize).sum::<usize>().next_multiple_of(64));
        assert_eq!(shape.rows - shape.singles, 4 * 32);
    }

    proptest! {
        #[test]
        fn every_row_belongs_to_one_run_or_is_spare(runs in prop::collection::vec((0usize..3000, 1usize..600), 1..40)) {
            let shape = Shape::in_buckets(&runs);
            let mut owners = vec![0; shape.rows];
            let own = runs.iter().zip(&shape.first).map(|(&(_, length), &first)| first..first + length);
            own.chain(shape.spare.iter().cloned()).flatten().for_each(|row| owners[row] += 1);
            prop_assert!(owners.iter().all(|&count| count == 1));
            prop_assert!(shape.spare.windows(2).all(|pair| pair[0].end < pair[1].start));
            let tokens: usize = runs.iter().map(|run| run.1).sum();
            prop_assert!(shape.rows <= 2 * tokens + 8 + 64);
        }

        #[test]
        fn there_are_few_shapes(rows in 1usize..4096) {
            let sizes = |size: fn(usize) -> usize| (1..=rows).map(size).collect::<std::collections::BTreeSet<_>>();
            prop_assert!(sizes(chunk_rows).len() <= 16);
            prop_assert!(sizes(single_rows).len() <= 6 + rows / 64);
        }
    }
}
