//! How long to wait before the next attempt.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

/// Waits that double up to a limit. Each is random, between half and all of its whole length, so
/// that the nodes of a cluster do not come back all at once.
#[derive(Debug)]
pub(super) struct Backoff {
    waits: ExponentialBuilder,
    longest: Duration,
    next: ExponentialBackoff,
}

impl Backoff {
    /// `first`: the whole length of the first wait; `longest`: the limit.
    pub(super) fn new(first: Duration, longest: Duration) -> Self {
        // `backon` adds a random part of each wait to it, so that half a wait becomes half to all
        // of it.
        let waits = ExponentialBuilder::new()
            .with_min_delay(first / 2)
            .with_max_delay(longest / 2)
            .without_max_times()
            .with_jitter();
        Self { waits, longest, next: waits.build() }
    }

    /// The next wait.
    pub(super) fn next(&mut self) -> Duration {
        self.next.next().unwrap_or(self.longest)
    }

    /// The next wait is the first again.
    pub(super) fn reset(&mut self) {
        self.next = self.waits.build();
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
