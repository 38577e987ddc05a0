//! The pods, and what is there of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use crate::{
    desired::{BadEntry, Entry, Selection, Update},
    observed::{Observed, cgroups, processes},
    reconcile::{Netns, Verdict, judge::judge},
};

use super::{EAGER, Node};

/// An enrolled pod without any process keeps its netns for so long: between two containers there may be
/// a moment without one.
const EMPTY_FOR: Duration = Duration::from_secs(1);

/// Which pods are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    All,
    /// Those that cannot be enrolled yet.
    Unsettled,
}

impl Node {
    /// Takes over what the source says.
    pub fn take(&mut self, update: Update) {
        match update {
            Update::All(entries) => {
                info!(pods = entries.len(), source = self.source_name, "pods told");
                self.entries = Some(entries);
                self.source_error = None;
            }
            Update::Changed(changes) => {
                let entries = self.entries.get_or_insert_default();
                for (uid, change) in changes {
                    let place = entries.iter().position(|entry| uid_of(entry) == Some(&uid));
                    match (place, change) {
                        (Some(place), Some(entry)) => entries[place] = entry,
                        (Some(place), None) => drop(entries.remove(place)),
                        (None, Some(entry)) => entries.push(entry),
                        (None, None) => {}
                    }
                }
                self.source_error = None;
            }
            Update::Unusable(error) => {
                warn!(source = self.source_name, error, "pods cannot be told, what was told last holds");
                self.source_error = Some(error);
                return;
            }
        }
        let bad = self.entries.iter().flatten().filter_map(|entry| match entry {
            Entry::Bad(bad) => Some(bad.clone()),
            Entry::Pod(_) => None,
        });
        let bad: Vec<BadEntry> = bad.collect();
        for bad in bad.iter().filter(|bad| !self.bad.contains(bad)) {
            let BadEntry { index, uid, name, problem } = bad;
            warn!(index, uid, name, problem, "entry refused");
        }
        self.bad = bad;
        self.eager_until = Instant::now() + EAGER;
    }

    /// Looks at the pods and judges them.
    pub fn look(&mut self, which: Which) {
        let Some(entries) = &self.entries else { return };
        let unplaced = |entry: &Entry| matches!(entry, Entry::Pod(pod) if pod.cgroup.is_none());
        let places =
            if entries.iter().any(unplaced) { cgroups::pods(&self.config.attach) } else { BTreeMap::new() };
        let mut before: BTreeMap<String, (Observed, bool)> = std::mem::take(&mut self.judged)
            .into_iter()
            .map(|judged| {
                let settled = !is_unsettled(&judged.verdict);
                (judged.pod.uid.clone(), (judged.observed, settled))
            })
            .collect();
        let mut pods = Vec::with_capacity(entries.len());
        for entry in entries {
            let Entry::Pod(pod) = entry else { continue };
            let earlier = before.remove(&pod.uid);
            let dir = pod.cgroup.as_ref().or_else(|| places.get(&pod.uid)).cloned();
            let mut observed = match (earlier, &dir) {
                _ if pod.selection != Selection::Enrolled => Observed::default(),
                (_, None) => Observed::default(),
                (Some((observed, true)), _) if which == Which::Unsettled => observed,
                (earlier, Some(dir)) => {
                    let earlier = earlier.map(|(observed, _)| observed);
                    observe(&pod.uid, dir, earlier, &self.host, &mut self.empty_since)
                }
            };
            observed.dir = dir;
            pods.push((Arc::clone(pod), observed));
        }
        let current: BTreeMap<String, u64> =
            self.applied.netns.iter().map(|(cookie, netns)| (netns.uid.clone(), *cookie)).collect();
        self.judged = judge(pods, &self.config.attach, &current);
        self.empty_since.retain(|uid, _| self.judged.iter().any(|judged| judged.pod.uid == *uid));
    }

    pub fn is_unsettled(&self) -> bool {
        self.judged.iter().any(|judged| is_unsettled(&judged.verdict))
    }

    /// The directories whose changes matter: every cgroup of the pods, and where a pod's is made.
    pub fn watched(&self) -> BTreeSet<PathBuf> {
        let enrolled = self.judged.iter().filter(|judged| !matches!(judged.verdict, Verdict::Plain(_)));
        let mut watched: BTreeSet<PathBuf> = enrolled
            .flat_map(|judged| {
                let parent = judged.observed.dir.as_ref().and_then(|dir| dir.parent()).map(PathBuf::from);
                judged.observed.cgroups.keys().cloned().chain(parent)
            })
            .collect();
        if self.judged.iter().any(|judged| judged.pod.cgroup.is_none()) {
            watched.extend(cgroups::above_pods(&self.config.attach));
        }
        watched
    }

    /// Takes over what a predecessor left in netns, so that what is not wanted any more is undone.
    pub fn adopt_netns(&mut self, steered: Vec<u64>) {
        let noted = self.records.netns().iter().map(|(cookie, record)| {
            let netns =
                Netns { id: record.id, pod_cgroup: PathBuf::new(), uid: record.uid.clone(), v6: false };
            (*cookie, netns)
        });
        self.applied.netns = noted.collect();
        for cookie in steered {
            self.applied.netns.entry(cookie).or_insert_with(|| Netns {
                id: crate::observed::netns::NetnsId { dev: 0, inode: 0 },
                pod_cgroup: PathBuf::new(),
                uid: String::new(),
                v6: false,
            });
        }
    }
}

fn observe(
    uid: &str,
    dir: &Path,
    earlier: Option<Observed>,
    host: &BTreeSet<crate::observed::netns::NetnsId>,
    empty_since: &mut BTreeMap<String, Instant>,
) -> Observed {
    let mut observed = processes::observe(dir, host).unwrap_or_else(|error| {
        warn!(uid, %error, "cannot look at the pod's cgroup");
        Observed::default()
    });
    let Some(earlier) = earlier.filter(|_| observed.netns.is_empty() && !observed.cgroups.is_empty()) else {
        empty_since.remove(uid);
        return observed;
    };
    let since = *empty_since.entry(uid.to_owned()).or_insert_with(Instant::now);
    if since.elapsed() < EMPTY_FOR {
        observed.netns = earlier.netns;
    }
    observed
}

/// Whether time alone may change the verdict.
fn is_unsettled(verdict: &Verdict) -> bool {
    match verdict {
        Verdict::Plain(_) | Verdict::Verified(_) => false,
        Verdict::Waiting(_) => true,
        Verdict::Refused { reason, .. } => !matches!(
            reason.code.as_str(),
            "duplicate_uid" | "duplicate_cgroup" | "cgroup_overlaps" | "cgroup_outside"
        ),
    }
}

fn uid_of(entry: &Entry) -> Option<&String> {
    match entry {
        Entry::Pod(pod) => Some(&pod.uid),
        Entry::Bad(bad) => bad.uid.as_ref(),
    }
}
