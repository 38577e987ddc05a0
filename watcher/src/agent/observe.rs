//! What is there of the pods: looking at some of them, and judging what was seen.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use adit_ebpf_common::lifecycle::name;
use tracing::{info, warn};

use crate::{
    model::pod::{Selection, Update},
    observe::{
        Observed, cgroup_path,
        cgroups::{self, CgroupId},
        events::Event,
        netns::NetnsId,
        processes::{self, Look, Sightings},
    },
    plan::{Netns, Verdict, eligibility},
};

use super::{ADOPTION, Node};

/// An enrolled pod without any process keeps its netns for so long: between two containers there may be
/// a moment without one.
const EMPTY_FOR: Duration = Duration::from_secs(1);

/// How soon a pod that is in order is looked at again when its processes come and go.
const AT_EASE: Duration = Duration::from_millis(200);

/// Why pods are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Something told of a change.
    Event,
    /// The periodic scan: what it finds to be otherwise, an event should have told.
    Scan,
}

impl Node {
    /// Takes over what the source says.
    pub fn take(&mut self, update: Update) {
        let before = (self.pods.synced, self.source_error.is_some());
        match &update {
            Update::All(entries) => {
                info!(pods = entries.len(), source = self.source_name, "pods told");
                // What an earlier run left and nobody wants is found by a look at everything only.
                self.dirty.all |= !self.pods.synced;
                if let Some(adopted) = self.adopted.as_mut().filter(|_| !self.pods.synced) {
                    adopted.until = Instant::now() + ADOPTION;
                }
                self.source_error = None;
            }
            Update::Changed(_) => self.source_error = None,
            Update::Unusable(error) => {
                warn!(source = self.source_name, error, "pods cannot be told, what was told last holds");
                self.source_error = Some(error.clone());
            }
        }
        let changed = self.pods.take(update, Instant::now());
        if before != (self.pods.synced, self.source_error.is_some()) {
            self.source_since = super::unix_secs();
        }
        self.dirty.look.extend(changed);
    }

    pub fn on_event(&mut self, event: Event) {
        self.events.told += 1;
        if let Some(source) = self.events.source {
            self.metrics.told(source);
        }
        match event {
            Event::Cgroup { path, closed } => {
                if let Some(id) = closed {
                    self.note_closed(id, &path);
                }
                self.stir(&path);
            }
            Event::Process { cgroup_id } => {
                let Some(known) = self.by_cgroup.get(&cgroup_id).and_then(|uid| self.pods.get_mut(uid))
                else {
                    return;
                };
                // A pod that is in order has nothing to gain.
                if matches!(known.judged.verdict, Verdict::Verified(_)) {
                    let soon = Instant::now() + AT_EASE;
                    known.next_look = Some(known.next_look.map_or(soon, |next| next.min(soon)));
                } else {
                    self.dirty.look.insert(known.judged.pod.uid.clone());
                }
            }
            Event::Lost(count) => {
                warn!(count, "events were lost, everything is looked at");
                self.events.lost += count;
                self.metrics.lost(count);
                self.events.lost_some = true;
            }
        }
    }

    /// The kernel gave a new cgroup its entry; whether it stays is decided when its pod is looked at.
    fn note_closed(&mut self, id: CgroupId, path: &Path) {
        let name = path.file_name().and_then(|given| name(given.as_bytes()));
        if let Some(info) = name.and_then(|name| self.applied.expected.get(&name)) {
            self.applied.cgroups.insert(id, *info);
            self.pods.gone.add_cgroup(id);
            self.dirty.act.extend(cgroup_path::place(path, &self.config.attach).map(|place| place.uid));
        }
    }

