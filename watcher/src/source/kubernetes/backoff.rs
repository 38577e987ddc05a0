//! How long to wait before the next attempt.

use std::time::Duration;

/// Doubles from `first` to `longest`; what is waited is a random part of it, at least half, so that the nodes
/// of a cluster do not come back all at once.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    pub fn next(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(self.longest);
        whole.mul_f64(rand::random_range(0.5..=1.0))
    }

    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_limit_are_spread_and_begin_anew() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(15));
        let mut backoff = Backoff::new(first, longest);
        let waits: Vec<Duration> = (0..20).map(|_| backoff.next()).collect();
        assert!(waits[0] >= first / 2 && waits[0] <= first);
        assert!(waits[8..].iter().all(|wait| *wait >= longest / 2 && *wait <= longest), "{waits:?}");
        assert!(waits[8..].windows(2).any(|pair| pair[0] != pair[1]), "all at once: {waits:?}");
        backoff.reset();
        assert!(backoff.next() <= first);
    }
}
