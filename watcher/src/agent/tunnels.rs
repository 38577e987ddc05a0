//! Which tunnels are connected, and which of them acknowledged which pod.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use adit_ebpf_common::pods::flag;
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use crate::{
    apply::zds_server::{Command, Conn, Event, OfferId, Welcome},
    control::status::TunnelStatus,
    observe::cgroups::{self, CgroupId},
    plan::{Reason, ReasonCode, Workload, cgroup_info},
};

use super::Node;
use crate::model::error_chain::chain;

const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(15);

/// The tunnels, and the numbers of the offers made to them.
#[derive(Debug, Default)]
pub struct Tunnels {
    connected: BTreeMap<Conn, Tunnel>,
    /// The offer of each pod that is valid now.
    offers: BTreeMap<String, u64>,
    last_serial: u64,
    pub turned_away: Option<Reason>,
}

#[derive(Debug)]
struct Tunnel {
    pid: i32,
    cgroup: PathBuf,
    cgroup_id: CgroupId,
    link: Link,
    /// Offers that it acknowledged, by uid.
    acknowledged: BTreeMap<String, u64>,
    failed: BTreeMap<String, Failure>,
}

/// What is said to a tunnel.
#[derive(Debug)]
enum Link {
    /// Nothing yet: what it is told first must name every pod, since it lets go of all others; and a tunnel that
    /// served them for a predecessor would cut them off.
    Waiting(oneshot::Sender<Welcome>),
    Told(mpsc::UnboundedSender<Command>),
}

impl Link {
    /// Whether the tunnel will hear of this. Who is still waiting will be told by the snapshot.
    fn send(&self, command: Command) -> bool {
        match self {
            Self::Waiting(_) => false,
            Self::Told(commands) => commands.send(command).is_ok(),
        }
    }
}

/// A pod that a tunnel could not take.
#[derive(Debug)]
struct Failure {
    error: String,
    pause: Duration,
    /// `None`: offered again, not answered yet.
    retry_at: Option<Instant>,
}

impl Tunnels {
    pub fn len(&self) -> usize {
        self.connected.len()
    }

    pub fn is_empty(&self) -> bool {
        self.connected.is_empty()
    }

    /// Whether any tunnel serves the present offer of `uid`.
    pub fn serve(&self, uid: &str) -> bool {
        let Some(serial) = self.offers.get(uid) else { return false };
        self.connected.values().any(|tunnel| tunnel.acknowledged.get(uid) == Some(serial))
    }

    /// What a tunnel said when it refused `uid`.
    pub fn failure(&self, uid: &str) -> Option<&str> {
        self.connected
            .values()
            .find_map(|tunnel| tunnel.failed.get(uid))
            .map(|failure| failure.error.as_str())
    }

    pub fn cgroup_ids(&self) -> BTreeSet<CgroupId> {
        self.connected.values().map(|tunnel| tunnel.cgroup_id).collect()
    }

    pub fn status(&self) -> Vec<TunnelStatus> {
        self.connected
            .values()
            .map(|tunnel| TunnelStatus {
                pid: tunnel.pid,
                cgroup: tunnel.cgroup.clone(),
                cgroup_id: tunnel.cgroup_id,
                pods: tunnel.acknowledged.len(),
            })
            .collect()
    }

    pub fn offer(&mut self, uid: &str, workload: &Workload, netns: Option<&Arc<OwnedFd>>) {
        self.last_serial += 1;
        self.offers.insert(uid.to_owned(), self.last_serial);
        let offer = OfferId { uid: uid.to_owned(), serial: self.last_serial };
        for tunnel in self.connected.values_mut() {
            tunnel.failed.remove(uid);
            tunnel.link.send(Command::Add(offer.clone(), workload.clone(), netns.cloned()));
        }
    }

    /// Tells every tunnel to let go of `uid`; the acknowledgements to wait for.
    pub fn withdraw(&mut self, uid: &str) -> BTreeSet<(Conn, u64)> {
        self.last_serial += 1;
        self.offers.remove(uid);
        let offer = OfferId { uid: uid.to_owned(), serial: self.last_serial };
        let mut pending = BTreeSet::new();
        for (conn, tunnel) in &mut self.connected {
            tunnel.acknowledged.remove(uid);
            tunnel.failed.remove(uid);
            if tunnel.link.send(Command::Del(offer.clone())) {
                pending.insert((*conn, offer.serial));
            }
        }
        pending
    }

