//! What an earlier watcher left, until the tunnel has come back.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use crate::observe::cgroups::CgroupId;

/// Grace period after a watcher restart during which adopted pods stay ready although no tunnel is
/// connected. Tunnels reconnect within 15 s and carry traffic meanwhile. It begins with the
/// source's first update: before that, no tunnel can be sent its pods.
const GRACE_PERIOD: Duration = Duration::from_secs(20);

/// Pods and tunnels of an earlier watcher.
#[derive(Debug, Default)]
pub(super) struct Adoption {
    /// Netns that a tunnel served, by cookie.
    ready: BTreeSet<u64>,
    tunnels: BTreeSet<CgroupId>,
    /// Until when they count; `None`: the source has not sent an update yet, or it is over.
    until: Option<Instant>,
}

impl Adoption {
    /// Of netns that a tunnel served, and of the cgroups of tunnels.
    pub(super) fn new(ready: BTreeSet<u64>, tunnels: BTreeSet<CgroupId>) -> Self {
        Self { ready, tunnels, until: None }
    }

    /// Whether a tunnel served the netns `cookie`, and may still do so.
    pub(super) fn is_ready(&self, cookie: u64) -> bool {
        self.ready.contains(&cookie)
    }

    /// The cgroups of its tunnels.
    pub(super) fn tunnels(&self) -> &BTreeSet<CgroupId> {
        &self.tunnels
    }

    /// Begins the grace period.
    pub(super) fn begin(&mut self, now: Instant) {
        self.until = Some(now + GRACE_PERIOD);
    }

    /// When the grace period ends.
    pub(super) fn ends_at(&self) -> Option<Instant> {
        self.until
    }

    /// Whether the grace period has just ended; then nothing is adopted any more.
    pub(super) fn end_if_over(&mut self, now: Instant) -> bool {
        let over = self.until.is_some_and(|until| until <= now);
        if over {
            self.end();
        }
        over
    }

    /// Nothing is adopted any more.
    pub(super) fn end(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_watcher_left_counts_until_the_grace_period_ends() {
        let now = Instant::now();
        let mut adoption = Adoption::new([7].into(), [1].into());
        assert!(!adoption.end_if_over(now + GRACE_PERIOD), "it has not begun");
        adoption.begin(now);
        assert!(!adoption.end_if_over(now) && adoption.is_ready(7));
        assert!(adoption.end_if_over(now + GRACE_PERIOD));
        assert!(!adoption.is_ready(7) && adoption.tunnels().is_empty());
        assert!(!adoption.end_if_over(now + GRACE_PERIOD), "it ends once");
    }
}
