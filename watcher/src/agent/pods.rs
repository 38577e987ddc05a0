//! The table of pods: those that the source named, and what is known of each.
//!
//! * `update`: takes in what the source sends

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use tracing::warn;

use crate::{
    model::{
        exclusions::Exclusions,
        pod::{BadEntry, Selection},
        reason::{Reason, ReasonCode},
        state::State,
    },
    observe::{
        Observed, budget,
        cgroups::{self, CgroupId},
    },
    plan::{Eligibility, PodPlan, PodView, claims::Claims, eligibility},
};

use super::pod_entry::{PodEntry, RETRY_PAUSE, UntilFound};

mod update;

/// An entry of the source that is not used, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RejectedEntry {
    /// What could be read of it.
    pub entry: BadEntry,
    /// Why it is not used.
    pub reason: Reason,
}

/// All pods.
#[derive(Debug, Default)]
pub(super) struct PodTable {
    entries: BTreeMap<String, PodEntry>,
    rejected: Vec<RejectedEntry>,
    claims: Claims,
    /// Pods by the ids of their cgroups.
    by_cgroup: HashMap<CgroupId, String>,
    synced: bool,
    /// Plans, by uid, of pods that are not known any more and whose entries may still be applied.
    gone: Vec<(String, PodPlan)>,
    /// The states of those, as they were reported last.
    gone_states: Vec<State>,
    last_rank: u64,
    /// The ids of exclusion lists: equal lists have one id.
    exclusion_ids: HashMap<Arc<Exclusions>, u32>,
    last_exclusion_id: u32,
    /// Whether a pod stays while it runs although the source does not name it any more.
    keeps_running: bool,
    /// Until when no pod is observed that takes its share of time again and again.
    heavy_until: Option<Instant>,
}

/// What an evaluation changed.
#[derive(Debug, Default)]
pub(super) struct Evaluation {
    /// The pods that were evaluated.
    pub uids: BTreeSet<String>,
    /// Pods, already admitted, that are otherwise than before: uid, before, now.
    pub changed: Vec<(String, Eligibility, Eligibility)>,
    /// Whether something became free that another pod may wait for.
    pub freed: bool,
}

impl PodTable {
    /// An empty table. Exclusion lists get ids above `last_exclusion_id`.
    pub(super) fn new(last_exclusion_id: u32) -> Self {
        Self { last_exclusion_id, ..Self::default() }
    }

    /// Has pods stay while they run although the source does not name them any more.
    pub(super) fn keep_running(&mut self) {
        self.keeps_running = true;
    }

    /// Whether they do.
    pub(super) fn keeps_running(&self) -> bool {
        self.keeps_running
    }

    /// Whether the source has named all pods at least once.
    pub(super) fn is_synced(&self) -> bool {
        self.synced
    }

    /// Entries of the source that are not used.
    pub(super) fn rejected(&self) -> &[RejectedEntry] {
        &self.rejected
    }

    /// The pod `uid`.
    pub(super) fn get(&self, uid: &str) -> Option<&PodEntry> {
        self.entries.get(uid)
    }

    /// The pod `uid`.
    pub(super) fn get_mut(&mut self, uid: &str) -> Option<&mut PodEntry> {
        self.entries.get_mut(uid)
    }

    /// The uids of all pods.
    pub(super) fn uids(&self) -> BTreeSet<String> {
        self.entries.keys().cloned().collect()
    }

    /// All pods, in the order of their uids.
    pub(super) fn iter(&self) -> impl Iterator<Item = &PodEntry> + Clone {
        self.entries.values()
    }

    /// All pods as plans see them.
    pub(super) fn views(&self) -> impl Iterator<Item = &PodView> + Clone {
        self.iter().map(|entry| &entry.view)
    }

    /// All pods in the order of the source's list.
    pub(super) fn in_order(&self) -> Vec<&PodEntry> {
        let mut entries: Vec<&PodEntry> = self.entries.values().collect();
        entries.sort_by_key(|entry| entry.rank);
        entries
    }

    /// `uids` in that order, those that are known.
    pub(super) fn ranked(&self, uids: &BTreeSet<String>) -> Vec<String> {
        let mut ranked: Vec<(u64, &String)> =
            uids.iter().filter_map(|uid| Some((self.entries.get(uid)?.rank, uid))).collect();
        ranked.sort_unstable();
        ranked.into_iter().map(|(_, uid)| uid.clone()).collect()
    }

    /// The uid that owns the cgroup directory `path` or one above it, maybe of a pod that is gone.
    pub(super) fn owner_uid(&self, path: &Path) -> Option<&str> {
        self.claims.owner(path)
    }

    /// The pod that owns the cgroup directory `path` or one above it.
    pub(super) fn owner(&self, path: &Path) -> Option<&PodEntry> {
        self.claims.owner(path).and_then(|uid| self.entries.get(uid))
    }

