//! Netns of pods that left, while connections still need them.
//!
//! A connection from a tunnel to the application rests on the netns' rule, route and sysctls until it ends, and
//! tunnels go on to dial the application for connections that they accepted before the pod left, or that waited to be
//! accepted. So these are taken back only when the tunnels have acknowledged that the pod is gone *and* the
//! programs count neither a connection of theirs that speaks from another address than the pod's nor one that
//! came to the pod.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use crate::{
    apply::{netns_setup, zds_server::Conn},
    control::status::{LingeringStatus, NetnsStatus},
    observe::{
        netns::{self, NetnsId},
        processes,
    },
    plan::Netns,
};

use super::Node;

/// A handshake that was under way when the pod left may still end in a connection, which the programs cannot know as the
/// pod's. It takes a round trip, and a tunnel dials within milliseconds.
const HANDSHAKES: Duration = Duration::from_millis(500);
const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);

/// One of them.
#[derive(Debug)]
pub struct Lingering {
    netns: Netns,
    /// Withdrawals that tunnels have not acknowledged.
    pub pending: BTreeSet<(Conn, u64)>,
    connections: u64,
    pause: Duration,
    next: Instant,
}

impl Lingering {
    pub fn new(netns: Netns, pending: BTreeSet<(Conn, u64)>) -> Self {
        Self { netns, pending, connections: 0, pause: FIRST, next: Instant::now() + HANDSHAKES }
    }

    pub fn status(&self, cookie: u64) -> LingeringStatus {
        let waits_for = if self.pending.is_empty() {
            format!("{} open connections of the tunnel", self.connections)
        } else {
            "the tunnel's acknowledgement".to_owned()
        };
        let netns = NetnsStatus { inode: self.netns.id.inode, cookie };
        LingeringStatus { netns, uid: self.netns.uid.clone(), waits_for }
    }
}

impl Node {
    /// When to look at them again.
    pub fn next_lingering(&self, now: Instant) -> Option<Instant> {
        let quiet = self.lingering.values().filter(|lingering| lingering.pending.is_empty());
        quiet.map(|lingering| lingering.next.max(now)).min()
    }

    /// Takes back the preparation of every netns that nothing needs any more.
    pub fn settle_lingering(&mut self) {
        let now = Instant::now();
        let due: Vec<u64> = self
            .lingering
            .iter()
            .filter(|(_, lingering)| lingering.pending.is_empty() && lingering.next <= now)
            .map(|(cookie, _)| *cookie)
            .collect();
        let mut settled = Vec::new();
        for cookie in due {
            match self.settle(cookie) {
                Ok(true) => {
                    self.lingering.remove(&cookie);
                    settled.push(cookie);
                }
                Ok(false) => {}
                Err(error) => warn!(cookie, %error, "cannot restore the netns of a pod that left"),
            }
            if let Some(lingering) = self.lingering.get_mut(&cookie) {
                lingering.next = now + lingering.pause;
                lingering.pause = (lingering.pause * 2).min(LONGEST);
            }
        }
        if let Err(error) = self.records.remove_netns(settled) {
            warn!(%error, "cannot forget the netns of pods that left");
        }
    }

    /// Whether it is settled.
    fn settle(&mut self, cookie: u64) -> io::Result<bool> {
        let Some(record) = self.records.netns().get(&cookie).cloned() else { return Ok(true) };
        let Some(lingering) = self.lingering.get_mut(&cookie) else { return Ok(true) };
        lingering.connections = self.kernel.deliveries(cookie).map_err(io::Error::other)?;
        // A pod that was deleted, and not only left, has no application that they could lead to; what is left of them the
        // kernel may go on resending into a netns without links for minutes.
        if lingering.connections > 0 && lingering.netns.pod_cgroup.exists() {
            return Ok(false);
        }
        if let Some(netns) = find(&lingering.netns.pod_cgroup, record.id, cookie) {
            netns_setup::restore(netns.as_fd(), &record.sysctls_before)?;
            info!(uid = record.uid, inode = record.id.inode, "netns restored");
        }
        self.kernel.forget_deliveries(cookie).map_err(io::Error::other)?;
        Ok(true)
    }
}

/// Opens the netns, if anything still holds it: most likely the pod itself does.
fn find(pod_cgroup: &Path, id: NetnsId, cookie: u64) -> Option<OwnedFd> {
    let is_it = |fd: &OwnedFd| netns::cookie(fd.as_fd()).is_ok_and(|found| found == cookie);
    if let Some(found) = processes::open_netns(pod_cgroup, id).ok().filter(is_it) {
        return Some(found);
    }
    let mut found = None;
    netns::visit_all(|candidate, fd| {
        if candidate == id && found.is_none() {
            found = fd.try_clone_to_owned().ok().filter(is_it);
        }
    });
    found
}
