//! The table of pods: those that the source named, and what is known of each.
//!
//! * `update`: takes in what the source sends
//! * `schedule`: when something is to be done for which pod
//! * `lists`: the exclusion lists of pods, and their ids

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
        Observed,
        cgroups::{self, CgroupId},
    },
    plan::{Eligibility, PodPlan, PodView, claims::Claims, eligibility},
};

use super::pod_entry::{PodEntry, RETRY_PAUSE, UntilFound};

mod lists;
mod schedule;
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

    /// Records how the pods that are known by now, and are to be enrolled, should have been treated.
    pub(super) fn set_until_found(&mut self, until_found: UntilFound) {
        let enrolled = |entry: &&mut PodEntry| entry.view.pod.selection == Selection::Enrolled;
        for entry in self.entries.values_mut().filter(enrolled) {
            entry.until_found = until_found;
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
}
