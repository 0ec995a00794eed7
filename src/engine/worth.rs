//! Whether rows are brought from other tiers or computed: whatever takes less time. Pure.

/// Weight of a new measurement.
const NEW: f64 = 0.2;

/// Rows that could be brought.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Offer {
    /// Position of the first token in the sequence.
    pub position: usize,
    /// Seconds until they are in the pools.
    pub seconds: f64,
}

/// Up to which token it is best to bring `offers`, which are in the order of their positions and cover `from..end` in every
/// cache group, when a token takes `token_seconds` to compute: whatever is brought is brought from the beginning, so that a
/// dear range is brought for the sake of cheap ones behind it, if together they save time.
pub fn worth_until(offers: &[Offer], from: usize, end: usize, token_seconds: f64) -> usize {
    let (mut seconds, mut most, mut best) = (0.0, 0.0, from);
    for (at, offer) in offers.iter().enumerate() {
        seconds += offer.seconds;
        // Ranges of several groups overlap: this far the ones up to here reach in all of them.
        let reached = offers.get(at + 1).map_or(end, |next| next.position);
        let saved = token_seconds * reached.saturating_sub(from) as f64 - seconds;
        if saved > most {
            (most, best) = (saved, reached);
        }
    }
    best
}

/// Learns how long it takes to move rows from the host's memory into the pools.
#[derive(Debug, Clone, Copy, Default)]
pub struct MoveRate {
    /// Something has been moved.
    warm: bool,
    /// Seconds for a byte.
    byte: Option<f64>,
}

impl MoveRate {
    /// `bytes` took `seconds`. The first ones say nothing: whatever moves them is made ready by them.
    pub fn observe(&mut self, bytes: usize, seconds: f64) {
        if !std::mem::replace(&mut self.warm, true) || bytes == 0 {
            return;
        }
        let byte = seconds / bytes as f64;
        // One that was interrupted says little.
        self.byte = Some(self.byte.map_or(byte, |old| old + NEW * (byte.min(2.0 * old) - old)));
    }

    /// Seconds that `bytes` will take; 0 before it is known.
    pub fn seconds(&self, bytes: usize) -> f64 {
        self.byte.unwrap_or(0.0) * bytes as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offers(parts: &[(usize, f64)]) -> Vec<Offer> {
        parts.iter().map(|&(position, seconds)| Offer { position, seconds }).collect()
    }

    #[test]
    fn what_is_faster_to_get_is_brought() {
        let offers = offers(&[(0, 0.1), (100, 0.1), (200, 0.1)]);
        assert_eq!(worth_until(&offers, 0, 300, 0.002), 300);
        assert_eq!(worth_until(&offers, 0, 300, 0.0009), 0, "computing is faster everywhere");
        assert_eq!(worth_until(&offers, 0, 300, 0.001), 0, "nothing is saved");
        assert_eq!(worth_until(&[], 32, 32, 1.0), 32);
    }

    #[test]
    fn each_range_is_weighed() {
        // A whole file for its last few tokens.
        assert_eq!(worth_until(&offers(&[(0, 0.1), (100, 0.1)]), 0, 110, 0.002), 100);
        // The same where tokens are dear.
        assert_eq!(worth_until(&offers(&[(0, 0.1), (100, 0.1)]), 0, 110, 0.02), 110);
        // A dear beginning that what follows makes up for, and one that it does not.
        assert_eq!(worth_until(&offers(&[(0, 0.3), (100, 0.01), (200, 0.01)]), 0, 300, 0.002), 300);
        assert_eq!(worth_until(&offers(&[(0, 0.6), (100, 0.01), (200, 0.01)]), 0, 300, 0.002), 0);
        // A dear end.
        assert_eq!(worth_until(&offers(&[(0, 0.01), (100, 0.01), (200, 0.3)]), 0, 300, 0.002), 200);
        // Behind what the pools have.
        assert_eq!(worth_until(&offers(&[(96, 0.1), (196, 0.1)]), 96, 200, 0.002), 196);
    }

    #[test]
    fn rows_of_one_group_are_of_no_use_without_those_of_the_others() {
        // Two groups whose files end at different places.
        let both = offers(&[(0, 0.1), (0, 0.1), (100, 0.1), (150, 0.1)]);
        assert_eq!(worth_until(&both, 0, 200, 0.003), 200);
        // What one group alone costs, both save.
        assert_eq!(worth_until(&both, 0, 200, 0.0021), 200);
        assert_eq!(worth_until(&both, 0, 200, 0.0019), 0);
    }

    #[test]
    fn moving_is_measured() {
        let mut rate = MoveRate::default();
        assert_eq!(rate.seconds(1000), 0.0, "it is tried");
        rate.observe(100, 30.0);
        assert_eq!(rate.seconds(1000), 0.0, "the first one loads what moves it");
        rate.observe(100, 0.1);
        assert_eq!(rate.seconds(1000), 1.0);
        rate.observe(100, 60.0);
        assert!((rate.seconds(1000) - 1.2).abs() < 1e-9, "an interruption");
        (0..100).for_each(|_| rate.observe(100, 0.3));
        assert!((rate.seconds(1000) - 3.0).abs() < 1e-3);
    }
}
