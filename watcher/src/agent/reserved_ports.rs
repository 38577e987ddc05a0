//! Applications that use the tunnel's ports in their pod's netns: which of the two came first decides
//! whether the tunnel cannot serve the pod, or the application cannot start. Either is told by name.
//!
//! Three things show it. The programs report each bind(2) to such a port, with the process, before it
//! has any effect; a tunnel refuses the pod; and each list of a netns' listeners has what listens there.
//! After the first two, and when the list shows a change, the netns is looked at, soon, since bind(2)
//! comes before listen(2). A pod decides how many such sockets it has and how often they change: a look
//! is bounded, counts against the pod's time, and is made ever more rarely while each finds a change.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
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
        reserved_ports::{Holders, PortSocket, dir_of, on_ports},
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

    /// Looks at the netns of pods that are due. What listings of listeners have found only shows which
    /// others have changed, and are due soon.
    pub(super) fn check_reserved_ports(&mut self, now: Instant) {
        let listed = self.applier.take_on_reserved_ports();
        let due = self.take_due(now);
        if listed.is_empty() && due.is_empty() {
            return;
        }
        let kernel = &self.applier.kernel;
        let (wanted, listeners) = match (kernel.reserved_binds(), kernel.tunnel_listeners()) {
            (Ok(wanted), Ok(listeners)) => (wanted, listeners),
            (Err(error), _) | (_, Err(error)) => {
                return warn!(error = %Report::new(&error), "cannot read who wants the tunnel's ports");
            }
        };
        let tunnels: BTreeSet<CgroupId> =
            self.applier.tunnel_cgroups().union(self.kept.tunnels()).copied().collect();
        let known = Known { wanted, listeners, tunnels };
        for (cookie, sockets) in listed {
            let Some(entry) = self.pods.by_netns_mut(cookie) else { continue };
            let using = known.uses(entry, cookie, known.apps(sockets), |_| None);
            if entry.ports.differ(&using) {
                entry.ports.look_soon(now);
            }
        }
        let looked = self.look(&due, &known);
        self.note_port_uses(looked, now);
    }

    /// The pods that are due, with the cookies of their netns and these open. Those that have had their
    /// share of time are due later.
    fn take_due(&mut self, now: Instant) -> Vec<(String, u64, Arc<OwnedFd>)> {
        let mut open = Vec::new();
        for uid in self.pods.with_ports_due(now) {
            let Some(entry) = self.pods.get_mut(&uid) else { continue };
            if let Some(until) = entry.spent.wait_until(now) {
                entry.ports.put_off(until);
                continue;
            }
            entry.ports.looked(now);
            let Some(cookie) = entry.view.eligibility.facts().map(|facts| facts.cookie) else { continue };
            let Some(steered) = self.applier.netns.by_cookie().get(&cookie) else { continue };
            match netns::open_netns(cookie, steered, self.observer.opened()) {
                Ok(fd) => open.push((uid, cookie, fd)),
                // One that ends needs no look.
                Err(error) => debug!(uid, %error, "cannot look who uses the tunnel's ports"),
            }
        }
        open
    }

    /// What is found of the pods `due`, and the time that took, by uid.
    fn look(&self, due: &[(String, u64, Arc<OwnedFd>)], known: &Known) -> Vec<Looked> {
        let pods: Vec<_> =
            due.iter().filter_map(|(uid, cookie, fd)| Some((self.pods.get(uid)?, *cookie, fd))).collect();
        self.applier.visitors().visit_each(&pods, |visitor, (entry, cookie, fd)| {
            let began = Instant::now();
            let found = visitor.enter(fd.as_fd(), || on_ports(&RESERVED_PORTS, DNS_PORT));
            let found = found.map(|sockets| {
                let mut holders = Holders::new();
                known.uses(entry, *cookie, known.apps(sockets), |socket| {
                    let dir = dir_of(&entry.view.observed.cgroups, socket.cgroup_id?)?;
                    holders.find(dir, known.bind_of(*cookie, socket), socket.inode)
                })
            });
            Looked { uid: entry.view.pod.uid.clone(), found, took: began.elapsed() }
        })
    }

    fn note_port_uses(&mut self, looked: Vec<Looked>, now: Instant) {
        let mut changed = Vec::new();
        for Looked { uid, found, took } in looked {
            let Some(entry) = self.pods.get_mut(&uid) else { continue };
            entry.spent.add(took, Instant::now());
            match found.map(|using| entry.ports.set(using, now)) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    debug!(uid, %error, "cannot look who uses the tunnel's ports");
                    continue;
                }
            }
            if entry.ports.using.is_empty() {
                info!(uid, "no application uses a port of the tunnel any more");
            } else {
                let using: Vec<String> = entry.ports.using.iter().map(ToString::to_string).collect();
                warn!(uid, using = using.join(", "), "an application uses a port of the tunnel");
            }
            changed.push(uid);
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

