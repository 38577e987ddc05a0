//! Which tunnels are connected, what they were offered, and which pods each acknowledged.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use crate::{
    observe::cgroups::CgroupId,
    plan::{PodWorkload, Reason, diff::TunnelStep},
};

use super::{
    OpenNetns,
    zds_server::{Admission, ConnId, OfferId, ZdsCommand},
};

/// How soon a pod that a tunnel refused is offered again, at first and at most, before jitter.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(15);

/// The tunnels, and what is offered to them.
#[derive(Debug, Default)]
pub(crate) struct Tunnels {
    connected: BTreeMap<ConnId, ConnectedTunnel>,
    /// What is offered, by uid.
    workloads: BTreeMap<String, PodWorkload>,
    /// The serial of each pod's present offer, by uid.
    serials: BTreeMap<String, u64>,
    last_serial: u64,
    /// Why the last tunnel that was rejected was.
    rejected: Option<Reason>,
}

/// A connected tunnel.
#[derive(Debug)]
pub(crate) struct ConnectedTunnel {
    /// Its process.
    pub pid: i32,
    /// Its cgroup directory.
    pub cgroup: PathBuf,
    /// The id of that.
    pub cgroup_id: CgroupId,
    link: Link,
    /// Offers that it acknowledged, by uid.
    acknowledged: BTreeMap<String, u64>,
    failed: BTreeMap<String, Failure>,
}

impl ConnectedTunnel {
    /// How many pods it serves.
    #[must_use]
    pub(crate) fn pods(&self) -> usize {
        self.acknowledged.len()
    }
}

/// A tunnel whose connection ended.
#[derive(Debug)]
pub(crate) struct LostTunnel {
    /// The id of its cgroup.
    pub cgroup_id: CgroupId,
    /// The netns that it served, by cookie.
    pub served: BTreeSet<u64>,
}

/// The way to a tunnel.
#[derive(Debug)]
enum Link {
    /// It gets nothing yet. The first message must name every pod, since the tunnel lets go of all
    /// others: a tunnel that served them for an earlier watcher would close their connections.
    Waiting(oneshot::Sender<Admission>),
    Open(mpsc::UnboundedSender<ZdsCommand>),
}

impl Link {
    /// Whether the tunnel will get `command`. One that still waits gets a snapshot instead.
    fn send(&self, command: ZdsCommand) -> bool {
        match self {
            Self::Waiting(_) => false,
            Self::Open(commands) => commands.send(command).is_ok(),
        }
    }
}

/// A pod that a tunnel refused.
#[derive(Debug)]
struct Failure {
    error: String,
    pauses: ExponentialBackoff,
    /// `None`: offered again, not answered yet.
    retry_at: Option<Instant>,
}

