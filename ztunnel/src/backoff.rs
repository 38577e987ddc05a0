//! Delays between attempts: doubling from a first delay up to a limit, with or without jitter.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use rand::RngExt;

/// The delays between the attempts of one task.
#[derive(Debug)]
pub(crate) struct Backoff {
    policy: ExponentialBuilder,
    delays: <ExponentialBuilder as BackoffBuilder>::Backoff,
    longest: Duration,
    jitter: f64,
}

impl Backoff {
    /// From 10 ms up to 15 s, as in Istio's tunnel.
    pub(crate) fn new() -> Self {
        Self::up_to(Duration::from_secs(15))
    }

    /// From 10 ms up to `longest`.
    pub(crate) fn up_to(longest: Duration) -> Self {
        Self::between(Duration::from_millis(10), longest)
    }

    /// From `first` up to `longest`, both in whole milliseconds.
    pub(crate) fn between(first: Duration, longest: Duration) -> Self {
        let policy =
            ExponentialBuilder::new().with_min_delay(first).with_max_delay(longest).without_max_times();
        Self { policy, delays: policy.build(), longest, jitter: 0.0 }
    }

    /// Varies each delay by at most this share, such as 0.2, either way but never above the
    /// longest.
    #[must_use]
    pub(crate) fn with_jitter(mut self, share: f64) -> Self {
        self.jitter = share;
        self
    }

    /// Starts again with the first delay.
    pub(crate) fn reset(&mut self) {
        self.delays = self.policy.build();
    }

    /// The next delay.
    pub(crate) fn delay(&mut self) -> Duration {
        let delay = self.delays.next().unwrap_or(self.longest);
        // backon doubles in `f32`, which is some nanoseconds off.
        let millis = u64::try_from((delay + Duration::from_micros(500)).as_millis()).unwrap_or(u64::MAX);
        let delay = Duration::from_millis(millis);
        if self.jitter == 0.0 {
            return delay;
        }
        let factor = rand::rng().random_range(1.0 - self.jitter..=1.0 + self.jitter);
        delay.mul_f64(factor).min(self.longest)
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_limit_and_start_again_after_a_reset() {
        let mut backoff = Backoff::up_to(Duration::from_secs(1));
        let mut delays = || (0..9).map(|_| backoff.delay().as_millis()).collect::<Vec<_>>();
        assert_eq!(delays(), [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.delay(), Duration::from_millis(10));
    }

    #[test]
    fn jitter_stays_within_its_share_and_below_the_limit() {
        let mut backoff = Backoff::between(Duration::from_secs(1), Duration::from_secs(150)).with_jitter(0.2);
        for seconds in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 150.0, 150.0] {
            let delay = backoff.delay().as_secs_f64();
            assert!(delay >= seconds * 0.8 && delay <= (seconds * 1.2).min(150.0), "{seconds}: {delay}");
        }
    }
}