/// What a look at a pod found.
struct Looked {
    uid: String,
    found: io::Result<Vec<ReservedPortUse>>,
    took: Duration,
}

/// What is known of the node when pods are looked at.
struct Known {
    wanted: Vec<(ReservedPort, ReservedBind)>,
    listeners: Vec<ListenerKey>,
    tunnels: BTreeSet<CgroupId>,
}

impl Known {
    /// One socket of an application for each port.
    fn apps(&self, sockets: Vec<PortSocket>) -> Vec<PortSocket> {
        let mut apps: Vec<PortSocket> = sockets
            .into_iter()
            .filter(|socket| socket.cgroup_id.is_some_and(|id| !self.tunnels.contains(&id)))
            .collect();
        apps.sort_by_key(PortSocket::port_of);
        apps.dedup_by_key(|socket| socket.port_of());
        apps
    }

    /// The process that last wanted the port of `socket`.
    fn bind_of(&self, cookie: u64, socket: &PortSocket) -> Option<i32> {
        let is_it = |port: &ReservedPort| {
            port.netns_cookie == cookie && (port.port, port.is_udp != 0) == socket.port_of()
        };
        let (_, bind) = self.wanted.iter().find(|(port, _)| is_it(port))?;
        i32::try_from(bind.pid).ok()
    }

    /// The uses of a pod by these sockets, and by who wanted a port that the tunnel has. `holder` looks
    /// for the process of a socket.
    fn uses(
        &self,
        entry: &PodEntry,
        cookie: u64,
        apps: Vec<PortSocket>,
        mut holder: impl FnMut(&PortSocket) -> Option<(i32, String)>,
    ) -> Vec<ReservedPortUse> {
        if entry.sidecar.is_some() {
            // No tunnel wants them there.
            return Vec::new();
        }
        let mut using: Vec<ReservedPortUse> = apps
            .into_iter()
            .map(|socket| {
                let (pid, process) = holder(&socket)
                    .map_or((None, None), |(pid, name)| (Some(pid), process_name(name.as_bytes())));
                ReservedPortUse { port: socket.port, is_udp: socket.is_udp, listens: true, process, pid }
            })
            .collect();
        // Who wanted a port that the tunnel has did not get it.
        let has_tunnel = |port: &ReservedPort| {
            let [v4, v6] = [true, false].map(|is_v4| ListenerKey::new(cookie, port.port, is_v4));
            self.listeners.contains(&v4) || self.listeners.contains(&v6)
        };
        let attempts = self
            .wanted
            .iter()
            .filter(|(port, bind)| port.netns_cookie == cookie && is_recent(bind) && has_tunnel(port));
        for (port, bind) in attempts {
            let attempt = attempt(port, bind);
            if !using.iter().any(|other| (other.port, other.is_udp) == (attempt.port, attempt.is_udp)) {
                using.push(attempt);
            }
        }
        using
    }
}