    /// Something happened in the cgroup `path`: its pod is looked at.
    pub fn stir(&mut self, path: &Path) {
        if let Some(uid) = self.pods.claims.owner(path) {
            self.dirty.look.insert(uid.to_owned());
        } else if let Some(place) = cgroup_path::place(path, &self.config.attach)
            && self.pods.get(&place.uid).is_some()
        {
            self.places.insert(place.uid.clone(), place.pod_dir);
            self.dirty.look.insert(place.uid);
        } else {
            // A directory that the source named, not by its uid, and that is new.
            let named = self
                .pods
                .all()
                .filter(|known| known.judged.pod.cgroup.as_deref().is_some_and(|dir| path.starts_with(dir)));
            self.dirty.look.extend(named.map(|known| known.judged.pod.uid.clone()));
        }
    }

    /// Looks at the pods that are due and judges them.
    pub fn look(&mut self, cause: Cause) {
        let now = Instant::now();
        let mut uids = std::mem::take(&mut self.dirty.look);
        if cause == Cause::Scan {
            uids.extend(self.pods.uids());
            self.places = cgroups::pods(&self.config.attach);
        }
        let due = self.pods.all_mut().filter(|(_, known)| known.next_look.is_some_and(|at| at <= now));
        uids.extend(due.map(|(uid, _)| uid.clone()));
        if uids.is_empty() {
            return;
        }
        let freed = self.release_gone(&uids);
        let seen = self.observe(&uids);
        let mut freed = self.judge(seen, cause, now) || freed;
        // What one gave up another may be waiting for.
        while std::mem::take(&mut freed) {
            let blocked: Vec<(String, Observed)> = self
                .pods
                .all()
                .filter(|known| eligibility::is_blocked(&known.judged.verdict))
                .map(|known| (known.judged.pod.uid.clone(), known.judged.observed.clone()))
                .collect();
            freed = self.judge(blocked, Cause::Event, now);
        }
        self.dirty.act.extend(uids);
    }

    /// Whether pods among `uids` that are not known any more gave something up.
    fn release_gone(&mut self, uids: &BTreeSet<String>) -> bool {
        let mut freed = false;
        for uid in uids {
            if self.pods.get(uid).is_some() {
                continue;
            }
            freed |= self.pods.claims.held(uid) != eligibility::Held::default();
            self.pods.claims.release(uid);
            self.places.remove(uid);
            self.by_cgroup.retain(|_, of| of != uid);
        }
        freed
    }

    /// What is there of the pods `uids`, in the source's order.
    fn observe(&mut self, uids: &BTreeSet<String>) -> Vec<(String, Observed)> {
        let wants_place = |uid: &String| {
            self.pods.get(uid).is_some_and(|known| {
                known.judged.pod.cgroup.is_none() && self.places.get(uid).is_none_or(|place| !place.exists())
            })
        };
        if uids.iter().any(wants_place) {
            self.places = cgroups::pods(&self.config.attach);
        }
        let mut seen = Vec::new();
        let mut to_visit: Vec<(String, PathBuf)> = Vec::new();
        for uid in self.pods.ranked(uids) {
            let Some(known) = self.pods.get(&uid) else { continue };
            let pod = &known.judged.pod;
            let dir = pod.cgroup.as_ref().or_else(|| self.places.get(&uid)).cloned();
            match dir {
                Some(dir) if pod.selection == Selection::Enrolled => to_visit.push((uid, dir)),
                dir => seen.push((uid, Observed { dir, ..Observed::default() })),
            }
        }
        let (host, pods) = (&self.host, &self.pods);
        let known: Vec<(&PathBuf, &BTreeSet<IpAddr>, &Sightings)> = to_visit
            .iter()
            .filter_map(|(uid, dir)| {
                let known = pods.get(uid)?;
                Some((dir, &known.judged.pod.addresses, &known.sightings))
            })
            .collect();
        let found = self.visitors.visit_each(&known, |visitor, (dir, addresses, sightings)| {
            processes::observe(visitor, dir, addresses, host, sightings)
        });
        for ((uid, dir), found) in to_visit.into_iter().zip(found) {
            let Look { observed, opened, sightings } = found.unwrap_or_else(|error| {
                warn!(uid, %error, "cannot look at the pod's cgroup");
                Look { observed: Observed { dir: Some(dir), ..Observed::default() }, ..Look::default() }
            });
            self.opened.extend(opened.into_iter().map(|(cookie, fd)| (cookie, Arc::new(fd))));
            if let Some(known) = self.pods.get_mut(&uid) {
                known.sightings = sightings;
            }
            let observed = self.keep_empty(&uid, observed);
            seen.push((uid, observed));
        }
        seen
    }

