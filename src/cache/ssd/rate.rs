//! How fast files can be read now. Pure.

use std::time::{Duration, Instant};

/// What was measured counts half after this time.
const HALF_LIFE: Duration = Duration::from_secs(30);

/// The usual rate counts as much as having read so many bytes: what is new soon outweighs it.
const USUAL_BYTES: f64 = 1e6;

/// To have held a rate for less than so many bytes may be chance, or a disk's own memory.
const HELD_BYTES: f64 = 64e6;

/// Learns the rate of reading: what was read lately counts most, and what nothing was read to confirm is forgotten.
///
/// What is forgotten gives way to the best rate that was ever held. So after a stall files are tried again, although nobody
/// reads them as long as they seem slow; to be wrong costs one slow read.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReadRate {
    /// Bytes read, and seconds in which at least one read was under way, both as they count at `at`.
    bytes: f64,
    seconds: f64,
    at: Option<Instant>,
    /// Reads that are under way.
    active: usize,
    /// Since when there are some, or the last of them has ended.
    since: Option<Instant>,
    /// Bytes per second of the best time so far.
    best: f64,
}

impl ReadRate {
    /// A read begins.
    pub fn begin(&mut self, now: Instant) {
        self.active += 1;
        self.since.get_or_insert(now);
    }

    /// A read has ended, and brought `bytes`.
    pub fn end(&mut self, bytes: u64, now: Instant) {
        self.age(now);
        self.active -= 1;
        self.bytes += bytes as f64;
        self.seconds += self.since.map_or(0.0, |since| now.saturating_duration_since(since).as_secs_f64());
        self.since = (self.active > 0).then_some(now);
        if self.bytes >= HELD_BYTES && self.seconds > 0.0 {
            self.best = self.best.max(self.bytes / self.seconds);
        }
    }

    /// Bytes per second that a read would get now; `assumed` before anything is known.
    pub fn bytes_per_second(&self, assumed: f64, now: Instant) -> f64 {
        let mut known = *self;
        known.age(now);
        let usual = assumed.max(self.best);
        (known.bytes + USUAL_BYTES) / (known.seconds + USUAL_BYTES / usual)
    }

    fn age(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at.unwrap_or(now));
        let left = (-passed.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2();
        self.bytes *= left;
        self.seconds *= left;
        self.at = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASSUMED: f64 = 0.5e9;

    /// A disk and what is known of it.
    struct Disk {
        rate: ReadRate,
        now: Instant,
        /// All that was read, and how long that took: an average that forgets nothing.
        sums: (f64, f64),
    }

    impl Disk {
        fn new() -> Self {
            Self { rate: ReadRate::default(), now: Instant::now(), sums: (0.0, 0.0) }
        }

        fn wait(&mut self, seconds: f64) {
            self.now += Duration::from_secs_f64(seconds);
        }

        /// Reads `bytes` at `speed`, in files of 32 MB.
        fn read(&mut self, bytes: f64, speed: f64) {
            for _ in 0..(bytes / 32e6).ceil() as usize {
                self.rate.begin(self.now);
                self.wait(32e6 / speed);
                self.rate.end(32_000_000, self.now);
                self.sums = (self.sums.0 + 32e6, self.sums.1 + 32e6 / speed);
            }
        }

        fn known(&self) -> f64 {
            self.rate.bytes_per_second(ASSUMED, self.now)
        }
    }

    #[test]
    fn what_was_read_is_known() {
        let mut disk = Disk::new();
        assert_eq!(disk.known(), ASSUMED);
        disk.read(20e9, 1.5e9);
        assert!((disk.known() / 1.5e9 - 1.0).abs() < 0.03, "{}", disk.known());
        // It becomes slower, and that soon counts more than all that was read before.
        disk.read(12e9, 0.1e9);
        assert!(disk.known() < 0.14e9, "{}", disk.known());
        assert!(disk.sums.0 / disk.sums.1 > 0.23e9, "an average of both times would not tell");
    }

    #[test]
    fn reads_at_the_same_time_share_it() {
        let mut disk = Disk::new();
        for _ in 0..20 {
            (0..4).for_each(|_| disk.rate.begin(disk.now));
            disk.wait(0.128);
            (0..4).for_each(|_| disk.rate.end(32_000_000, disk.now));
            // Nothing is read meanwhile.
            disk.wait(0.5);
        }
        assert!((disk.known() / 1e9 - 1.0).abs() < 0.05, "{}", disk.known());
    }

    #[test]
    fn a_stall_is_noticed_and_forgotten() {
        let mut disk = Disk::new();
        disk.read(1e9, 1e9);
        disk.rate.begin(disk.now);
        disk.wait(30.0);
        disk.rate.end(32_000_000, disk.now);
        let sums = (disk.sums.0 + 32e6) / (disk.sums.1 + 30.0);
        assert!(disk.known() < 0.06e9, "{}", disk.known());
        // Nobody reads what seems slow. Without a way back this would stay.
        disk.wait(600.0);
        assert!(disk.known() > 0.9e9 && sums < 0.04e9, "{} {sums}", disk.known());
        disk.read(1e9, 1e9);
        assert!((disk.known() / 1e9 - 1.0).abs() < 0.05, "{}", disk.known());
    }

    #[test]
    fn a_good_disk_stays_good_while_nobody_reads() {
        let mut disk = Disk::new();
        disk.read(1e9, 3e9);
        disk.wait(3600.0);
        assert!(disk.known() > 2.8e9, "{}", disk.known());
    }

    #[test]
    fn a_slow_disk_is_tried_now_and_then() {
        let mut disk = Disk::new();
        for _ in 0..5 {
            disk.read(64e6, 0.05e9);
            assert!(disk.known() < 0.1e9, "{}", disk.known());
            disk.wait(600.0);
            assert!(disk.known() > 0.9 * ASSUMED, "{}", disk.known());
        }
    }
}
