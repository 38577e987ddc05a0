//! Reads from the node what there is of pods: their cgroups, and the netns of their processes.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use crate::{
    apply::OpenNetns,
    model::{
        pod::Pod,
        reason::{Reason, ReasonCode},
        state::State,
    },
    observe::{
        Observed, budget, cgroup_path, cgroups,
        listeners::listeners,
        netns::{self, NetnsId, Visitor, Visitors},
        processes::{self, PodObservation, Subject},
        routes::{self, Outward},
        user_ns::{self, IdMaps},
    },
    source::profiles,
};

use super::pods::{Evaluation, PodTable};

/// Observes pods, and remembers where they are.
#[derive(Debug)]
pub(super) struct Observer {
    /// The cgroup above all pods.
    base: PathBuf,
    /// Netns that no pod may claim.
    host: BTreeSet<NetnsId>,
    visitors: Arc<Visitors>,
    /// Directories of pods that are found by their uid.
    dirs: BTreeMap<String, PathBuf>,
    /// Why these may not be all.
    dirs_unknown: Option<Reason>,
    /// Whether sidecars are looked for.
    finds_sidecars: bool,
    /// How many netns may be kept open.
    most_open: usize,
    /// Netns that were opened by the last observations, until their pods are compared.
    opened: OpenNetns,
}

impl Observer {
    /// For pods below the cgroup `base`.
    pub(super) fn new(base: PathBuf, visitors: Arc<Visitors>, finds_sidecars: bool) -> Self {
        Self {
            base,
            host: netns::host(),
            visitors,
            dirs: BTreeMap::new(),
            dirs_unknown: None,
            finds_sidecars,
            most_open: budget::open_netns(),
            opened: OpenNetns::new(),
        }
    }

    /// The pods whose cgroup `path` is, below which something happened: those to be observed.
    pub(super) fn pods_at(&mut self, path: &Path, pods: &PodTable) -> Vec<String> {
        if let Some(uid) = pods.owner_uid(path) {
            return vec![uid.to_owned()];
        }
        match cgroup_path::resolve(path, &self.base).filter(|pod_path| pods.get(&pod_path.uid).is_some()) {
            Some(pod_path) => {
                self.dirs.insert(pod_path.uid.clone(), pod_path.pod_dir);
                vec![pod_path.uid]
            }
            // A directory that the source named, not by its uid, and that is new.
            None => pods.with_given_cgroup(path),
        }
    }

    /// Reads anew where all pods are. If that fails, what is known holds.
    pub(super) fn find_dirs(&mut self) {
        match cgroups::pods(&self.base) {
            Ok(dirs) => (self.dirs, self.dirs_unknown) = (dirs, None),
            Err(error) => {
                let text = format!("cannot list the pods' cgroups below {}: {error}", self.base.display());
                warn!(error = text, "pods not found anew; what is known of them holds");
                self.dirs_unknown = Some(Reason::new(ReasonCode::NotObserved, text));
            }
        }
    }

    /// Where the pod `uid` was found by its uid.
    pub(super) fn dir(&self, uid: &str) -> Option<&PathBuf> {
        self.dirs.get(uid)
    }

    /// Netns that were opened by the last observations, by cookie.
    pub(super) fn opened(&self) -> &OpenNetns {
        &self.opened
    }

    /// Closes them: an fd keeps a netns alive that its pod has left.
    pub(super) fn close_netns(&mut self) {
        self.opened.clear();
    }

    /// Observes the pods `uids` and evaluates them, and then pods that waited for something that
    /// one of these released. `enrolled` gives the cookie of the netns that a pod is enrolled with.
    pub(super) fn evaluate(
        &mut self,
        pods: &mut PodTable,
        uids: &BTreeSet<String>,
        enrolled: impl Fn(&str) -> Option<u64>,
        now: Instant,
    ) -> Evaluation {
        let mut freed = pods.release_gone(uids);
        for uid in uids.iter().filter(|uid| pods.get(uid).is_none()) {
            self.dirs.remove(uid);
        }
        let observed = self.observe(pods, uids, &enrolled);
        let mut evaluation = pods.evaluate(observed, &self.base, &enrolled, now);
        freed |= evaluation.freed;
        while freed {
            let blocked = pods.blocked();
            let more = pods.evaluate(blocked, &self.base, &enrolled, now);
            evaluation.uids.extend(more.uids);
            freed = more.freed;
        }
        evaluation
    }

