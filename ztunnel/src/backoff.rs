//! Pauses between attempts, as Istio's tunnel makes them: from 10 ms, doubling up to 15 s, or to less.

use std::time::Duration;

#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(10);
    const LONGEST: Duration = Duration::from_secs(15);

    pub fn new() -> Self {
        Self::up_to(Self::LONGEST)
    }

    pub fn up_to(longest: Duration) -> Self {
        Self { next: Self::FIRST, longest }
    }

    /// The first pause comes next, again.
    pub fn reset(&mut self) {
        self.next = Self::FIRST;
    }

    pub fn delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (delay * 2).min(self.longest);
        delay
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}
