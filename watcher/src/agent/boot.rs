//! Pods that ran before the first watcher did: what they have in clear is cut when they are
//! enrolled. And tunnels that did: nobody has registered their listeners.

use std::{collections::BTreeSet, os::fd::AsFd as _};

use error_reporter::Report;
use tracing::{info, warn};

use crate::{
    apply::{
        boot::{self, NotCut},
        in_clear::PodSockets,
        netns,
    },
    model::pod::FailMode,
    observe::{cgroups::CgroupId, listeners::listeners, reserved_ports::PortSocket},
    plan::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT},
};

use super::{Agent, pod_entry::UntilFound};

/// Where every tunnel listens.
const TUNNEL_PORTS: [u16; 3] = [OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT];

/// What a watcher found attached when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Programs that use its own maps.
    OwnMaps,
    /// Programs that use other maps: nobody can say how they treated a pod.
    OtherMaps,
    /// Nothing, as after a boot: nobody closed any pod.
    Nothing,
}

/// Pods whose tunnel may have listened before any program was attached, by uid.
#[derive(Debug, Default)]
pub(super) struct EarlyListeners {
    /// A tunnel acknowledged them, and their listeners were not looked for yet.
    acknowledged: BTreeSet<String>,
    /// Their tunnel was asked to listen anew.
    asked: BTreeSet<String>,
}

impl EarlyListeners {
    /// Another tunnel connected.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// A tunnel acknowledged `uid`.
    pub(super) fn acknowledged(&mut self, uid: &str) {
        if !self.asked.contains(uid) {
            self.acknowledged.insert(uid.to_owned());
        }
    }
}

impl Agent {
    /// Has tunnels listen anew whose listeners are older than the attached programs, which would
    /// never know them: as after `watcher uninstall`, when the tunnel lives on.
    pub(super) fn check_early_listeners(&mut self) {
        if self.early.acknowledged.is_empty() {
            return;
        }
        let mut open = Vec::new();
        for uid in std::mem::take(&mut self.early.acknowledged) {
            let Some(workload) = self.applier.tunnels.workloads().get(&uid) else { continue };
            let cookie = workload.cookie;
            let Some(netns) = self.applier.netns.by_cookie().get(&cookie) else { continue };
            if let Ok(fd) = netns::open_netns(cookie, netns, self.observer.opened()) {
                open.push((uid, cookie, fd));
            }
        }
        let found = self
            .applier
            .visitors()
            .visit_each(&open, |visitor, (_, _, fd)| visitor.enter(fd.as_fd(), || listeners(&TUNNEL_PORTS)));
        // Only now: the programs record a listener before the kernel lists it.
        let known = match self.applier.kernel.tunnel_netns() {
            Ok(known) => known,
            Err(error) => return warn!(error = %Report::new(&error), "cannot list the tunnels' listeners"),
        };
        let tunnels = self.applier.tunnel_cgroups();
        // An application may have the same port.
        let is_of_tunnel = |socket: &PortSocket| socket.cgroup_id.is_none_or(|id| tunnels.contains(&id));
        for ((uid, cookie, fd), found) in open.into_iter().zip(found) {
            if !known.contains(&cookie) && found.is_ok_and(|found| found.on_ports.iter().any(is_of_tunnel)) {
                info!(
                    uid,
                    "the tunnel has listened since before the programs were attached; it is to listen anew"
                );
                self.applier.tunnels.listen_anew(&uid, &fd);
                self.early.asked.insert(uid.clone());
                self.queue.reconcile([uid]);
            }
        }
    }

    /// Cuts what those of `uids` have in clear that should have been closed since they began. They
    /// are in the mesh by now, or closed. Not of a pod that is open without a tunnel: it chose
    /// that.
    pub(super) fn cut_clear(&mut self, uids: impl IntoIterator<Item = String>) {
        let (mut pods, mut done) = (Vec::new(), Vec::new());
        for uid in uids {
            let Some(entry) = self.pods.get(&uid).filter(|entry| entry.until_found == UntilFound::NotClosed)
            else {
                continue;
            };
            let view = &entry.view;
            if view.pod.fail_mode.unwrap_or(self.config.fail_mode) == FailMode::Open {
                done.push(uid);
                continue;
            }
            let cookie = view.eligibility.facts().map(|facts| facts.cookie);
            let steered =
                cookie.and_then(|cookie| Some((cookie, self.applier.netns.by_cookie().get(&cookie)?)));
            // Until its entries are written, what is cut could be made again.
            let Some((cookie, netns)) = steered.filter(|_| entry.problem.is_none()) else { continue };
            match netns::open_netns(cookie, netns, self.observer.opened()) {
                Ok(fd) => pods.push(entry.sockets(cookie, fd)),
                Err(error) => warn!(uid, %error, "cannot look for connections that the pod made in clear"),
            }
        }
        if !pods.is_empty() {
            let tunnels: BTreeSet<CgroupId> =
                self.applier.tunnel_cgroups().union(self.kept.tunnels()).copied().collect();
            let results = boot::cut(self.applier.visitors(), &pods, &tunnels);
            for (PodSockets { uid, .. }, result) in pods.into_iter().zip(results) {
                match result {
                    Ok(count) => {
                        self.reporter.connections_cut(count);
                        done.push(uid);
                    }
                    Err(NotCut::Unsupported) => {
                        self.applier.note_that_nothing_can_be_cut();
                        done.push(uid);
                    }
                    // Its next observation leads here again.
                    Err(NotCut::Failed) => {}
                }
            }
        }
        for uid in done {
            if let Some(entry) = self.pods.get_mut(&uid) {
                entry.until_found = UntilFound::Closed;
            }
        }
    }
}
