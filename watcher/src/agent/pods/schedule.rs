//! When something is to be done for which pod: observations, within what a pod may take of the loop's
//! time, and the ends of grace periods.

use std::{collections::BTreeSet, time::Instant};

use super::PodTable;
use crate::{agent::pod_entry::PodEntry, observe::budget};

impl PodTable {
    /// The pods to be observed by now.
    pub(in crate::agent) fn due(&self, now: Instant) -> Vec<String> {
        let due = self.entries.iter().filter(|(_, entry)| entry.next_observation.is_some_and(|at| at <= now));
        due.map(|(uid, _)| uid.clone()).collect()
    }

    /// Of `uids` those that are to be observed at `now`. A pod that took more than its share of
    /// time is due later, and of those that do so again and again only some are observed, the
    /// longest ago first.
    pub(in crate::agent) fn within_budget(
        &mut self,
        uids: BTreeSet<String>,
        now: Instant,
    ) -> BTreeSet<String> {
        let (mut within, mut heavy) = (BTreeSet::new(), Vec::new());
        for uid in uids {
            let is_read = |entry: &&mut PodEntry| entry.view.pod.selection.is_wanted();
            match self.entries.get_mut(&uid).filter(is_read) {
                Some(entry) => match entry.spent.wait_until(now) {
                    Some(until) => entry.next_observation = Some(until),
                    None if entry.spent.is_heavy(now) => heavy.push((entry.spent.at(), uid)),
                    None => drop(within.insert(uid)),
                },
                // Nothing of it is read.
                None => drop(within.insert(uid)),
            }
        }
        heavy.sort_unstable();
        let free = self.heavy_until.is_none_or(|until| until <= now);
        let take = if free { budget::HEAVY_AT_ONCE } else { 0 };
        let later = heavy.split_off(take.min(heavy.len()));
        if !heavy.is_empty() {
            self.heavy_until = Some(now + budget::HEAVY_PAUSE);
        }
        within.extend(heavy.into_iter().map(|(_, uid)| uid));
        for (_, uid) in later {
            if let Some(entry) = self.entries.get_mut(&uid) {
                entry.next_observation = self.heavy_until;
            }
        }
        within
    }

    /// When a pod is to be observed, its grace period ends, or it leaves, next.
    pub(in crate::agent) fn next_due(&self) -> Option<Instant> {
        self.iter()
            .flat_map(|entry| [entry.next_observation, entry.grace_until, entry.leaves_at()])
            .flatten()
            .min()
    }

    /// When the first pod is looked at for applications on the tunnel's ports.
    pub(in crate::agent) fn ports_due(&self) -> Option<Instant> {
        self.iter().filter_map(|entry| entry.ports.due()).min()
    }

    /// The pods that are looked at for that now.
    pub(in crate::agent) fn with_ports_due(&self, now: Instant) -> Vec<String> {
        let due = self.iter().filter(|entry| entry.ports.due().is_some_and(|at| at <= now));
        due.map(|entry| entry.view.pod.uid.clone()).collect()
    }

    /// The pods whose HBONE listeners are served no longer, as their labels are off.
    pub(in crate::agent) fn left(&self, now: Instant) -> Vec<String> {
        let over = |entry: &PodEntry| entry.leaves_at().is_some_and(|at| at <= now);
        self.iter().filter(|entry| over(entry)).map(|entry| entry.view.pod.uid.clone()).collect()
    }

    /// Ends the grace periods that are over; the pods' uids.
    pub(in crate::agent) fn end_grace_periods(&mut self, now: Instant) -> Vec<String> {
        let over = self.entries.iter_mut().filter(|(_, entry)| entry.grace_until.is_some_and(|at| at <= now));
        over.map(|(uid, entry)| {
            entry.grace_until = None;
            uid.clone()
        })
        .collect()
    }

    /// Ends every grace period.
    pub(in crate::agent) fn end_all_grace_periods(&mut self) {
        for entry in self.entries.values_mut() {
            entry.grace_until = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use crate::model::pod::{Entry, Pod, Selection, Update};

    use super::*;

    #[test]
    fn pods_that_take_much_time_are_observed_in_turn_and_the_others_at_once() {
        let (mut pods, now) = (PodTable::default(), Instant::now());
        let uids: Vec<String> = (0..6).map(|n| format!("p{n}")).collect();
        let enrolled = |uid: &String| {
            let (uid, selection) = (uid.clone(), Selection::Enrolled);
            Entry::Pod(Arc::new(Pod { uid, selection, ..Pod::default() }))
        };
        pods.apply_update(Update::All(uids.iter().map(enrolled).collect()), now);
        for (heavy, uid) in uids.iter().take(4).enumerate() {
            let ended = now + budget::HEAVY_PAUSE * u32::try_from(heavy).unwrap() / 1000;
            pods.get_mut(uid).unwrap().spent.add(Duration::from_millis(190), ended);
        }
        let all = || pods_set(&uids);
        let at = |rounds: u32| now + budget::HEAVY_PAUSE * rounds + Duration::from_millis(10);
        let first = pods.within_budget(all(), at(0));
        assert_eq!(first, pods_set(&["p0", "p1", "p4", "p5"]));
        assert_eq!(pods.within_budget(all(), at(0)), pods_set(&["p4", "p5"]), "not before the pause is over");
        assert_eq!(pods.get("p3").unwrap().next_observation, Some(at(1)));
        // Far over its share, it waits by itself.
        pods.get_mut("p0").unwrap().spent.add(Duration::from_secs(1), at(0));
        assert_eq!(pods.within_budget(pods_set(&["p0"]), at(1)), BTreeSet::new());
        assert!(pods.get("p0").unwrap().next_observation > Some(at(10)));
    }

    fn pods_set(uids: &[impl ToString]) -> BTreeSet<String> {
        uids.iter().map(ToString::to_string).collect()
    }
}
