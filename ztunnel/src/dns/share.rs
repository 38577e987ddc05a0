//! A pod's share of the thread that answers the names of all pods.

use std::{cell::Cell, time::Duration};

use tokio::time::{Instant, sleep_until};

/// Queries of one pod in a second. The thread answers some 20,000.
const RATE: u32 = 2000;
/// Queries that a pod may have answered at once after it was silent.
const BURST: u32 = 1000;

/// Whoever has used its share waits, and what it sends meanwhile waits in its sockets, or is lost
/// there as datagrams are.
#[derive(Debug)]
pub(super) struct QueryShare {
    /// When the share is whole again, if no more queries come.
    whole_at: Cell<Instant>,
}

impl QueryShare {
    const EACH: Duration = Duration::from_micros(1_000_000 / RATE as u64);

    pub(super) fn new() -> Self {
        Self { whole_at: Cell::new(Instant::now()) }
    }

    /// Waits until there is a share left.
    pub(super) async fn available(&self) {
        let ready = self.whole_at.get() - Self::EACH * BURST;
        if ready > Instant::now() {
            sleep_until(ready).await;
        }
    }

    /// Counts one query.
    pub(super) fn take(&self) {
        self.whole_at.set(self.whole_at.get().max(Instant::now()) + Self::EACH);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pod_gets_its_burst_and_then_its_rate() {
        let (share, begin) = (QueryShare::new(), Instant::now());
        for _ in 0..BURST + RATE * 3 {
            share.available().await;
            share.take();
        }
        let took = begin.elapsed().as_secs_f64();
        assert!((2.9..3.1).contains(&took), "{took} s");
        tokio::time::sleep(Duration::from_mins(1)).await;
        let begin = Instant::now();
        for _ in 0..BURST {
            share.available().await;
            share.take();
        }
        assert_eq!(begin.elapsed(), Duration::ZERO, "the burst is there again, and no more than it");
        share.available().await;
        share.take();
        share.available().await;
        assert!(begin.elapsed() > Duration::ZERO);
    }
}
