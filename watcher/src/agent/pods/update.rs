//! Takes in what the source sends: which pods there are, and which are gone.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Instant};

use tracing::warn;

use crate::model::{
    exclusions::Exclusions,
    pod::{BadEntry, Entry, Pod, PodIdentity, Selection, Update},
    reason::{Reason, ReasonCode},
};

use super::{PodEntry, PodTable, RejectedEntry};

impl PodTable {
    /// Applies an update of the source; the uids of pods that are new, changed or gone.
    pub(in crate::agent) fn apply_update(&mut self, update: Update, now: Instant) -> BTreeSet<String> {
        let mut changed = BTreeSet::new();
        match update {
            Update::All(entries) => self.replace_all(entries, now, &mut changed),
            Update::Changed(batch) => {
                for (uid, change) in batch {
                    self.rejected.retain(|rejected| rejected.entry.uid.as_ref() != Some(&uid));
                    match change {
                        Some(entry) => drop(self.set(entry, None, now, &mut changed)),
                        None if self.entries.contains_key(&uid) => {
                            self.remove(&uid, now);
                            changed.insert(uid);
                        }
                        None => {}
                    }
                }
            }
            Update::Unusable(_) | Update::Usable => {}
        }
        changed
    }

    fn replace_all(&mut self, entries: Vec<Entry>, now: Instant, changed: &mut BTreeSet<String>) {
        self.synced = true;
        self.last_rank = 0;
        let before = std::mem::take(&mut self.rejected);
        let mut listed = BTreeSet::new();
        for entry in entries {
            if let Entry::Pod(pod) = &entry
                && listed.contains(&pod.uid)
            {
                self.reject_duplicate(pod);
                continue;
            }
            self.last_rank += 1;
            let rank = self.last_rank;
            listed.extend(self.set(entry, Some(rank), now, changed));
        }
        let gone: Vec<String> = self.entries.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
        for uid in gone {
            self.remove(&uid, now);
            changed.insert(uid);
        }
        let new = self.rejected.iter().filter(|rejected| !before.contains(rejected));
        for RejectedEntry { entry: BadEntry { index, uid, name, .. }, reason } in new {
            warn!(index, uid, name, code = reason.code.code(), reason = reason.text, "entry rejected");
        }
    }

    /// Takes one entry; the uid that it is about. A bad one leaves the last good one of its uid in
    /// force.
    fn set(
        &mut self,
        entry: Entry,
        rank: Option<u64>,
        now: Instant,
        changed: &mut BTreeSet<String>,
    ) -> Option<String> {
        let pod = match entry {
            Entry::Pod(pod) => pod,
            Entry::Bad(entry) => {
                let text = match entry.index {
                    Some(index) => format!("entry {index}: {}", entry.problem),
                    None => entry.problem.clone(),
                };
                let uid = entry.uid.clone();
                self.rejected.push(RejectedEntry { entry, reason: Reason::new(ReasonCode::BadEntry, text) });
                return uid;
            }
        };
        let uid = pod.uid.clone();
        if let Some(entry) = self.entries.get_mut(&uid) {
            entry.rank = rank.unwrap_or(entry.rank);
            if std::mem::take(&mut entry.object_gone) || entry.view.pod != pod {
                entry.view.pod = pod;
                entry.requeue_now(now);
                changed.insert(uid.clone());
            }
        } else {
            let rank = rank.unwrap_or_else(|| {
                self.last_rank += 1;
                self.last_rank
            });
            self.entries.insert(uid.clone(), PodEntry::new(pod, rank, now));
            changed.insert(uid.clone());
        }
        Some(uid)
    }

    fn reject_duplicate(&mut self, pod: &Pod) {
        let text = format!("an earlier pod has the uid {}", pod.uid);
        let (uid, name) = (Some(pod.uid.clone()), Some(pod.name.clone()));
        let entry = BadEntry { index: None, uid, name, problem: text.clone() };
        self.rejected.push(RejectedEntry { entry, reason: Reason::new(ReasonCode::DuplicateUid, text) });
    }

    /// Its source does not name `uid` any more. If processes of it run, it stays until they end.
    fn remove(&mut self, uid: &str, now: Instant) {
        match self.entries.get_mut(uid) {
            Some(entry) if entry.object_gone => {}
            Some(entry) if self.keeps_running && entry.outlives_object() => {
                warn!(uid, code = ReasonCode::ObjectGone.code(), "pod gone from its source while it runs");
                entry.object_gone = true;
                entry.requeue_now(now);
            }
            _ => self.forget(uid),
        }
    }

    /// Adds a pod that an earlier watcher enrolled, that the source does not name, and whose
    /// processes in `cgroup` run. As far as it is `known` who it is, it stays in the mesh, with the
    /// exclusions that it had; otherwise it is closed.
    pub(in crate::agent) fn add_lost(
        &mut self,
        uid: &str,
        known: Option<PodIdentity>,
        exclusions: Exclusions,
        cgroup: PathBuf,
        now: Instant,
    ) {
        let (uid_of, cgroup) = (uid.to_owned(), Some(cgroup));
        let pod = if let Some(known) = known {
            Pod {
                uid: uid_of,
                cgroup,
                name: known.name,
                namespace: known.namespace,
                service_account: known.service_account,
                fail_mode: known.fail_mode,
                dns_capture: known.dns_capture,
                addresses: known.addresses,
                exclusions: Arc::new(exclusions),
                selection: Selection::Enrolled,
                ..Pod::default()
            }
        } else {
            let (name, selection) = (uid_of.clone(), Selection::ObjectGone);
            Pod { uid: uid_of, name, cgroup, selection, ..Pod::default() }
        };
        self.last_rank += 1;
        let mut entry = PodEntry::new(Arc::new(pod), self.last_rank, now);
        entry.object_gone = true;
        warn!(uid, code = ReasonCode::ObjectGone.code(), "pod gone from its source while it runs");
        self.entries.insert(uid.to_owned(), entry);
    }

    /// Forgets those of `uids` whose source does not name them, and whose last process has ended.
    pub(in crate::agent) fn forget_ended(&mut self, uids: &BTreeSet<String>) {
        for uid in uids {
            if self.entries.get(uid).is_some_and(|entry| entry.object_gone && entry.has_ended()) {
                self.forget(uid);
            }
        }
    }

    fn forget(&mut self, uid: &str) {
        if let Some(entry) = self.entries.remove(uid) {
            self.gone.push((uid.to_owned(), entry.plan));
            self.gone_states.extend(entry.state);
        }
    }
}