impl Tunnels {
    /// How many are connected.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        self.connected.len()
    }

    /// Whether none is connected.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.connected.is_empty()
    }

    /// The connected ones.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &ConnectedTunnel> {
        self.connected.values()
    }

    /// What is offered, by uid.
    #[must_use]
    pub(crate) fn workloads(&self) -> &BTreeMap<String, PodWorkload> {
        &self.workloads
    }

    /// Why the last tunnel that was rejected was; `None` once one was admitted.
    #[must_use]
    pub(crate) fn rejected(&self) -> Option<&Reason> {
        self.rejected.as_ref()
    }

    /// Whether any tunnel serves the present offer of `uid`.
    #[must_use]
    pub(crate) fn serve(&self, uid: &str) -> bool {
        let Some(serial) = self.serials.get(uid) else { return false };
        self.connected.values().any(|tunnel| tunnel.acknowledged.get(uid) == Some(serial))
    }

    /// The error of a tunnel that refused `uid`.
    #[must_use]
    pub(crate) fn refusal(&self, uid: &str) -> Option<&str> {
        self.connected
            .values()
            .find_map(|tunnel| tunnel.failed.get(uid))
            .map(|failure| failure.error.as_str())
    }

    /// The cgroups of the connected tunnels.
    #[must_use]
    pub(crate) fn cgroup_ids(&self) -> BTreeSet<CgroupId> {
        self.connected.values().map(|tunnel| tunnel.cgroup_id).collect()
    }

    /// Adds the tunnel of process `pid`. It gets its first message by [`Self::send_snapshots`].
    pub(crate) fn admit(
        &mut self,
        conn: ConnId,
        pid: i32,
        cgroup: (PathBuf, CgroupId),
        admission: oneshot::Sender<Admission>,
    ) {
        let (cgroup, cgroup_id) = cgroup;
        info!(pid, cgroup = %cgroup.display(), "tunnel connected");
        let (link, acknowledged, failed) = (Link::Waiting(admission), BTreeMap::new(), BTreeMap::new());
        self.rejected = None;
        self.connected.insert(conn, ConnectedTunnel { pid, cgroup, cgroup_id, link, acknowledged, failed });
    }

    /// Records why the tunnel of process `pid` is rejected.
    pub(crate) fn reject(&mut self, pid: i32, reason: Reason) {
        if self.rejected.as_ref() != Some(&reason) {
            warn!(pid, code = reason.code.code(), reason = reason.text, "tunnel rejected");
            self.rejected = Some(reason);
        }
    }

    /// Removes a tunnel whose connection ended; `None`: it was not connected.
    pub(crate) fn remove(&mut self, conn: ConnId, reason: &str) -> Option<LostTunnel> {
        let tunnel = self.connected.remove(&conn)?;
        warn!(tunnel.pid, reason, others = self.connected.len(), "tunnel disconnected");
        let present =
            tunnel.acknowledged.iter().filter(|(uid, serial)| self.serials.get(*uid) == Some(serial));
        let served = present.filter_map(|(uid, _)| Some(self.workloads.get(uid)?.cookie)).collect();
        Some(LostTunnel { cgroup_id: tunnel.cgroup_id, served })
    }

    /// Does `step` and records it. `ready` has the netns that are open already. After a withdrawal:
    /// the cookie of the netns, and the acknowledgements to wait for.
    pub(crate) fn apply(
        &mut self,
        step: &TunnelStep,
        ready: &OpenNetns,
    ) -> Option<(u64, BTreeSet<(ConnId, u64)>)> {
        match step {
            TunnelStep::Withdraw(uid) => {
                let pending = self.withdraw(uid);
                let workload = self.workloads.remove(uid)?;
                info!(uid, "pod left the mesh");
                Some((workload.cookie, pending))
            }
            TunnelStep::Offer(uid, workload) => {
                self.offer(uid, workload, ready.get(&workload.cookie));
                self.workloads.insert(uid.clone(), workload.clone());
                None
            }
        }
    }

    fn next_offer(&mut self, uid: &str) -> OfferId {
        self.last_serial += 1;
        OfferId { uid: uid.to_owned(), serial: self.last_serial }
    }

    fn offer(&mut self, uid: &str, workload: &PodWorkload, netns: Option<&Arc<OwnedFd>>) {
        let offer = self.next_offer(uid);
        self.serials.insert(uid.to_owned(), offer.serial);
        for tunnel in self.connected.values_mut() {
            tunnel.failed.remove(uid);
            tunnel.link.send(ZdsCommand::Add(offer.clone(), workload.clone(), netns.cloned()));
        }
    }

    /// Has every tunnel listen anew for `uid`, by letting go of the pod and getting it again.
    pub(crate) fn listen_anew(&mut self, uid: &str, netns: &Arc<OwnedFd>) {
        if let Some(workload) = self.workloads.get(uid).cloned() {
            self.withdraw(uid);
            self.offer(uid, &workload, Some(netns));
        }
    }

    /// Has every tunnel let go of `uid`; the acknowledgements to wait for.
    fn withdraw(&mut self, uid: &str) -> BTreeSet<(ConnId, u64)> {
        let offer = self.next_offer(uid);
        self.serials.remove(uid);
        let mut pending = BTreeSet::new();
        for (conn, tunnel) in &mut self.connected {
            tunnel.acknowledged.remove(uid);
            tunnel.failed.remove(uid);
            if tunnel.link.send(ZdsCommand::Del(offer.clone())) {
                pending.insert((*conn, offer.serial));
            }
        }
        pending
    }

    /// When a refused pod is offered again next.
    #[must_use]
    pub(crate) fn next_retry(&self) -> Option<Instant> {
        self.connected
            .values()
            .flat_map(|tunnel| tunnel.failed.values())
            .filter_map(|failure| failure.retry_at)
            .min()
    }

    /// Offers again what is due.
    pub(crate) fn retry(&mut self, now: Instant) {
        for tunnel in self.connected.values_mut() {
            for (uid, failure) in &mut tunnel.failed {
                let due = failure.retry_at.is_some_and(|at| at <= now);
                if let (true, Some(workload), Some(serial)) =
                    (due, self.workloads.get(uid), self.serials.get(uid))
                {
                    failure.retry_at = None;
                    let offer = OfferId { uid: uid.clone(), serial: *serial };
                    tunnel.link.send(ZdsCommand::Add(offer, workload.clone(), None));
                }
            }
        }
    }

    /// Sends all pods to the tunnels that wait. To be called when all pods are known.
    pub(crate) fn send_snapshots(&mut self) {
        for tunnel in self.connected.values_mut() {
            if matches!(tunnel.link, Link::Open(_)) {
                continue;
            }
            let (commands, receiver) = mpsc::unbounded_channel();
            let add = |(uid, workload): (&String, &PodWorkload)| {
                let offer = OfferId { uid: uid.clone(), serial: *self.serials.get(uid)? };
                Some(ZdsCommand::Add(offer, workload.clone(), None))
            };
            let snapshot: Vec<ZdsCommand> = self.workloads.iter().filter_map(add).collect();
            info!(tunnel.pid, pods = snapshot.len(), "sending the tunnel its pods");
            if let Link::Waiting(admission) = std::mem::replace(&mut tunnel.link, Link::Open(commands)) {
                let _ = admission.send(Admission { snapshot, commands: receiver });
            }
        }
    }

    /// The tunnel of `conn` acknowledged `offer`, or refused it with `error`.
    pub(crate) fn acknowledge(&mut self, conn: ConnId, offer: &OfferId, error: Option<String>) {
        // The answer to an earlier offer says nothing about the present one.
        if self.serials.get(&offer.uid) != Some(&offer.serial) {
            return;
        }
        let Some(tunnel) = self.connected.get_mut(&conn) else { return };
        let Some(error) = error else {
            tunnel.failed.remove(&offer.uid);
            tunnel.acknowledged.insert(offer.uid.clone(), offer.serial);
            info!(uid = offer.uid, tunnel.pid, "the tunnel serves the pod");
            return;
        };
        let mut pauses = match tunnel.failed.remove(&offer.uid) {
            Some(earlier) => earlier.pauses,
            None => retries(),
        };
        let pause = pauses.next().unwrap_or(LONGEST_RETRY);
        let retry_ms = pause.as_millis();
        warn!(uid = offer.uid, tunnel.pid, error, retry_ms, "the tunnel refused the pod");
        tunnel.acknowledged.remove(&offer.uid);
        let failure = Failure { error, pauses, retry_at: Some(Instant::now() + pause) };
        tunnel.failed.insert(offer.uid.clone(), failure);
    }
}

/// With jitter, so that the pods of a node are not offered again all at once.
fn retries() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(FIRST_RETRY)
        .with_max_delay(LONGEST_RETRY)
        .without_max_times()
        .with_jitter()
        .build()
}
