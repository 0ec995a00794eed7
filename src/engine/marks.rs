//! Where in a prompt the states of recurrent layers are kept for later sequences. Pure.
//!
//! A state serves only those who begin with exactly its tokens, so it is kept where prompts are likely to part: behind the last
//! message, because templates change what follows it once there is an answer; at the end; where this prompt has left
//! another one; and now and then in a long one, for others about the same document. The end of an answer is kept besides.

/// Blocks between two states of a prompt that nothing else suggests.
const BLOCKS: usize = 32;

/// So many of these a prompt has at most.
const MOST: usize = 8;

/// Positions of a prompt, each behind so many tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marks {
    prompt: usize,
    last_message: usize,
    branches: Vec<usize>,
}

impl Marks {
    /// Of a prompt of `prompt` tokens, the first `last_message` of which are there again when an answer follows.
    pub fn new(prompt: usize, last_message: usize) -> Self {
        Self { prompt, last_message: last_message.clamp(1, prompt.max(1)), branches: Vec::new() }
    }

    /// The prompt has left another one behind `position` tokens: others may do so there, too.
    pub fn branch(&mut self, position: usize, block_tokens: usize) {
        let near = |mark: usize| mark.abs_diff(position) < block_tokens;
        if !near(self.last_message) && !self.branches.iter().any(|&branch| near(branch)) {
            self.branches.push(position);
        }
    }

    /// The first mark behind `start` tokens.
    pub fn next(&self, start: usize, block_tokens: usize) -> Option<usize> {
        // What asks for the answer is a few tokens: computing them again costs less than keeping another state.
        let end = Some(self.prompt).filter(|end| end - self.last_message >= block_tokens);
        let every = self.every(block_tokens);
        // One shortly before the last message would cost a step of its own.
        let regular = Some((start / every + 1) * every).filter(|&mark| mark + block_tokens <= self.last_message);
        let own = self.branches.iter().copied().chain([self.last_message]).chain(end).filter(|&mark| mark > start);
        own.chain(regular).min()
    }

    /// Whether there is a mark behind exactly `tokens` tokens.
    pub fn contains(&self, tokens: usize, block_tokens: usize) -> bool {
        tokens > 0 && self.next(tokens - 1, block_tokens) == Some(tokens)
    }

    /// A multiple of whole blocks, and of that of shorter prompts.
    fn every(&self, block_tokens: usize) -> usize {
        let least = BLOCKS * block_tokens;
        least * self.prompt.div_ceil(MOST * least).next_power_of_two()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(marks: &Marks, block_tokens: usize) -> Vec<usize> {
        std::iter::successors(marks.next(0, block_tokens), |&mark| marks.next(mark, block_tokens)).collect()
    }

    #[test]
    fn prompts_are_marked_where_others_leave_them() {
        assert_eq!(all(&Marks::new(10, 7), 4), [7], "the end is near enough");
        assert_eq!(all(&Marks::new(11, 7), 4), [7, 11]);
        assert_eq!(all(&Marks::new(1, 0), 4), [1]);
        assert_eq!(all(&Marks::new(300, 299), 4), [128, 256, 299]);
        assert_eq!(all(&Marks::new(300, 259), 4), [128, 259, 300], "no two shortly after each other");
        let mut marks = Marks::new(300, 299);
        marks.branch(200, 4);
        marks.branch(202, 4);
        marks.branch(297, 4);
        assert_eq!(all(&marks, 4), [128, 200, 256, 299], "no two at nearly the same place");
        assert!(marks.contains(200, 4) && !marks.contains(201, 4) && !marks.contains(0, 4));
    }

    #[test]
    fn a_long_prompt_has_few_marks_and_those_of_shorter_ones() {
        let (long, short) = (all(&Marks::new(100_000, 99_999), 32), all(&Marks::new(60_000, 59_999), 32));
        assert!(long.len() <= MOST + 1 && short.len() <= MOST + 1, "{long:?} {short:?}");
        assert!(long[..3].iter().all(|mark| short.contains(mark)), "{long:?} {short:?}");
    }
}