    pub fn next_retry(&self) -> Option<Instant> {
        self.connected
            .values()
            .flat_map(|tunnel| tunnel.failed.values())
            .filter_map(|failure| failure.retry_at)
            .min()
    }

    /// Offers again what is due.
    pub fn retry(&mut self, workloads: &BTreeMap<String, Workload>) {
        let now = Instant::now();
        for tunnel in self.connected.values_mut() {
            for (uid, failure) in &mut tunnel.failed {
                let due = failure.retry_at.is_some_and(|at| at <= now);
                if let (true, Some(workload), Some(serial)) = (due, workloads.get(uid), self.offers.get(uid))
                {
                    failure.retry_at = None;
                    let offer = OfferId { uid: uid.clone(), serial: *serial };
                    tunnel.link.send(Command::Add(offer, workload.clone(), None));
                }
            }
        }
    }

    /// Tells those who wait of `workloads`, which are all that there are.
    pub fn welcome(&mut self, workloads: &BTreeMap<String, Workload>) {
        for tunnel in self.connected.values_mut() {
            if matches!(tunnel.link, Link::Told(_)) {
                continue;
            }
            let (commands, receiver) = mpsc::unbounded_channel();
            let add = |(uid, workload): (&String, &Workload)| {
                let offer = OfferId { uid: uid.clone(), serial: *self.offers.get(uid)? };
                Some(Command::Add(offer, workload.clone(), None))
            };
            let snapshot: Vec<Command> = workloads.iter().filter_map(add).collect();
            info!(tunnel.pid, pods = snapshot.len(), "the tunnel is told of the pods");
            if let Link::Waiting(welcome) = std::mem::replace(&mut tunnel.link, Link::Told(commands)) {
                let _ = welcome.send(Welcome { snapshot, commands: receiver });
            }
        }
    }

    fn answered(&mut self, conn: Conn, offer: &OfferId, error: Option<String>) {
        // An answer to an offer that is not valid any more says nothing about the present one.
        if self.offers.get(&offer.uid) != Some(&offer.serial) {
            return;
        }
        let Some(tunnel) = self.connected.get_mut(&conn) else { return };
        match error {
            None => {
                tunnel.failed.remove(&offer.uid);
                tunnel.acknowledged.insert(offer.uid.clone(), offer.serial);
                info!(uid = offer.uid, tunnel.pid, "the tunnel serves the pod");
            }
            Some(error) => {
                let pause = tunnel
                    .failed
                    .get(&offer.uid)
                    .map_or(FIRST_RETRY, |earlier| (earlier.pause * 2).min(LONGEST_RETRY));
                warn!(
                    uid = offer.uid,
                    tunnel.pid,
                    error,
                    retry_ms = pause.as_millis(),
                    "the tunnel refused the pod"
                );
                tunnel.acknowledged.remove(&offer.uid);
                let failure = Failure { error, pause, retry_at: Some(Instant::now() + pause) };
                tunnel.failed.insert(offer.uid.clone(), failure);
            }
        }
    }
}

impl Node {
    pub fn on_tunnel(&mut self, event: Event) {
        match event {
            Event::Hello { conn, pid, welcome } => self.admit(conn, pid, welcome),
            Event::Added { conn, offer, error } => {
                if error.is_some() {
                    self.end_lenience(&offer.uid);
                }
                self.tunnels.answered(conn, &offer, error);
                self.dirty.act.insert(offer.uid);
            }
            Event::Withdrawn { conn, serial } => {
                for lingering in self.lingering.values_mut() {
                    lingering.pending.remove(&(conn, serial));
                }
            }
            // From here on its acknowledgements tell who is served, not what a predecessor left.
            Event::SnapshotTaken { .. } => {
                self.adopted = None;
                self.dirty.all = true;
            }
            Event::Gone { conn, reason } => self.part(conn, &reason),
        }
    }