    /// The pods whose source named a cgroup directory that is `path` or above it.
    pub(super) fn with_given_cgroup(&self, path: &Path) -> Vec<String> {
        self.iter()
            .filter(|entry| entry.view.pod.cgroup.as_deref().is_some_and(|dir| path.starts_with(dir)))
            .map(|entry| entry.view.pod.uid.clone())
            .collect()
    }

    /// The pod that the cgroup `id` was last seen in.
    pub(super) fn by_cgroup_mut(&mut self, id: CgroupId) -> Option<&mut PodEntry> {
        self.by_cgroup.get(&id).and_then(|uid| self.entries.get_mut(uid))
    }

    /// The pod that can be enrolled with the netns of this cookie.
    pub(super) fn by_netns_mut(&mut self, cookie: u64) -> Option<&mut PodEntry> {
        let has_it = |entry: &&mut PodEntry| {
            entry.view.eligibility.facts().is_some_and(|facts| facts.cookie == cookie)
        };
        self.entries.values_mut().find(has_it)
    }

    /// When the first pod is looked at for applications on the tunnel's ports.
    pub(super) fn ports_due(&self) -> Option<Instant> {
        self.iter().filter_map(|entry| entry.ports.due()).min()
    }

    /// The pods that are looked at for that now.
    pub(super) fn with_ports_due(&self, now: Instant) -> Vec<String> {
        let due = self.iter().filter(|entry| entry.ports.due().is_some_and(|at| at <= now));
        due.map(|entry| entry.view.pod.uid.clone()).collect()
    }

    /// Has a cgroup entry compared that belongs to no plan yet.
    pub(super) fn add_stray(&mut self, plan: PodPlan) {
        self.gone.push((String::new(), plan));
    }

    /// The plans of pods that are gone, once.
    pub(super) fn take_gone(&mut self) -> Vec<(String, PodPlan)> {
        std::mem::take(&mut self.gone)
    }

    /// The last states of pods that are gone, once.
    pub(super) fn take_gone_states(&mut self) -> Vec<State> {
        std::mem::take(&mut self.gone_states)
    }

    /// Releases what pods among `uids` owned that are not known any more. Whether that was
    /// anything.
    pub(super) fn release_gone(&mut self, uids: &BTreeSet<String>) -> bool {
        let mut freed = false;
        for uid in uids {
            if self.entries.contains_key(uid) {
                continue;
            }
            freed |= !self.claims.of(uid).is_empty();
            self.claims.release(uid);
            self.by_cgroup.retain(|_, of| of != uid);
        }
        freed
    }

    /// Pods that wait for another one to release something or lost something, as they were observed
    /// last.
    pub(super) fn blocked(&mut self) -> Vec<(String, Observed)> {
        let evicted = self.claims.take_evicted();
        self.views()
            .filter(|view| view.eligibility.is_blocked() || evicted.contains(&view.pod.uid))
            .map(|view| (view.pod.uid.clone(), view.observed.clone()))
            .collect()
    }

    /// Evaluates pods by what was observed. `attached` is the cgroup that the programs are attached
    /// to; `enrolled_netns` gives the cookie of the netns that a pod is enrolled with.
    pub(super) fn evaluate(
        &mut self,
        observed: Vec<(String, Observed)>,
        attached: &Path,
        enrolled_netns: impl Fn(&str) -> Option<u64>,
        now: Instant,
    ) -> Evaluation {
        let mut evaluation = Evaluation::default();
        for (uid, observed) in observed {
            let Some(entry) = self.entries.get_mut(&uid) else { continue };
            match observed.unknown() {
                Some(reason) if entry.keeps_verdict(reason, now) => continue,
                Some(_) => {}
                None => entry.doubt = None,
            }
            let before = self.claims.of(&uid);
            let (pod, current) = (&entry.view.pod, enrolled_netns(&uid).or(entry.held_netns));
            let eligibility = eligibility::evaluate(pod, &observed, attached, current, &mut self.claims);
            let closed_netns =
                eligibility::closed_netns(pod, &observed, &eligibility, current, &mut self.claims);
            evaluation.freed |= before.frees(&self.claims.of(&uid)) || self.claims.has_evicted();
            if entry.view.observed.cgroups != observed.cgroups {
                for id in entry.view.observed.cgroups.values() {
                    self.by_cgroup.remove(id);
                }
                self.by_cgroup.extend(observed.cgroups.values().map(|id| (*id, uid.clone())));
            }
            let changed = entry.view.eligibility != eligibility || entry.view.observed != observed;
            if changed && entry.admitted {
                let before = entry.view.eligibility.clone();
                evaluation.changed.push((uid.clone(), before, eligibility.clone()));
            }
            entry.held_netns = match &eligibility {
                Eligibility::Eligible(facts) => Some(facts.cookie),
                Eligibility::Plain(_) => None,
                Eligibility::Waiting(_) | Eligibility::Refused { .. } => current,
            };
            entry.view.eligibility = eligibility;
            entry.view.closed_netns = closed_netns;
            entry.view.observed = observed;
            entry.schedule(now, changed);
            evaluation.uids.insert(uid);
        }
        evaluation
    }