    /// What there is of the pods `uids`, in the source's order.
    fn observe(
        &mut self,
        pods: &mut PodTable,
        uids: &BTreeSet<String>,
        enrolled: impl Fn(&str) -> Option<u64>,
    ) -> Vec<(String, Observed)> {
        let is_gone = |dir: &PathBuf| matches!(cgroups::exists(dir), Ok(false));
        let is_lost = |uid: &String| {
            let by_uid = pods.get(uid).is_some_and(|entry| entry.view.pod.cgroup.is_none());
            by_uid && self.dirs.get(uid).is_none_or(is_gone)
        };
        if uids.iter().any(is_lost) {
            self.find_dirs();
        }
        let mut observed = Vec::new();
        let mut to_visit: Vec<(String, PathBuf)> = Vec::new();
        for uid in pods.ranked(uids) {
            let Some(entry) = pods.get(&uid) else { continue };
            let pod = &entry.view.pod;
            let dir = pod.cgroup.as_ref().or_else(|| self.dirs.get(&uid)).cloned();
            match (dir, &self.dirs_unknown) {
                (dir, _) if !pod.selection.is_wanted() => {
                    observed.push((uid, Observed { dir, ..Observed::default() }));
                }
                (Some(dir), _) => to_visit.push((uid, dir)),
                (None, Some(reason)) => observed.push((uid, Observed::not_known(None, reason.clone()))),
                (None, None) => observed.push((uid, Observed::default())),
            }
        }
        // Some at a time, since each comes back with its netns open.
        for batch in to_visit.chunks(self.most_open) {
            for ((uid, _), visit) in batch.iter().zip(self.visit(pods, batch, &enrolled)) {
                let Visit { found, outward, id_maps, took } = visit;
                let PodObservation { observed: found, opened, memory, .. } = found;
                let sidecar = opened.as_ref().and_then(|(_, netns)| self.sidecar(pods, uid, netns.as_fd()));
                let cookie = opened.as_ref().map(|(cookie, _)| *cookie);
                if self.opened.len() < self.most_open {
                    self.opened.extend(opened.map(|(cookie, fd)| (cookie, Arc::new(fd))));
                }
                let Some(entry) = pods.get_mut(uid) else { continue };
                entry.take_in(cookie, outward, id_maps);
                if sidecar.is_some() {
                    entry.sidecar = sidecar;
                } else if entry.sidecar.is_some() && entry.has_ended() {
                    entry.sidecar = None;
                }
                entry.memory = memory;
                entry.spent.add(took, Instant::now());
                observed.push((uid.clone(), entry.keep_netns_while_empty(found)));
            }
        }
        observed
    }

    /// The mesh whose sidecar runs in the pod, as its listeners show it; `None`: none is found, or it is
    /// not time to look. A pod that a tunnel serves has the tunnel's ports taken, so it is looked at
    /// more rarely; one that has a sidecar keeps it until it ends, or the tunnel would take its ports
    /// when the sidecar starts anew.
    fn sidecar(&self, pods: &mut PodTable, uid: &str, netns: BorrowedFd<'_>) -> Option<&'static str> {
        const SELDOM: Duration = Duration::from_secs(20);
        let now = Instant::now();
        let entry = pods.get_mut(uid).filter(|entry| self.finds_sidecars && entry.sidecar.is_none())?;
        let is_early = |at: Instant| entry.state == Some(State::Open) && now < at + SELDOM;
        if entry.sidecar_looked_for.is_some_and(is_early) {
            return None;
        }
        entry.sidecar_looked_for = Some(now);
        let found = netns::run_in(netns, || listeners(&profiles::ports()))
            .inspect_err(|error| debug!(uid, %error, "cannot look for a sidecar"));
        let listeners: Vec<(u16, u32)> =
            found.ok()?.on_ports.iter().map(|socket| (socket.port, socket.uid)).collect();
        if listeners.is_empty() {
            return None;
        }
        let dir = entry.view.pod.cgroup.as_ref().or_else(|| self.dirs.get(uid))?;
        let maps = user_ns::of_netns(netns, dir).ok().flatten()?;
        let about = profiles::of_listeners(&listeners, |user| maps.user(user))?;
        info!(uid, mesh = about, "the pod has a sidecar; it is left alone");
        Some(about)
    }

    fn visit(
        &self,
        pods: &PodTable,
        to_visit: &[(String, PathBuf)],
        enrolled: impl Fn(&str) -> Option<u64>,
    ) -> Vec<Visit> {
        let subjects: Vec<(Subject<'_>, &Pod)> = to_visit
            .iter()
            .filter_map(|(uid, dir)| {
                let entry = pods.get(uid)?;
                let (addresses, memory) = (&entry.view.pod.addresses, &entry.memory);
                let current = enrolled(uid).or(entry.held_netns);
                Some((Subject { dir, addresses, current, memory }, &*entry.view.pod))
            })
            .collect();
        self.visitors.visit_each(&subjects, |visitor, (subject, pod)| {
            let began = Instant::now();
            let found = processes::observe_pod(visitor, *subject, &self.host);
            let netns = found.opened.as_ref().map(|(_, netns)| netns.as_fd());
            Visit {
                outward: netns.and_then(|netns| outward(visitor, pod, netns)),
                id_maps: netns.and_then(|netns| id_maps(pod, subject.dir, netns)),
                found,
                took: began.elapsed(),
            }
        })
    }
}

/// What one visit of a pod found.
struct Visit {
    found: PodObservation,
    /// `None`: it was not asked for, or not found out. So are the others.
    outward: Option<Outward>,
    id_maps: Option<IdMaps>,
    /// How long all of it took.
    took: Duration,
}

/// What the pod's routes send out of interfaces that it excludes, if it does.
fn outward(visitor: &Visitor, pod: &Pod, netns: BorrowedFd<'_>) -> Option<Outward> {
    let patterns = &pod.exclusions.interfaces;
    if patterns.is_empty() {
        return None;
    }
    visitor
        .enter(netns, || routes::outward(patterns))
        .inspect_err(
            |error| warn!(uid = pod.uid, %error, "cannot read the pod's routes; what is known of them holds"),
        )
        .ok()
}

/// How the pod numbers users and groups, if it guards some.
fn id_maps(pod: &Pod, dir: &Path, netns: BorrowedFd<'_>) -> Option<IdMaps> {
    if !pod.exclusions.guards.has_ids() {
        return None;
    }
    user_ns::of_netns(netns, dir)
        .inspect_err(|error| {
            debug!(uid = pod.uid, %error, "cannot read how the pod numbers users; what is known of it holds");
        })
        .ok()
        .flatten()
}
