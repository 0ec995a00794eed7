//! Ids of tool calls.

/// How ids look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IdStyle {
    /// `call_` and 24 hexadecimal digits.
    Common,
    /// Nine letters and digits: what Mistral's templates accept.
    NineLetters,
}

/// Gives ids to the calls of one answer: SplitMix64 of a seed.
#[derive(Debug, Clone)]
pub(super) struct CallIds {
    style: IdStyle,
    state: u64,
}

impl CallIds {
    pub fn new(style: IdStyle, seed: u64) -> Self {
        Self { style, state: seed }
    }

    pub fn next(&mut self) -> String {
        match self.style {
            IdStyle::Common => format!("call_{:016x}{:08x}", self.number(), self.number() as u32),
            IdStyle::NineLetters => {
                const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
                let mut left = self.number();
                let mut letter = || {
                    let letter = LETTERS[(left % 62) as usize];
                    left /= 62;
                    char::from(letter)
                };
                (0..9).map(|_| letter()).collect()
            }
        }
    }

    fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_their_form_and_differ() {
        for (style, length) in [(IdStyle::Common, 29), (IdStyle::NineLetters, 9)] {
            let mut ids = CallIds::new(style, 7);
            let all: std::collections::HashSet<String> = (0..1000).map(|_| ids.next()).collect();
            assert_eq!(all.len(), 1000);
            assert!(
                all.iter().all(|id| id.len() == length && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
            );
        }
        assert_ne!(CallIds::new(IdStyle::Common, 1).next(), CallIds::new(IdStyle::Common, 2).next());
    }
}