    /// The exclusions of a pod, and their id; 0: they take no entries. Other exclusions have another id,
    /// so that the programs see the old list or the new one and nothing between; equal ones share
    /// theirs.
    pub(super) fn exclusions(&mut self, uid: &str) -> (u32, Arc<Exclusions>) {
        let Some(entry) = self.entries.get_mut(uid) else { return Default::default() };
        let exclusions = entry.exclusions_here();
        (self.exclusion_id(uid, &exclusions), exclusions)
    }

    fn exclusion_id(&mut self, uid: &str, exclusions: &Arc<Exclusions>) -> u32 {
        let Some(entry) = self.entries.get_mut(uid) else { return 0 };
        if !exclusions.takes_entries() {
            entry.exclusions = None;
            return 0;
        }
        if let Some((id, before)) = &entry.exclusions
            && before == exclusions
        {
            return *id;
        }
        let exclusions = Arc::clone(exclusions);
        let id = self.exclusion_ids.get(&exclusions).copied().unwrap_or_else(|| {
            self.last_exclusion_id = self.last_exclusion_id.wrapping_add(1).max(1);
            self.last_exclusion_id
        });
        entry.exclusions = Some((id, Arc::clone(&exclusions)));
        // Of lists that no pod has any more, nothing is remembered.
        let known: BTreeSet<u32> =
            self.iter().filter_map(|entry| Some(entry.exclusions.as_ref()?.0)).collect();
        self.exclusion_ids.retain(|_, id| known.contains(id));
        self.exclusion_ids.insert(exclusions, id);
        id
    }

    /// The ids of the exclusion lists that the pods' last plans name.
    pub(super) fn planned_lists(&self) -> BTreeSet<u32> {
        self.iter().filter_map(|entry| Some(entry.plan.exclusions.as_ref()?.0)).collect()
    }

    /// The pods whose HBONE listeners are served no longer, as their labels are off.
    pub(super) fn left(&self, now: Instant) -> Vec<String> {
        let over = |entry: &PodEntry| entry.leaves_at().is_some_and(|at| at <= now);
        self.iter().filter(|entry| over(entry)).map(|entry| entry.view.pod.uid.clone()).collect()
    }

    /// Ends the grace periods that are over; the pods' uids.
    pub(super) fn end_grace_periods(&mut self, now: Instant) -> Vec<String> {
        let over = self.entries.iter_mut().filter(|(_, entry)| entry.grace_until.is_some_and(|at| at <= now));
        over.map(|(uid, entry)| {
            entry.grace_until = None;
            uid.clone()
        })
        .collect()
    }

    /// Records how the pods that are known by now, and are to be enrolled, should have been treated.
    pub(super) fn set_until_found(&mut self, until_found: UntilFound) {
        let enrolled = |entry: &&mut PodEntry| entry.view.pod.selection == Selection::Enrolled;
        for entry in self.entries.values_mut().filter(enrolled) {
            entry.until_found = until_found;
        }
    }

    /// Ends every grace period.
    pub(super) fn end_all_grace_periods(&mut self) {
        for entry in self.entries.values_mut() {
            entry.grace_until = None;
        }
    }

    /// Records what could not be done for `uid`. It is tried again by the next observation, which
    /// is due soon.
    pub(super) fn set_problem(&mut self, uid: &str, reason: Reason, now: Instant) {
        let Some(entry) = self.entries.get_mut(uid) else { return };
        if entry.problem.as_ref() != Some(&reason) {
            warn!(uid, code = reason.code.code(), reason = reason.text, "pod cannot be enrolled yet");
            entry.problem = Some(reason);
        }
        entry.next_observation.get_or_insert(now + RETRY_PAUSE);
    }

    /// Nothing is wrong with `uid` any more.
    pub(super) fn clear_problem(&mut self, uid: &str) {
        if let Some(entry) = self.entries.get_mut(uid) {
            entry.problem = None;
        }
    }

    /// The maps hold what was planned for `uid`.
    pub(super) fn clear_map_problem(&mut self, uid: &str) {
        let of_maps = [ReasonCode::ExclusionsNotSet, ReasonCode::NotInMaps];
        if let Some(entry) = self.entries.get_mut(uid)
            && entry.problem.as_ref().is_some_and(|problem| of_maps.contains(&problem.code))
        {
            entry.problem = None;
        }
    }

