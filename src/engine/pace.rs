//! How many prompt tokens a step may take so that running answers stay smooth. Pure: times come from outside.

use std::time::Duration;

/// Weight of a new measurement.
const NEW: f64 = 0.2;

/// Prompt tokens of a step at least: a prompt must get on, whatever it costs, and to read a long context for fewer takes
/// nearly as long.
const LEAST: usize = 8;

/// From twice as many on, prompt tokens of a step are a multiple of this: fewer different shapes, and kernels like them.
const WHOLE: usize = 8;

/// A slow model's steps may take this many times as long as without prompt tokens, even if that misses the target.
const SLOWDOWN: f64 = 2.0;

/// Learns what steps cost.
#[derive(Debug)]
pub struct Pace {
    target: f64,
    most: usize,
    /// Seconds of a step that only decodes.
    decode: Option<f64>,
    /// Seconds that a prompt token adds to a step.
    token: Option<f64>,
}

impl Pace {
    /// Steps with running answers should take `target`; no step takes more than `most` prompt tokens.
    pub fn new(target: Duration, most: usize) -> Self {
        Self { target: target.as_secs_f64(), most: most.max(1), decode: None, token: None }
    }

    /// Prompt tokens of the next step, which also decodes or does not.
    pub fn budget(&self, decodes: bool) -> usize {
        let (true, Some(token)) = (decodes, self.token) else { return self.most };
        let decode = self.decode.unwrap_or(0.0);
        let room = self.target.max(SLOWDOWN * decode) - decode;
        // Rounded up: what a context costs is paid once, so that one token more is cheaper than the average says.
        let tokens = (room / token.max(1e-9)).ceil().min(self.most as f64) as usize;
        let tokens = if tokens < 2 * WHOLE { tokens } else { tokens / WHOLE * WHOLE };
        tokens.clamp(LEAST.min(self.most), self.most)
    }

    /// Seconds of a prompt token, if one has been computed.
    pub fn seconds_per_token(&self) -> Option<f64> {
        self.token
    }

    /// A step took `seconds`.
    pub fn observe(&mut self, seconds: f64, decodes: bool, prompt_tokens: usize) {
        let learn = |known: &mut Option<f64>, new: f64| {
            *known = Some(known.map_or(new, |old| old + NEW * (new - old)));
        };
        if prompt_tokens == 0 {
            learn(&mut self.decode, seconds);
        } else {
            let decode = if decodes { self.decode.unwrap_or(0.0) } else { 0.0 };
            // A step of a few tokens says little about one.
            let least = seconds / (2 * prompt_tokens) as f64;
            learn(&mut self.token, ((seconds - decode) / prompt_tokens as f64).max(least * 0.1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine where a step costs 24 ms and 2.5 ms for each prompt token.
    fn settle(pace: &mut Pace, decode: f64, token: f64) -> usize {
        for _ in 0..50 {
            pace.observe(decode, true, 0);
            let tokens = pace.budget(true);
            pace.observe(decode + token * tokens as f64, true, tokens);
        }
        pace.budget(true)
    }

    #[test]
    fn steps_find_their_target() {
        let mut pace = Pace::new(Duration::from_millis(100), 128);
        assert_eq!(pace.budget(true), 128, "nothing is known yet");
        assert_eq!(settle(&mut pace, 0.024, 0.0025), 24);
        assert_eq!(pace.budget(false), 128, "nobody waits for a token");
    }

    #[test]
    fn prompts_get_on_even_where_the_target_is_out_of_reach() {
        let mut pace = Pace::new(Duration::from_millis(50), 128);
        assert_eq!(settle(&mut pace, 0.045, 0.5), LEAST);
        let mut slow = Pace::new(Duration::from_millis(50), 128);
        assert_eq!(settle(&mut slow, 0.4, 0.0099), 40, "as long again as without the prompt");
        assert_eq!(settle(&mut Pace::new(Duration::from_millis(50), 4), 0.01, 1e-6), 4);
    }
}
