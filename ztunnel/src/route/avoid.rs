//! Endpoints that could not be connected a moment ago.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// How long an endpoint that failed comes after all others.
const AVOIDED_FOR: Duration = Duration::from_secs(10);

/// How many are remembered. Beyond it, those that fail are not avoided.
const MOST: usize = 1024;

/// Added to the rank of an endpoint that has not failed: more than any rank.
const SOUND: usize = 1 << 20;

/// The endpoints that failed, as one worker has found.
#[derive(Debug, Default)]
pub(crate) struct FailedEndpoints(RefCell<HashMap<SocketAddr, Instant>>);

impl FailedEndpoints {
    /// `endpoint` could not be connected.
    pub(crate) fn add(&self, endpoint: SocketAddr) {
        self.add_at(endpoint, Instant::now());
    }

    /// `endpoint` was connected.
    pub(crate) fn remove(&self, endpoint: SocketAddr) {
        let mut failed = self.0.borrow_mut();
        // Mostly there is none.
        if !failed.is_empty() {
            failed.remove(&endpoint);
        }
    }

    fn add_at(&self, endpoint: SocketAddr, now: Instant) {
        let mut failed = self.0.borrow_mut();
        if failed.len() >= MOST {
            failed.retain(|_, at| now.duration_since(*at) < AVOIDED_FOR);
        }
        if failed.len() < MOST {
            failed.insert(endpoint, now);
        }
    }

    fn has(&self, endpoint: SocketAddr, now: impl Fn() -> Instant) -> bool {
        let failed = self.0.borrow();
        if failed.is_empty() {
            return false;
        }
        failed.get(&endpoint).is_some_and(|at| now().duration_since(*at) < AVOIDED_FOR)
    }
}

/// What one connection avoids.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Avoid<'a> {
    /// Those that it has tried.
    pub tried: &'a [SocketAddr],
    /// Those that any connection found failing.
    pub failed: Option<&'a FailedEndpoints>,
}

impl Avoid<'_> {
    /// Whether `endpoint` comes after others, or is not tried at all.
    pub(super) fn avoids(&self, endpoint: SocketAddr) -> bool {
        self.has_failed(endpoint) || self.tried.contains(&endpoint)
    }

    fn has_failed(&self, endpoint: SocketAddr) -> bool {
        self.failed.is_some_and(|failed| failed.has(endpoint, Instant::now))
    }

    /// The rank of `endpoint`, whose rank is `rank` otherwise. `None`: it is not tried.
    ///
    /// A connection starts with one that failed if there is no other, but does not go on to one:
    /// where all are down, every connection would be as many as there are endpoints.
    pub(super) fn rank(&self, rank: usize, endpoint: SocketAddr) -> Option<usize> {
        match (self.has_failed(endpoint), self.tried) {
            (false, tried) => (!tried.contains(&endpoint)).then_some(rank + SOUND),
            (true, []) => Some(rank),
            (true, _) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(port: u16) -> SocketAddr {
        ([10, 0, 0, 1], port).into()
    }

    #[test]
    fn what_failed_comes_last_for_a_moment() {
        let failed = FailedEndpoints::default();
        let avoid = Avoid { tried: &[], failed: Some(&failed) };
        failed.add(at(1));
        assert!(avoid.rank(0, at(2)) > avoid.rank(9, at(1)));
        assert_eq!(avoid.rank(9, at(1)), Some(9), "if there is no other");
        failed.remove(at(1));
        assert_eq!(avoid.rank(0, at(1)), avoid.rank(0, at(2)));
        let now = Instant::now();
        failed.add_at(at(3), now);
        assert!(failed.has(at(3), || now + Duration::from_secs(9)));
        assert!(!failed.has(at(3), || now + Duration::from_secs(10)));
    }

    #[test]
    fn what_was_tried_or_is_known_to_fail_is_not_tried_next() {
        let failed = FailedEndpoints::default();
        failed.add(at(1));
        let tried = [at(2)];
        let avoid = Avoid { tried: &tried, failed: Some(&failed) };
        assert_eq!((avoid.rank(0, at(1)), avoid.rank(0, at(2))), (None, None));
        assert!(avoid.rank(0, at(3)).is_some());
    }

    #[test]
    fn only_so_many_are_remembered() {
        let (failed, now) = (FailedEndpoints::default(), Instant::now());
        for port in 1..=2000 {
            failed.add_at(at(port), now);
        }
        assert_eq!(failed.0.borrow().len(), MOST);
        failed.add_at(at(2001), now + AVOIDED_FOR);
        assert_eq!(failed.0.borrow().len(), 1, "the others are over");
    }
}
