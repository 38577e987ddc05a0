//! The pods file, and what is there of its pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use crate::{
    desired::{
        Pod,
        pods_file::{self, Entry},
        selection,
    },
    observed::{Observed, processes},
    reconcile::{Netns, Verdict, judge::judge},
};

use super::{EAGER, Node, chain};

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
    /// Reads the pods file again. One that cannot be used leaves the last good one in force, and so does
    /// an entry that cannot be used: a typing error must not take a pod out of the mesh.
    pub fn load_file(&mut self) {
        match pods_file::read(&self.config.pods_file, &self.config.cgroup_root) {
            Ok(entries) => {
                let entries = keep_last_good(entries, self.entries.as_deref().unwrap_or_default());
                if self.file_error.take().is_some() {
                    info!("the pods file can be used again");
                }
                if self.entries.as_ref() != Some(&entries) {
                    self.take_entries(entries);
                }
            }
            Err(error) => {
                let error = chain(&error);
                if self.file_error.as_ref() != Some(&error) {
                    warn!(
                        error,
                        kept_pods = self.judged.len(),
                        "pods file not used, the last good one holds"
                    );
                    self.file_error = Some(error);
                }
            }
        }
    }

    fn take_entries(&mut self, entries: Vec<Entry>) {
        self.bad.clear();
        for entry in &entries {
            if let Entry::Bad(bad) = entry {
                warn!(
                    index = bad.index,
                    uid = bad.uid,
                    name = bad.name,
                    problem = bad.problem,
                    "entry refused"
                );
                self.bad.push(bad.clone());
            }
        }
        info!(pods = entries.len() - self.bad.len(), refused = self.bad.len(), "pods file read");
        self.entries = Some(entries);
        self.eager_until = Instant::now() + EAGER;
    }

    /// Looks at the pods and judges them.
    pub fn look(&mut self, which: Which) {
        let Some(entries) = &self.entries else { return };
        let mut before: BTreeMap<String, (Observed, bool)> = std::mem::take(&mut self.judged)
            .into_iter()
            .map(|judged| {
                let settled = !is_unsettled(&judged.verdict);
                (judged.pod.uid, (judged.observed, settled))
            })
            .collect();
        let mut pods = Vec::with_capacity(entries.len());
        for entry in entries {
            let Entry::Pod(pod) = entry else { continue };
            let earlier = before.remove(&pod.uid);
            let observed = match earlier {
                _ if !selection::is_enrolled(pod) => Observed::default(),
                Some((observed, true)) if which == Which::Unsettled => observed,
                earlier => {
                    observe(pod, earlier.map(|(observed, _)| observed), &self.host, &mut self.empty_since)
                }
            };
            pods.push((pod.clone(), observed));
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
        let enrolled = self.judged.iter().filter(|judged| judged.verdict != Verdict::Plain);
        enrolled
            .flat_map(|judged| {
                let parent = judged.pod.cgroup.parent().map(PathBuf::from);
                judged.observed.cgroups.keys().cloned().chain(parent)
            })
            .collect()
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
    pod: &Pod,
    earlier: Option<Observed>,
    host: &BTreeSet<crate::observed::netns::NetnsId>,
    empty_since: &mut BTreeMap<String, Instant>,
) -> Observed {
    let mut observed = processes::observe(&pod.cgroup, host).unwrap_or_else(|error| {
        warn!(uid = pod.uid, %error, "cannot look at the pod's cgroup");
        Observed::default()
    });
    let Some(earlier) = earlier.filter(|_| observed.netns.is_empty() && !observed.cgroups.is_empty()) else {
        empty_since.remove(&pod.uid);
        return observed;
    };
    let since = *empty_since.entry(pod.uid.clone()).or_insert_with(Instant::now);
    if since.elapsed() < EMPTY_FOR {
        observed.netns = earlier.netns;
    }
    observed
}

/// Whether time alone may change the verdict.
fn is_unsettled(verdict: &Verdict) -> bool {
    match verdict {
        Verdict::Plain | Verdict::Verified(_) => false,
        Verdict::Waiting(_) => true,
        Verdict::Refused { reason, .. } => !matches!(
            reason.code.as_str(),
            "duplicate_uid" | "duplicate_cgroup" | "cgroup_overlaps" | "cgroup_outside"
        ),
    }
}

/// `entries`, where a bad one gives way to the good one of the same uid before it.
fn keep_last_good(entries: Vec<Entry>, before: &[Entry]) -> Vec<Entry> {
    let earlier = |uid: &str| {
        before.iter().find_map(|entry| match entry {
            Entry::Pod(pod) if pod.uid == uid => Some(pod.clone()),
            _ => None,
        })
    };
    entries
        .into_iter()
        .map(|entry| {
            let Entry::Bad(bad) = &entry else { return entry };
            let Some(mut pod) = bad.uid.as_deref().and_then(earlier) else { return entry };
            pod.notes = vec![format!("entry not used, the last good one holds: {}", bad.problem)];
            Entry::Pod(pod)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_bad_entry_gives_way_to_the_last_good_one() {
        let parse = |text: &str| pods_file::parse(text, Path::new("/cgroup")).unwrap();
        let good = parse("pods: [{uid: a, name: a, cgroup: a}]");
        let bad = "pods: [{uid: a, name: a, cgruop: a}, {uid: b, name: b}]";
        let kept = keep_last_good(parse(bad), &good);
        let [Entry::Pod(pod), Entry::Bad(_)] = kept.as_slice() else { panic!("{kept:?}") };
        assert_eq!(pod.cgroup, Path::new("/cgroup/a"));
        assert!(pod.notes[0].contains("cgruop") || pod.notes[0].contains("cgroup"), "{:?}", pod.notes);
        // And once more, when it is the kept one that came before.
        assert!(matches!(keep_last_good(parse(bad), &kept)[0], Entry::Pod(_)));
    }
}