    /// `observed`, with the netns seen before while the pod is only for a moment without any process.
    fn keep_empty(&mut self, uid: &str, mut observed: Observed) -> Observed {
        let Some(known) = self.pods.get_mut(uid) else { return observed };
        let earlier = &known.judged.observed;
        let emptied = observed.netns.is_empty() && !observed.cgroups.is_empty() && !earlier.netns.is_empty();
        if !emptied {
            known.empty_since = None;
            return observed;
        }
        let since = *known.empty_since.get_or_insert_with(Instant::now);
        if since.elapsed() < EMPTY_FOR {
            observed.netns.clone_from(&earlier.netns);
        }
        observed
    }

    /// Judges pods by what was seen of them; whether something became free that another pod may wait for.
    fn judge(&mut self, seen: Vec<(String, Observed)>, cause: Cause, now: Instant) -> bool {
        let mut freed = false;
        for (uid, observed) in seen {
            let Some(known) = self.pods.get(&uid) else { continue };
            let current = self.current(&uid);
            let pod = Arc::clone(&known.judged.pod);
            let before = self.pods.claims.held(&uid);
            let verdict = self.pods.claims.judge(&pod, &observed, &self.config.attach, current);
            freed |= before.frees(&self.pods.claims.held(&uid));
            let Some(known) = self.pods.get_mut(&uid) else { continue };
            let changed = known.judged.verdict != verdict || known.judged.observed != observed;
            if changed && cause == Cause::Scan && known.met {
                self.events.corrections += 1;
                self.metrics.corrected();
                info!(uid, found = ?verdict, before = ?known.judged.verdict, "the scan found what no event told");
            }
            let emptied = known.empty_since.is_some();
            if known.judged.observed.cgroups != observed.cgroups {
                for id in known.judged.observed.cgroups.values() {
                    self.by_cgroup.remove(id);
                }
                self.by_cgroup.extend(observed.cgroups.values().map(|id| (*id, uid.clone())));
            }
            known.judged.verdict = verdict;
            known.judged.observed = observed;
            known.schedule(now, changed);
            if emptied {
                known.next_look = Some(now + EMPTY_FOR / 4);
            }
            self.dirty.act.insert(uid);
        }
        freed
    }

    /// The cookie of the netns that `uid` is enrolled with, maybe by an earlier run.
    fn current(&self, uid: &str) -> Option<u64> {
        let handed_over = self.applied.workloads.get(uid).map(|workload| workload.cookie);
        handed_over.or_else(|| {
            let netns = self.applied.netns.iter().find(|(_, netns)| netns.uid == uid);
            netns.map(|(cookie, _)| *cookie)
        })
    }

    /// The directories whose changes matter where nothing tells of cgroups but inotify: every cgroup of the
    /// pods, and where a pod's is made.
    pub fn watched(&self) -> BTreeSet<PathBuf> {
        let mut watched: BTreeSet<PathBuf> = self
            .pods
            .all()
            .filter(|known| !known.is_plain())
            .flat_map(|known| {
                let observed = &known.judged.observed;
                let parent = observed.dir.as_ref().and_then(|dir| dir.parent()).map(PathBuf::from);
                observed.cgroups.keys().cloned().chain(parent)
            })
            .collect();
        if self.pods.all().any(|known| known.judged.pod.cgroup.is_none()) {
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
                id: NetnsId { dev: 0, inode: 0 },
                pod_cgroup: PathBuf::new(),
                uid: String::new(),
                v6: false,
            });
        }
    }
}
