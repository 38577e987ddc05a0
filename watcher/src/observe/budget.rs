//! How much of one pod is looked at. A pod decides by itself how many processes, netns, addresses
//! and cgroups it has, so without limits one pod could keep the watcher from all others.
//!
//! What proves a pod's netns comes first, so that an ordinary pod never meets these limits.

use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};

/// Cgroups at and below the pod's directory. A container with an init system has some hundred.
pub(crate) const CGROUPS: usize = 256;
/// Processes, of all cgroups together. Each costs a call of stat(2).
pub(crate) const PROCESSES: usize = 4096;
/// Netns that are entered.
pub(crate) const NETNS: usize = 32;
/// Addresses of a netns, those of its loopback included.
pub(crate) const ADDRESSES: usize = 1024;
/// Addresses of a pod that its source does not tell, and that count as its own all the same.
pub(crate) const SPARE_ADDRESSES: usize = 8;
/// Processes of one netns that are asked whether they will stay there.
pub(crate) const YOUNG_PROCESSES: usize = 4;
/// Time for one observation.
const TIME: Duration = Duration::from_millis(100);

/// How many netns of pods are kept open between their observation and what follows: a share of the
/// descriptors that this process may have. The others are for tunnels, commands and the API server.
pub(crate) fn open_netns() -> usize {
    const SHARE: u64 = 8;
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    usize::try_from(limit / SHARE).unwrap_or(usize::MAX).clamp(8, 4096)
}

/// When an observation that begins now must have ended.
pub(crate) fn deadline() -> Instant {
    Instant::now() + TIME
}

/// How much of the watcher's time one pod may take: so much at once, and after that a share.
const BURST: Duration = Duration::from_millis(200);
/// One part in so many.
const SHARE: u32 = 10;
/// Of pods that take their share again and again so many are observed at once, with this pause
/// after it: together they take no more than one of them could.
pub(crate) const HEAVY_AT_ONCE: usize = 2;
pub(crate) const HEAVY_PAUSE: Duration = Duration::from_millis(500);

/// The time that the observations of one pod took, less what it has regained since.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    debt: Duration,
    at: Option<Instant>,
}

impl Spent {
    /// What it owes at `now`.
    fn debt(&self, now: Instant) -> Duration {
        let since = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.debt.saturating_sub(since / SHARE)
    }

    /// An observation that ended at `now` took so long.
    pub(crate) fn add(&mut self, took: Duration, now: Instant) {
        *self = Self { debt: self.debt(now) + took, at: Some(now) };
    }

    /// When the pod may be observed next, if not at `now`.
    pub(crate) fn wait_until(&self, now: Instant) -> Option<Instant> {
        let over = self.debt(now).checked_sub(BURST).filter(|over| !over.is_zero())?;
        Some(now + over * SHARE)
    }

    /// Whether the pod has taken so much that others go first.
    pub(crate) fn is_heavy(&self, now: Instant) -> bool {
        self.debt(now) > BURST / 4 * 3
    }

    /// When it was observed last.
    pub(crate) fn at(&self) -> Option<Instant> {
        self.at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_takes_its_time_again_and_again_gets_a_share_of_it() {
        let (began, look) = (Instant::now(), Duration::from_millis(20));
        let (mut spent, mut now, mut looks) = (Spent::default(), began, 0);
        while now < began + Duration::from_secs(20) {
            if let Some(until) = spent.wait_until(now) {
                assert!(until > now);
                now = until;
            }
            now += look;
            spent.add(look, now);
            looks += 1;
        }
        // 20 s / 10 / 20 ms, and the first ten.
        assert!((100..125).contains(&looks), "{looks} looks of 20 ms in 20 s");
        assert_eq!(spent.wait_until(now + Duration::from_mins(1)), None, "all is regained");
    }

    #[test]
    fn a_pod_that_starts_is_looked_at_as_often_as_it_changes() {
        let (began, look) = (Instant::now(), Duration::from_millis(1));
        let mut spent = Spent::default();
        for number in 1..150 {
            let now = began + look * number;
            assert_eq!(spent.wait_until(now), None);
            spent.add(look, now);
        }
    }
}