    fn admit(&mut self, conn: Conn, pid: i32, welcome: oneshot::Sender<Welcome>) {
        let (cgroup, cgroup_id) = match self.place(pid) {
            Ok(place) => place,
            Err(reason) => {
                if self.tunnels.turned_away.as_ref() != Some(&reason) {
                    warn!(pid, code = reason.code.code(), reason = reason.text, "tunnel turned away");
                    self.tunnels.turned_away = Some(reason);
                }
                return;
            }
        };
        self.tunnels.turned_away = None;
        let tunnel = Tunnel {
            pid,
            cgroup,
            cgroup_id,
            link: Link::Waiting(welcome),
            acknowledged: BTreeMap::new(),
            failed: BTreeMap::new(),
        };
        info!(pid, cgroup = %tunnel.cgroup.display(), "tunnel connected");
        self.tunnels.connected.insert(conn, tunnel);
        self.dirty.all = true;
        self.change_settings(|settings| settings.tunnel_up = 1);
    }

    /// Finds the cgroup of a tunnel and attaches its programs, before it opens its first socket.
    fn place(&mut self, pid: i32) -> Result<(PathBuf, CgroupId), Reason> {
        let root = &self.config.cgroup_root;
        let cgroup = cgroups::of_process(root, pid).map_err(|error| {
            Reason::new(ReasonCode::TunnelCgroupUnknown, format!("tunnel {pid}: {error}"))
        })?;
        let shared = |with: &str| {
            let text = format!(
                "tunnel {pid} runs in cgroup {}, which {with}; start it in a cgroup of its own below {}",
                cgroup.display(),
                root.display()
            );
            Err(Reason::new(ReasonCode::TunnelCgroupShared, text))
        };
        if cgroup == *root {
            return shared("is the root");
        }
        if self.config.attach.starts_with(&cgroup) {
            return shared("contains the pods");
        }
        if self.own_cgroup.as_ref().is_some_and(|own| own.starts_with(&cgroup)) {
            return shared("contains the watcher");
        }
        if let Some(known) = self.pods.claims.owner(&cgroup).and_then(|uid| self.pods.get(uid)) {
            return shared(&format!("is pod {}'s", known.judged.pod.name));
        }
        let attached = self.attach_tunnel(&cgroup);
        attached.map(|id| (cgroup, id)).map_err(|text| Reason::new(ReasonCode::TunnelNotAttached, text))
    }

    fn attach_tunnel(&mut self, cgroup: &Path) -> Result<CgroupId, String> {
        let id = cgroups::id(cgroup).map_err(|error| format!("cgroup {}: {error}", cgroup.display()))?;
        self.records
            .add_tunnel(id, cgroup)
            .map_err(|error| format!("cannot note the tunnel's cgroup: {error}"))?;
        self.kernel.attach_tunnel(cgroup).map_err(|error| chain(&error))?;
        let info = cgroup_info(flag::TUNNEL, 0, &[]);
        self.kernel.set_cgroup(id, &info).map_err(|error| chain(&error))?;
        self.applied.cgroups.insert(id, info);
        Ok(id)
    }

    fn part(&mut self, conn: Conn, reason: &str) {
        for lingering in self.lingering.values_mut() {
            lingering.pending.retain(|(other, _)| *other != conn);
        }
        let Some(tunnel) = self.tunnels.connected.remove(&conn) else { return };
        if self.tunnels.is_empty() {
            // One write, before anything else: every pod follows its fail mode from here on.
            self.change_settings(|settings| settings.tunnel_up = 0);
            for (_, known) in self.pods.all_mut() {
                known.lenient_until = None;
            }
            self.adopted = None;
        }
        warn!(tunnel.pid, reason, others = self.tunnels.connected.len(), "tunnel gone");
        self.dirty.all = true;
        self.detach_unused_tunnels();
    }

    /// Detaches the programs of every cgroup that no connected tunnel is in.
    pub fn detach_unused_tunnels(&mut self) {
        let used = self.tunnels.cgroup_ids();
        let adopted = self.adopted.as_ref().map(|adopted| adopted.tunnels.clone()).unwrap_or_default();
        let unused: Vec<(CgroupId, PathBuf)> = self
            .records
            .tunnels()
            .iter()
            .filter(|(id, _)| !used.contains(id) && !adopted.contains(id))
            .map(|(id, dir)| (*id, dir.clone()))
            .collect();
        for (id, dir) in unused {
            let result = self.kernel.detach_tunnel(&dir).map_err(|error| chain(&error));
            let result =
                result.and_then(|()| self.records.remove_tunnel(id).map_err(|error| error.to_string()));
            if let Err(error) = result {
                warn!(cgroup = %dir.display(), error, "cannot detach from a tunnel's cgroup");
            }
        }
    }
}