    /// The pods to be observed by now.
    pub(super) fn due(&self, now: Instant) -> Vec<String> {
        let due = self.entries.iter().filter(|(_, entry)| entry.next_observation.is_some_and(|at| at <= now));
        due.map(|(uid, _)| uid.clone()).collect()
    }

    /// Of `uids` those that are to be observed at `now`. A pod that took more than its share of
    /// time is due later, and of those that do so again and again only some are observed, the
    /// longest ago first.
    pub(super) fn within_budget(&mut self, uids: BTreeSet<String>, now: Instant) -> BTreeSet<String> {
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
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.iter()
            .flat_map(|entry| [entry.next_observation, entry.grace_until, entry.leaves_at()])
            .flatten()
            .min()
    }

    /// The directories whose changes matter when inotify is the only source of cgroup events: every
    /// cgroup of the pods, and the directories where pods' cgroups are made, below `attached`.
    ///
    /// # Errors
    /// These cannot be read.
    pub(super) fn directories(&self, attached: &Path) -> io::Result<BTreeSet<PathBuf>> {
        let mut watched: BTreeSet<PathBuf> = self
            .iter()
            .filter(|entry| !entry.is_plain())
            .flat_map(|entry| {
                let observed = &entry.view.observed;
                let parent = observed.dir.as_ref().and_then(|dir| dir.parent()).map(PathBuf::from);
                observed.cgroups.keys().cloned().chain(parent)
            })
            .collect();
        if self.views().any(|view| view.pod.cgroup.is_none()) {
            watched.extend(cgroups::above_pods(attached)?);
        }
        Ok(watched)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::model::pod::{Entry, Pod, Update};

    use super::*;

    fn entry(uid: &str, name: &str) -> Entry {
        Entry::Pod(Arc::new(Pod { uid: uid.to_owned(), name: name.to_owned(), ..Pod::default() }))
    }

    fn names(pods: &PodTable) -> Vec<&str> {
        pods.in_order().into_iter().map(|entry| entry.view.pod.name.as_str()).collect()
    }

    #[test]
    fn updates_change_what_they_name_and_nothing_else() {
        let (mut pods, now) = (PodTable::default(), Instant::now());
        let all =
            |list: &[(&str, &str)]| Update::All(list.iter().map(|(uid, name)| entry(uid, name)).collect());
        assert_eq!(pods.apply_update(all(&[("b", "1"), ("a", "2"), ("b", "3")]), now).len(), 2);
        assert_eq!(names(&pods), ["1", "2"]);
        assert_eq!(pods.rejected()[0].reason.code, ReasonCode::DuplicateUid);
        assert!(pods.apply_update(all(&[("b", "1"), ("a", "2")]), now).is_empty());
        let changes = vec![
            ("c".to_owned(), Some(entry("c", "4"))),
            ("b".to_owned(), None),
            ("unknown".to_owned(), None),
        ];
        assert_eq!(pods.apply_update(Update::Changed(changes), now), ["b".to_owned(), "c".to_owned()].into());
        assert_eq!(names(&pods), ["2", "4"]);
        assert_eq!(pods.apply_update(Update::Unusable("away".to_owned()), now).len(), 0);
        // What became unreadable stays as it was.
        let bad = BadEntry { index: None, uid: Some("a".to_owned()), name: None, problem: "p".to_owned() };
        let left = vec![Entry::Bad(bad)];
        assert_eq!(pods.apply_update(Update::All(left), now), ["c".to_owned()].into());
        assert_eq!((names(&pods), pods.rejected().len()), (vec!["2"], 1));
    }

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

    #[test]
    fn equal_exclusions_share_an_id_and_others_get_another() {
        let (mut pods, now) = (PodTable::new(6), Instant::now());
        let mut id = |uid: &str, ports: &[u16]| {
            let exclusions = Exclusions {
                outbound_ports: ports.iter().map(|port| *port..=*port).collect(),
                ..Exclusions::default()
            };
            let pod = Pod { uid: uid.to_owned(), exclusions: Arc::new(exclusions), ..Pod::default() };
            let update = vec![(uid.to_owned(), Some(Entry::Pod(Arc::new(pod))))];
            pods.apply_update(Update::Changed(update), now);
            pods.exclusions(uid).0
        };
        for (uid, ports, expected) in [
            ("a", &[80][..], 7),
            ("a", &[80], 7),
            ("b", &[80], 7),
            ("a", &[81], 8),
            ("a", &[80], 7),
            ("b", &[], 0),
            ("a", &[], 0),
        ] {
            assert_eq!(id(uid, ports), expected, "{uid} {ports:?}");
        }
        assert_eq!(id("c", &[82]), 9, "no id is given twice");
        assert_eq!(pods.exclusions("unknown").0, 0);
    }
}
