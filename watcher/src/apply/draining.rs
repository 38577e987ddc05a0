//! Netns of pods that left, while connections still need them.
//!
//! A connection from a tunnel to the application needs the netns' rule, route and sysctls until it
//! ends. Tunnels also continue to dial the application for connections that they accepted before
//! the pod left, or that waited to be accepted. So the preparation is undone only when the tunnels
//! have acknowledged that the pod is gone *and* the programs count neither a connection of theirs
//! that uses another source address than the pod's nor one that came to the pod.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use adit_ebpf_loader::Kernel;
use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tracing::{info, warn};

use crate::{
    observe::{
        cgroups,
        netns::{self, NetnsId},
        processes,
    },
    plan::PodNetns,
};

use super::{OpenNetns, journal::Journal, netns_setup, zds_server::ConnId};

/// A handshake that was under way when the pod left may still become a connection, which the
/// programs cannot attribute to the pod. It takes a round trip, and a tunnel dials within
/// milliseconds.
const HANDSHAKE_TIME: Duration = Duration::from_millis(500);
/// How soon a netns with open connections is checked again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// All draining netns, by cookie.
#[derive(Debug, Default)]
pub(crate) struct DrainingNetns {
    by_cookie: BTreeMap<u64, Draining>,
}

/// A netns that waits to be restored.
#[derive(Debug)]
pub(crate) struct Draining {
    /// The netns, and the pod that left it.
    pub netns: PodNetns,
    /// Withdrawals that tunnels have not acknowledged.
    pending: BTreeSet<(ConnId, u64)>,
    connections: u64,
    pauses: ExponentialBackoff,
    next: Instant,
}

impl Draining {
    fn new(netns: PodNetns, pending: BTreeSet<(ConnId, u64)>) -> Self {
        let pauses = ExponentialBuilder::new()
            .with_min_delay(FIRST_PAUSE)
            .with_max_delay(LONGEST_PAUSE)
            .without_max_times()
            .build();
        Self { netns, pending, connections: 0, pauses, next: Instant::now() + HANDSHAKE_TIME }
    }

    /// What it waits for, as a phrase.
    #[must_use]
    pub(crate) fn waits_for(&self) -> String {
        if self.pending.is_empty() {
            format!("{} open connections of the tunnel", self.connections)
        } else {
            "the tunnel's acknowledgement".to_owned()
        }
    }
}

