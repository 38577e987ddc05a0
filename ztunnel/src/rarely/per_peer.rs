//! Log lines that others cause at will.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Lines of one peer that may come at once.
const BURST: u32 = 256;
/// Interval of those that follow.
const INTERVAL: Duration = Duration::from_millis(100);
/// Peers that are told apart. More than a node talks to; all further ones share one allowance.
const MOST_PEERS: usize = 4096;
/// Interval of the search for peers that have been silent.
const FORGET_EVERY: Duration = Duration::from_secs(1);

/// An allowance of lines for each peer, so that none fills the log or keeps others out of it.
#[derive(Debug)]
pub(crate) struct PerPeer(Mutex<Peers>);

#[derive(Debug)]
struct Peers {
    all: BTreeMap<IpAddr, Allowance>,
    forgotten: Option<Instant>,
}

#[derive(Debug)]
struct Allowance {
    /// When all of it is there again. Each line moves this by an interval.
    full_at: Instant,
    left_out: u64,
}

impl PerPeer {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Peers { all: BTreeMap::new(), forgotten: None }))
    }

    /// If `peer` may cause a line now: how many of it were left out since the last one.
    pub(crate) fn due(&self, peer: IpAddr) -> Option<u64> {
        self.due_at(peer, Instant::now())
    }

    fn due_at(&self, peer: IpAddr, now: Instant) -> Option<u64> {
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let allowance = peers.of(peer, now);
        let full_at = allowance.full_at.max(now) + INTERVAL;
        if full_at > now + BURST * INTERVAL {
            allowance.left_out += 1;
            return None;
        }
        allowance.full_at = full_at;
        Some(std::mem::take(&mut allowance.left_out))
    }
}

impl Peers {
    fn of(&mut self, mut peer: IpAddr, now: Instant) -> &mut Allowance {
        if self.all.len() >= MOST_PEERS && !self.all.contains_key(&peer) {
            if self.forgotten.is_none_or(|last| now.duration_since(last) >= FORGET_EVERY) {
                self.forgotten = Some(now);
                self.all.retain(|_, allowance| allowance.full_at > now);
            }
            if self.all.len() >= MOST_PEERS {
                peer = Ipv6Addr::UNSPECIFIED.into();
            }
        }
        self.all.entry(peer).or_insert(Allowance { full_at: now, left_out: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u32) -> IpAddr {
        IpAddr::V4((0x0a00_0000 + number).into())
    }

    #[test]
    fn a_peer_has_a_burst_and_then_a_rate_and_the_others_have_theirs() {
        let (lines, now) = (PerPeer::new(), Instant::now());
        for number in 0..1000 {
            assert_eq!(lines.due_at(peer(1), now).is_some(), number < BURST, "{number}");
        }
        assert_eq!(lines.due_at(peer(2), now), Some(0));
        assert_eq!(lines.due_at(peer(1), now + INTERVAL), Some(u64::from(1000 - BURST)));
        assert_eq!(lines.due_at(peer(1), now + INTERVAL), None);
        let later = now + INTERVAL * (BURST + 2);
        assert!((0..BURST).all(|_| lines.due_at(peer(1), later).is_some()));
    }

    #[test]
    fn peers_without_number_share_one_allowance_until_others_are_silent() {
        let (lines, now) = (PerPeer::new(), Instant::now());
        let most = u32::try_from(MOST_PEERS).unwrap();
        let written = (0..most + 10_000).filter(|number| lines.due_at(peer(*number), now).is_some());
        assert_eq!(written.count(), MOST_PEERS + BURST as usize);
        assert_eq!(lines.0.lock().unwrap().all.len(), MOST_PEERS + 1);
        let later = now + INTERVAL * (BURST + 1);
        assert_eq!(lines.due_at(peer(u32::MAX >> 9), later), Some(0));
        assert_eq!(lines.0.lock().unwrap().all.len(), 1, "those that were silent are forgotten");
    }
}
