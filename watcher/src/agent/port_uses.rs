//! What is known of one pod's applications and the tunnel's ports, and when it is looked at next.

use std::time::{Duration, Instant};

use crate::model::reserved_port::ReservedPortUse;

/// From bind(2) to the listen(2) that follows it.
pub(super) const SETTLED_AFTER: Duration = Duration::from_millis(200);
/// One pod is looked at as often as this.
const PAUSE: Duration = Duration::from_secs(1);
/// After so many changes the pause doubles with each, up to the longest. A pod without changes for
/// `CALM` begins anew.
const CHANGES: u32 = 6;
const LONGEST: Duration = Duration::from_mins(1);
const CALM: Duration = Duration::from_mins(10);

/// What is known of a pod's applications and the tunnel's ports.
#[derive(Debug, Default)]
pub(super) struct PortUses {
    /// Those that use one.
    pub using: Vec<ReservedPortUse>,
    /// When its netns is looked at.
    due: Option<Instant>,
    looked_at: Option<Instant>,
    changes: u32,
    changed_at: Option<Instant>,
}

impl PortUses {
    /// Has the netns looked at soon.
    pub(super) fn look_soon(&mut self, now: Instant) {
        let at = self.looked_at.map_or(now, |last| last + self.pause(now)).max(now + SETTLED_AFTER);
        self.due.get_or_insert(at);
    }

    fn pause(&self, now: Instant) -> Duration {
        if self.changed_at.is_none_or(|last| last + CALM < now) {
            return PAUSE;
        }
        let doubled = self.changes.saturating_sub(CHANGES).min(u32::BITS - 1);
        PAUSE.saturating_mul(1 << doubled).min(LONGEST)
    }

    /// The pod has had its share of time: it is looked at then.
    pub(super) fn put_off(&mut self, until: Instant) {
        self.due = Some(until);
    }

    /// Whether `found`, maybe without names, are others than those that are known.
    pub(super) fn differ(&self, found: &[ReservedPortUse]) -> bool {
        let has = |all: &[ReservedPortUse], one: &ReservedPortUse| all.iter().any(|other| other.is_like(one));
        found.iter().any(|one| !has(&self.using, one)) || self.using.iter().any(|one| !has(found, one))
    }

    /// When it is looked at.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// It is looked at now.
    pub(super) fn looked(&mut self, now: Instant) {
        (self.due, self.looked_at) = (None, Some(now));
    }

    /// Replaces what is known by `found`. A use that lasts keeps the name that it had first: what an
    /// application calls itself would otherwise be news each time. Whether anything is new.
    pub(super) fn set(&mut self, mut found: Vec<ReservedPortUse>, now: Instant) -> bool {
        found.sort_by_key(|using| (using.port, using.is_udp, !using.listens));
        found.dedup_by(|later, earlier| later.is_like(earlier));
        for using in &mut found {
            if let Some(before) = self.using.iter().find(|before| before.is_like(using)) {
                using.process = before.process.clone().or_else(|| using.process.take());
            }
        }
        let told = |all: &[ReservedPortUse]| all.iter().map(ReservedPortUse::describe).collect::<Vec<_>>();
        let is_new = told(&found) != told(&self.using);
        self.using = found;
        if is_new {
            let is_calm = self.changed_at.is_none_or(|last| last + CALM < now);
            self.changes = if is_calm { 1 } else { self.changes.saturating_add(1) };
            self.changed_at = Some(now);
        }
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_use_that_lasts_is_told_once_whatever_its_process_is_called() {
        let mut uses = PortUses::default();
        let named = |name: &str, pid| ReservedPortUse {
            port: 15001,
            is_udp: false,
            listens: false,
            process: Some(name.to_owned()),
            pid: Some(pid),
        };
        let now = Instant::now();
        assert!(uses.differ(&[named("a", 1)]) && !uses.differ(&[]));
        assert!(uses.set(vec![named("a", 1), named("b", 2)], now));
        assert!(!uses.set(vec![named("c", 3)], now));
        assert_eq!(uses.using, [named("a", 3)]);
        assert!(!uses.differ(&[named("d", 4)]) && uses.differ(&[]));
        assert!(uses.set(vec![ReservedPortUse { listens: true, ..named("c", 3) }], now));
        assert!(uses.set(Vec::new(), now) && !uses.set(Vec::new(), now));
    }

    #[test]
    fn a_pod_whose_uses_come_and_go_is_looked_at_ever_more_rarely() {
        let (begin, mut uses) = (Instant::now(), PortUses::default());
        let using = ReservedPortUse { port: 15001, is_udp: false, listens: true, process: None, pid: None };
        let (mut now, mut looks) = (begin, 0);
        while now < begin + Duration::from_hours(1) {
            uses.look_soon(now);
            now = uses.due().unwrap();
            uses.looked(now);
            looks += 1;
            uses.set(if looks % 2 == 0 { Vec::new() } else { vec![using.clone()] }, now);
        }
        assert!((60..80).contains(&looks), "{looks} looks in an hour");
        uses.looked(now + 2 * CALM);
        uses.look_soon(now + 2 * CALM);
        assert_eq!(uses.due(), Some(now + 2 * CALM + PAUSE));
    }

    #[test]
    fn a_pod_that_tries_again_and_again_is_looked_at_once_a_second() {
        let (now, mut uses) = (Instant::now(), PortUses::default());
        uses.look_soon(now);
        uses.look_soon(now + SETTLED_AFTER / 2);
        assert_eq!(uses.due(), Some(now + SETTLED_AFTER));
        uses.looked(now);
        uses.look_soon(now);
        assert_eq!(uses.due(), Some(now + PAUSE));
    }
}