impl DrainingNetns {
    /// All of them, by cookie.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Draining)> {
        self.by_cookie.iter().map(|(cookie, draining)| (*cookie, draining))
    }

    /// A pod left `netns`, and the tunnels have to acknowledge the withdrawals in `pending`.
    pub(crate) fn withdraw(&mut self, cookie: u64, netns: PodNetns, pending: BTreeSet<(ConnId, u64)>) {
        self.by_cookie.insert(cookie, Draining::new(netns, pending));
    }

    /// No pod uses `netns` any more.
    pub(crate) fn release(&mut self, cookie: u64, netns: PodNetns) {
        self.by_cookie.entry(cookie).or_insert_with(|| Draining::new(netns, BTreeSet::new()));
    }

    /// A pod uses the netns again.
    pub(crate) fn cancel(&mut self, cookie: u64) {
        self.by_cookie.remove(&cookie);
    }

    /// The tunnel of `conn` acknowledged the withdrawal `serial`.
    pub(crate) fn acknowledge(&mut self, conn: ConnId, serial: u64) {
        for draining in self.by_cookie.values_mut() {
            draining.pending.remove(&(conn, serial));
        }
    }

    /// The tunnel of `conn` is gone, and will acknowledge nothing.
    pub(crate) fn forget_tunnel(&mut self, conn: ConnId) {
        for draining in self.by_cookie.values_mut() {
            draining.pending.retain(|(other, _)| *other != conn);
        }
    }

    /// Whether a tunnel has not acknowledged a withdrawal yet.
    #[must_use]
    pub(crate) fn waits_for_tunnels(&self) -> bool {
        self.by_cookie.values().any(|draining| !draining.pending.is_empty())
    }

    /// When to check them next.
    #[must_use]
    pub(crate) fn next_check(&self, now: Instant) -> Option<Instant> {
        let acknowledged = self.by_cookie.values().filter(|draining| draining.pending.is_empty());
        acknowledged.map(|draining| draining.next.max(now)).min()
    }

    /// Restores every netns that no connection needs any more.
    pub(crate) fn settle(&mut self, kernel: &mut Kernel, journal: &mut Journal) {
        let now = Instant::now();
        let (mut idle, mut restored) = (Vec::new(), Vec::new());
        for (cookie, draining) in &mut self.by_cookie {
            if !draining.pending.is_empty() || draining.next > now {
                continue;
            }
            if !journal.netns().contains_key(cookie) {
                // It was never prepared.
                restored.push(*cookie);
                continue;
            }
            match draining.is_idle(*cookie, kernel) {
                Ok(true) => idle.push(*cookie),
                Ok(false) => {}
                Err(error) => warn!(cookie, %error, "cannot tell whether a netns is in use"),
            }
            draining.next = now + draining.pauses.next().unwrap_or(LONGEST_PAUSE);
        }
        if !idle.is_empty() {
            match self.open(&idle, journal) {
                Ok(open) => restored.extend(restore(&idle, &open, kernel, journal)),
                Err(error) => warn!(%error, "cannot look for the netns of pods that left; trying again"),
            }
        }
        if restored.is_empty() {
            return;
        }
        for cookie in &restored {
            self.by_cookie.remove(cookie);
        }
        if let Err(error) = journal.remove_netns(restored) {
            warn!(%error, "cannot remove the netns of pods that left from the journal");
        }
    }

    /// Opens those of `cookies` that anything still holds: most likely the pod itself, else a
    /// mount, else a process elsewhere. All processes of the node are looked at once for all, and
    /// not at all for pods whose cgroups are gone: what their processes held went with them.
    ///
    /// # Errors
    /// What holds them cannot be told.
    fn open(&self, cookies: &[u64], journal: &Journal) -> io::Result<OpenNetns> {
        let mut open = OpenNetns::new();
        let mut wanted: BTreeMap<NetnsId, u64> = BTreeMap::new();
        let mut anywhere = false;
        for cookie in cookies {
            let (Some(draining), Some(record)) = (self.by_cookie.get(cookie), journal.netns().get(cookie))
            else {
                continue;
            };
            match processes::open_netns(&draining.netns.pod_cgroup, record.id) {
                Ok(fd) if is_netns(&fd, *cookie) => drop(open.insert(*cookie, fd.into())),
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(_) | Err(_) => {
                    wanted.insert(record.id, *cookie);
                    anywhere |= !draining.is_deleted();
                }
            }
        }
        if wanted.is_empty() {
            return Ok(open);
        }
        let take = |id: NetnsId, fd: BorrowedFd<'_>| {
            if let Some(cookie) = wanted.get(&id)
                && let Ok(fd) = fd.try_clone_to_owned()
                && is_netns(&fd, *cookie)
            {
                open.insert(*cookie, fd.into());
            }
        };
        if anywhere { netns::visit_all(take) } else { netns::visit_mounted(take) }?;
        Ok(open)
    }
}

impl Draining {
    /// Whether nothing needs the preparation any more.
    fn is_idle(&mut self, cookie: u64, kernel: &Kernel) -> io::Result<bool> {
        self.connections = kernel.pinned_connections(cookie).map_err(io::Error::other)?;
        // A pod that was deleted has no application that they could lead to. The kernel may
        // continue to resend what is left of them, into a netns without links, for minutes.
        Ok(self.connections == 0 || !cgroups::exists(&self.netns.pod_cgroup)?)
    }

    /// Whether its pod's cgroup is known, and gone for sure.
    fn is_deleted(&self) -> bool {
        let dir = &self.netns.pod_cgroup;
        !dir.as_os_str().is_empty() && matches!(cgroups::exists(dir), Ok(false))
    }
}

fn is_netns(fd: &OwnedFd, cookie: u64) -> bool {
    netns::cookie(fd.as_fd()).is_ok_and(|found| found == cookie)
}

/// Restores the netns `cookies` where they are still there, which `open` has then; those that are
/// done.
fn restore(cookies: &[u64], open: &OpenNetns, kernel: &mut Kernel, journal: &Journal) -> Vec<u64> {
    let mut restored = Vec::new();
    for cookie in cookies {
        let Some(record) = journal.netns().get(cookie) else { continue };
        let undone = open.get(cookie).map_or(Ok(()), |netns| {
            netns_setup::restore(netns.as_fd(), &record.sysctls_before)?;
            info!(uid = record.uid, inode = record.id.inode, "netns restored");
            Ok(())
        });
        match undone.and_then(|()| kernel.forget_pinned_connections(*cookie).map_err(io::Error::other)) {
            Ok(()) => restored.push(*cookie),
            Err(error) => warn!(cookie, %error, "cannot restore the netns of a pod that left"),
        }
    }
    restored
}
