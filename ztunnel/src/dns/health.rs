//! Which resolvers are known to be away: a query that would wait for them in vain is answered with
//! SERVFAIL at once.
//!
//! Each pod has its own knowledge, since its network policy may forbid what another's allows.

use std::{cell::RefCell, collections::HashMap, net::SocketAddr, time::Duration};

use tokio::time::Instant;

/// A resolver is away when so many queries were lost since it last answered.
const AWAY_AFTER: u32 = 8;
/// While it is away, one query is tried in this time.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// Resolvers of which losses are remembered: a pod may ask any address.
const MOST_RESOLVERS: usize = 32;

#[derive(Debug, Default)]
pub(super) struct ResolverHealth(RefCell<HashMap<SocketAddr, Losses>>);

#[derive(Debug)]
struct Losses {
    count: u32,
    next_probe: Instant,
}

impl ResolverHealth {
    /// Whether a query to `resolver` is worth the wait.
    pub(super) fn may_ask(&self, resolver: SocketAddr) -> bool {
        let (now, mut known) = (Instant::now(), self.0.borrow_mut());
        let Some(losses) = known.get_mut(&resolver).filter(|losses| losses.count >= AWAY_AFTER) else {
            return true;
        };
        let probe = now >= losses.next_probe;
        if probe {
            losses.next_probe = now + PROBE_EVERY;
        }
        probe
    }

    pub(super) fn answered(&self, resolver: SocketAddr) {
        self.0.borrow_mut().remove(&resolver);
    }

    pub(super) fn lost(&self, resolver: SocketAddr) {
        let mut known = self.0.borrow_mut();
        if known.len() >= MOST_RESOLVERS && !known.contains_key(&resolver) {
            known.clear();
        }
        let losses = known.entry(resolver).or_insert_with(|| Losses { count: 0, next_probe: Instant::now() });
        losses.count = losses.count.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolver(number: u16) -> SocketAddr {
        ([192, 0, 2, 1], number).into()
    }

    #[tokio::test(start_paused = true)]
    async fn a_resolver_that_loses_everything_is_asked_once_a_second_until_it_answers() {
        let (health, away, other) = (ResolverHealth::default(), resolver(1), resolver(2));
        for _ in 0..AWAY_AFTER {
            assert!(health.may_ask(away));
            health.lost(away);
        }
        assert!(health.may_ask(away) && !health.may_ask(away) && !health.may_ask(away), "one probe");
        assert!(health.may_ask(other));
        health.lost(away);
        tokio::time::sleep(PROBE_EVERY).await;
        assert!(health.may_ask(away) && !health.may_ask(away), "another one");
        health.answered(away);
        assert!(health.may_ask(away) && health.may_ask(away), "it is back");
    }

    #[test]
    fn what_a_pod_can_make_it_remember_is_bounded() {
        let health = ResolverHealth::default();
        for number in 1..1000 {
            health.lost(resolver(number));
        }
        assert!(health.0.borrow().len() <= MOST_RESOLVERS);
    }
}
