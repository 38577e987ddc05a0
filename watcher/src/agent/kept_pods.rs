//! Pods that a tunnel serves which is not connected: one that an earlier watcher left, or one whose
//! connection ended a moment ago.
//!
//! The connection is not the data path. A tunnel whose connection ended, or whose watcher did,
//! serves on, and comes back within 15 s. Its listeners tell: the kernel closes them with the
//! process, and the programs look for them with each connection. So such a pod stays open while the
//! listeners are there, for a while.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use crate::observe::cgroups::CgroupId;

/// How long pods are kept: longer than tunnels take to reconnect. After a restart of the watcher it
/// begins with the source's first update: before that, no tunnel can be sent its pods.
const GRACE_PERIOD: Duration = Duration::from_secs(20);

/// How soon after the end of a connection the listeners are looked for again, at first and then.
/// The kernel closes a process's sockets one after the other.
const FIRST_CHECK: Duration = Duration::from_millis(50);
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// The pods, and their tunnels.
#[derive(Debug, Default)]
pub(super) struct KeptPods {
    /// Netns that a tunnel serves, by cookie.
    ready: BTreeSet<u64>,
    tunnels: BTreeSet<CgroupId>,
    /// Until when they count; `None`: the source has not sent an update yet, or it is over.
    until: Option<Instant>,
    /// When the listeners are looked for again.
    next_check: Option<Instant>,
}

impl KeptPods {
    /// Those of an earlier watcher: netns that a tunnel served, and the cgroups of tunnels.
    pub(super) fn new(ready: BTreeSet<u64>, tunnels: BTreeSet<CgroupId>, now: Instant) -> Self {
        let next_check = (!ready.is_empty()).then_some(now);
        Self { ready, tunnels, until: None, next_check }
    }

    /// Adds the netns that a tunnel in the cgroup `tunnel` served when its connection ended.
    pub(super) fn add(&mut self, ready: BTreeSet<u64>, tunnel: CgroupId, now: Instant) {
        if ready.is_empty() {
            return;
        }
        self.ready.extend(ready);
        self.tunnels.insert(tunnel);
        self.next_check = Some(now + FIRST_CHECK);
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }

    /// Whether a tunnel that is not connected serves the netns `cookie`.
    pub(super) fn is_ready(&self, cookie: u64) -> bool {
        self.ready.contains(&cookie)
    }

    /// The cgroups of these tunnels.
    pub(super) fn tunnels(&self) -> &BTreeSet<CgroupId> {
        &self.tunnels
    }

    /// Begins the grace period, anew if it has begun.
    pub(super) fn begin(&mut self, now: Instant) {
        self.until = Some(now + GRACE_PERIOD);
    }

    /// When the grace period ends.
    pub(super) fn ends_at(&self) -> Option<Instant> {
        self.until
    }

    /// When [`Self::keep_live`] is to be called.
    pub(super) fn next_check(&self) -> Option<Instant> {
        self.next_check
    }

    /// Drops the pods of netns without a listener of a tunnel; `live` are those with one. Whether
    /// there were any.
    pub(super) fn keep_live(&mut self, live: &BTreeSet<u64>, now: Instant) -> bool {
        let before = self.ready.len();
        self.ready.retain(|cookie| live.contains(cookie));
        self.next_check = (!self.ready.is_empty()).then_some(now + CHECK_INTERVAL);
        self.ready.len() < before
    }

    /// The listeners could not be listed: looked for again after a pause.
    pub(super) fn check_later(&mut self, now: Instant) {
        self.next_check = Some(now + CHECK_INTERVAL);
    }

    /// Whether the grace period has just ended; then none is kept any more.
    pub(super) fn end_if_over(&mut self, now: Instant) -> bool {
        let over = self.until.is_some_and(|until| until <= now);
        if over {
            self.end();
        }
        over
    }

    /// None is kept any more.
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
        let mut kept = KeptPods::new([7].into(), [1].into(), now);
        assert!(!kept.end_if_over(now + GRACE_PERIOD), "it has not begun");
        kept.begin(now);
        assert!(!kept.end_if_over(now) && kept.is_ready(7));
        assert!(kept.end_if_over(now + GRACE_PERIOD));
        assert!(!kept.is_ready(7) && kept.tunnels().is_empty());
        assert!(!kept.end_if_over(now + GRACE_PERIOD), "it ends once");
    }

    #[test]
    fn pods_of_a_lost_connection_are_kept_while_their_netns_have_listeners() {
        let now = Instant::now();
        let mut kept = KeptPods::default();
        kept.add(BTreeSet::new(), 1, now);
        assert!(kept.is_empty() && kept.next_check().is_none());
        kept.add([7, 8].into(), 1, now);
        kept.begin(now);
        assert_eq!(kept.next_check(), Some(now + FIRST_CHECK));
        assert!(!kept.keep_live(&[7, 8, 9].into(), now));
        assert!(kept.keep_live(&[8].into(), now) && !kept.is_ready(7) && kept.is_ready(8));
        assert_eq!(kept.next_check(), Some(now + CHECK_INTERVAL));
        assert!(kept.keep_live(&BTreeSet::new(), now) && kept.is_empty());
        assert_eq!(kept.next_check(), None);
    }
}
