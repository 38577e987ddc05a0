//! Applications that use the tunnel's ports in their pod's netns: which of the two came first decides
//! whether the tunnel cannot serve the pod, or the application cannot start. Either is told by name.
//!
//! Three things show it. The programs report each bind(2) to such a port, with the process, before it
//! has any effect; a tunnel refuses the pod; and each list of a netns' listeners has what listens there.
//! After the first two the netns is looked at, soon, since bind(2) comes before listen(2).

use std::{
    collections::BTreeSet,
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use adit_ebpf_common::{
    listeners::ListenerKey,
    reserved_ports::{ReservedBind, ReservedPort},
};
use error_reporter::Report;
use procfs::{Current as _, Uptime};
use tracing::{debug, info, warn};

use crate::{
    apply::netns,
    model::reserved_port::{ReservedPortUse, process_name},
    observe::{
        cgroups::CgroupId,
        listeners::listeners,
        reserved_ports::{PortSocket, bound_udp, dir_of, holder},
    },
    plan::{DNS_PORT, RESERVED_PORTS},
};

use super::{Agent, pod_entry::PodEntry, port_uses::SETTLED_AFTER};

/// An attempt is told for so long: a container that fails by it starts again at least every five
/// minutes.
const ATTEMPT_LASTS: Duration = Duration::from_mins(10);

impl Agent {
    /// A process of the pod with this cgroup wants a port of the tunnel.
    pub(super) fn on_port_wanted(&mut self, cgroup_id: CgroupId) {
        if let Some(entry) = self.pods.by_cgroup_mut(cgroup_id) {
            let now = Instant::now();
            entry.ports.look_soon(now);
            if self.config.detect_sidecars && entry.sidecar.is_none() {
                // It may be one, which has more ports to listen on.
                let soon = now + SETTLED_AFTER;
                entry.next_observation = Some(entry.next_observation.map_or(soon, |next| next.min(soon)));
            }
        }
    }

    /// Looks at the netns of pods that are due, and takes in what listings of listeners have found.
    pub(super) fn check_reserved_ports(&mut self, now: Instant) {
        let mut found = self.applier.take_on_reserved_ports();
        let due: Vec<String> = self.pods.with_ports_due(now);
        let mut open = Vec::new();
        for uid in due {
            let Some(entry) = self.pods.get_mut(&uid) else { continue };
            entry.ports.looked(now);
            let Some(cookie) = entry.view.eligibility.facts().map(|facts| facts.cookie) else { continue };
            let Some(steered) = self.applier.netns.by_cookie().get(&cookie) else { continue };
            match netns::open_netns(cookie, steered, self.observer.opened()) {
                Ok(fd) => open.push((cookie, fd)),
                // One that ends needs no look.
                Err(error) => debug!(uid, %error, "cannot look who uses the tunnel's ports"),
            }
        }
        let looked = self.applier.visitors().visit_each(&open, |visitor, (_, fd)| {
            visitor.enter(fd.as_fd(), || {
                let mut found = listeners(&RESERVED_PORTS)?.on_ports;
                found.extend(bound_udp(DNS_PORT)?);
                Ok(found)
            })
        });
        for ((cookie, _), looked) in open.iter().zip(looked) {
            match looked {
                Ok(sockets) => found.push((*cookie, sockets)),
                Err(error) => debug!(cookie, %error, "cannot look who uses the tunnel's ports"),
            }
        }
        if !found.is_empty() {
            self.note_port_uses(&found);
        }
    }

    fn note_port_uses(&mut self, found: &[(u64, Vec<PortSocket>)]) {
        let kernel = &self.applier.kernel;
        let (wanted, listeners) = match (kernel.reserved_binds(), kernel.tunnel_listeners()) {
            (Ok(wanted), Ok(listeners)) => (wanted, listeners),
            (Err(error), _) | (_, Err(error)) => {
                return warn!(error = %Report::new(&error), "cannot read who wants the tunnel's ports");
            }
        };
        let tunnels: BTreeSet<CgroupId> =
            self.applier.tunnel_cgroups().union(self.kept.tunnels()).copied().collect();
        let mut changed = Vec::new();
        for (cookie, sockets) in found {
            let Some(entry) = self.pods.by_netns_mut(*cookie) else { continue };
            let is_apps = |socket: &&PortSocket| socket.cgroup_id.is_some_and(|id| !tunnels.contains(&id));
            let mut using: Vec<ReservedPortUse> =
                sockets.iter().filter(is_apps).map(|socket| use_of(entry, socket)).collect();
            // Who wanted a port that the tunnel has did not get it.
            let has_tunnel = |port: &ReservedPort| {
                let [v4, v6] = [true, false].map(|is_v4| ListenerKey::new(*cookie, port.port, is_v4));
                listeners.contains(&v4) || listeners.contains(&v6)
            };
            let attempts = wanted
                .iter()
                .filter(|(port, bind)| port.netns_cookie == *cookie && is_recent(bind) && has_tunnel(port));
            for (port, bind) in attempts {
                let attempt = attempt(port, bind);
                if !using.iter().any(|other| (other.port, other.is_udp) == (attempt.port, attempt.is_udp)) {
                    using.push(attempt);
                }
            }
            if entry.sidecar.is_some() {
                // No tunnel wants them there.
                using.clear();
            }
            if entry.ports.set(using) {
                let uid = &entry.view.pod.uid;
                for using in &entry.ports.using {
                    warn!(uid, %using, "an application uses a port of the tunnel");
                }
                if entry.ports.using.is_empty() {
                    info!(uid, "no application uses a port of the tunnel any more");
                }
                changed.push(uid.clone());
            }
        }
        if !changed.is_empty() {
            self.queue.reconcile(changed);
            self.count_port_uses();
        }
    }

    /// Counts for metrics the pods that have applications on the tunnel's ports.
    pub(super) fn count_port_uses(&self) {
        let uses = |port: u16| {
            let uses = |entry: &&PodEntry| entry.ports.using.iter().any(|using| using.port == port);
            self.pods.iter().filter(uses).count()
        };
        self.reporter.reserved_port_uses(RESERVED_PORTS.map(uses));
    }
}

/// The uptime counts the time of a suspended node too: after that an attempt is told for less long.
fn is_recent(bind: &ReservedBind) -> bool {
    let now = Uptime::current().map_or(Duration::MAX, |up| up.uptime_duration());
    now.saturating_sub(Duration::from_nanos(bind.at)) < ATTEMPT_LASTS
}

/// A process that wanted a port which the tunnel has.
fn attempt(port: &ReservedPort, bind: &ReservedBind) -> ReservedPortUse {
    ReservedPortUse {
        port: port.port,
        is_udp: port.is_udp != 0,
        listens: false,
        process: process_name(&bind.name),
        pid: i32::try_from(bind.pid).ok(),
    }
}

/// The application of `socket`.
fn use_of(entry: &PodEntry, socket: &PortSocket) -> ReservedPortUse {
    let dir = socket.cgroup_id.and_then(|id| dir_of(&entry.view.observed.cgroups, id));
    let holder = dir.and_then(|dir| holder(dir, socket.inode));
    let (pid, name) = holder.map_or((None, None), |(pid, name)| (Some(pid), process_name(name.as_bytes())));
    ReservedPortUse { port: socket.port, is_udp: socket.is_udp, listens: true, process: name, pid }
}
