//! Pauses between attempts, as Istio's tunnel makes them: from 10 ms, doubling up to 15 s.

use std::time::Duration;

#[derive(Debug)]
pub struct Backoff(Duration);

impl Backoff {
    const FIRST: Duration = Duration::from_millis(10);
    const LAST: Duration = Duration::from_secs(15);

    pub fn new() -> Self {
        Self(Self::FIRST)
    }

    pub fn delay(&mut self) -> Duration {
        let delay = self.0;
        self.0 = (delay * 2).min(Self::LAST);
        delay
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}
