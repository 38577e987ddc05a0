//! Ports that applications listen on, for the programs: a connection to any other port is refused,
//! as it would be without a tunnel in between.
//!
//! The programs record the pods' sockets themselves, as they begin to listen. What the programs
//! cannot see comes from the kernel's list of sockets: what listened before the pod was enrolled,
//! what was bound before the programs were attached, what runs in the pod's netns and not in its
//! cgroups. The same list shows what has ended. Only this scan removes ports, and it lists once
//! more afterwards, so that a socket which begins to listen at that moment is missing for no longer
//! than that takes. While the list of a netns is not complete, no connection is refused there.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use adit_ebpf_common::listeners::{AppListenerState, ListenerKey, MAX_APP_LISTENERS};
use adit_ebpf_loader::{Kernel, KernelError};
use error_reporter::Report;
use tracing::{debug, warn};

use crate::{
    observe::{
        listeners::{Listeners, Listening, listeners},
        netns::Visitors,
        reserved_ports::PortSocket,
    },
    plan::{PodNetns, RESERVED_PORTS},
};

use super::OpenNetns;

/// Sockets on the tunnel's ports that a look at listeners found, by the cookie of their netns.
pub(crate) type OnReservedPorts = Vec<(u64, Vec<PortSocket>)>;

/// A netns by its cookie, open.
type Open = (u64, Arc<OwnedFd>);

/// How long new pods may wait for a tunnel before their sockets are listed anyway. Their netns stay
/// open until then.
const PATIENCE: Duration = Duration::from_millis(100);

/// Netns of new pods whose sockets are not listed yet.
#[derive(Debug, Default)]
pub(crate) struct AppListeners {
    unlisted: OpenNetns,
    due: Option<Instant>,
}

impl AppListeners {
    /// When the sockets of new pods are listed at the latest.
    #[must_use]
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Has the programs record what begins to listen in the netns `fd`. What listens there already
    /// is listed later: the list goes through the listeners of all netns of the node
    /// (`tcp_diag_dump`), and no connection arrives before a tunnel serves the pod.
    pub(crate) fn add(&mut self, kernel: &mut Kernel, cookie: u64, fd: Arc<OwnedFd>) {
        begin(kernel, cookie);
        self.unlisted.insert(cookie, fd);
        self.due.get_or_insert_with(|| Instant::now() + PATIENCE);
    }

    /// Lists the sockets of new pods once a tunnel serves all of them. `is_served` takes a pod's
    /// uid. What it found on the tunnel's ports.
    pub(crate) fn list_new(
        &mut self,
        kernel: &mut Kernel,
        visitors: &Visitors,
        steered: &BTreeMap<u64, PodNetns>,
        is_served: impl Fn(&str) -> bool,
        now: Instant,
    ) -> OnReservedPorts {
        let Some(due) = self.due else { return Vec::new() };
        // A pod that left again meanwhile has nothing recorded.
        self.unlisted.retain(|cookie, _| steered.contains_key(cookie));
        let served = |cookie| steered.get(cookie).is_some_and(|netns| is_served(&netns.uid));
        if due > now && !self.unlisted.keys().all(served) {
            return Vec::new();
        }
        self.due = None;
        let netns: Vec<Open> = std::mem::take(&mut self.unlisted).into_iter().collect();
        let found = list(visitors, &netns);
        for ((cookie, _), found) in netns.iter().zip(&found) {
            complete(kernel, *cookie, found);
        }
        on_ports(&netns, &found)
    }
}

fn on_ports(netns: &[Open], found: &[io::Result<Listeners>]) -> OnReservedPorts {
    let all = netns.iter().zip(found);
    all.filter_map(|((cookie, _), found)| Some((*cookie, found.as_ref().ok()?.on_ports.clone()))).collect()
}

/// Brings what is recorded up to date for every netns that is steered, as far as `opened` has it. What
/// it found on the tunnel's ports.
pub(crate) fn scan(
    kernel: &mut Kernel,
    visitors: &Visitors,
    steered: &BTreeMap<u64, PodNetns>,
    opened: &OpenNetns,
) -> OnReservedPorts {
    let netns: Vec<Open> = opened
        .iter()
        .filter(|(cookie, _)| steered.contains_key(cookie))
        .map(|(cookie, fd)| (*cookie, Arc::clone(fd)))
        .collect();
    let on_ports = scan_open(kernel, visitors, &netns);
    // Of netns whose pods left before they were steered. Their state first, so that the programs
    // record no more.
    for cookie in kernel.app_listener_netns().unwrap_or_default() {
        if !steered.contains_key(&cookie) {
            let _ = kernel.remove_app_listener_state(cookie);
        }
    }
    let Ok(recorded) = kernel.app_listeners() else { return on_ports };
    for key in recorded.iter().filter(|key| !steered.contains_key(&key.netns_cookie)) {
        let _ = kernel.remove_app_listener(key);
    }
    on_ports
}

fn scan_open(kernel: &mut Kernel, visitors: &Visitors, netns: &[Open]) -> OnReservedPorts {
    for (cookie, _) in netns {
        begin(kernel, *cookie);
    }
    let found = list(visitors, netns);
    for ((cookie, _), found) in netns.iter().zip(&found) {
        complete(kernel, *cookie, found);
    }
    let on_ports = on_ports(netns, &found);
    let recorded = match kernel.app_listeners() {
        Ok(recorded) => recorded,
        Err(error) => {
            warn!(error = %Report::new(&error), "cannot read the recorded listening ports");
            return on_ports;
        }
    };
    let mut again: Vec<Open> = Vec::new();
    for ((cookie, fd), found) in netns.iter().zip(found) {
        let Ok(found) = found else { continue };
        let ended = recorded.iter().filter(|key| {
            let listens =
                u16::try_from(key.port).is_ok_and(|port| found.dialled.contains(&(port, key.family)));
            key.netns_cookie == *cookie && !listens
        });
        let mut removed = false;
        for key in ended {
            removed |= kernel.remove_app_listener(key).is_ok();
        }
        if removed {
            again.push((*cookie, Arc::clone(fd)));
        }
    }
    let found = list(visitors, &again);
    for ((cookie, _), found) in again.iter().zip(&found) {
        complete(kernel, *cookie, found);
    }
    on_ports
}

/// From here on the programs record what begins to listen in the netns. Called before the kernel's
/// list is read, so that nothing falls in between.
fn begin(kernel: &mut Kernel, cookie: u64) {
    let begun = kernel.app_listener_state(cookie).and_then(|state| {
        // Whether the list was complete stays as it was. If a program finds no room at this moment,
        // the list that is read next makes up for it.
        let state = AppListenerState { count: 0, ..state.unwrap_or_default() };
        kernel.set_app_listener_state(cookie, &state)
    });
    if let Err(error) = begun {
        warn!(cookie, error = %Report::new(&error), "cannot have listening ports recorded");
    }
}

/// Records the kernel's list for a netns: it is complete then.
fn complete(kernel: &mut Kernel, cookie: u64, found: &io::Result<Listeners>) {
    const NOT_REFUSED: &str = "connections to closed ports are not refused early";
    let recorded = match found {
        Ok(Listeners { dialled, .. }) if dialled.len() <= MAX_APP_LISTENERS as usize => {
            add(kernel, cookie, dialled).and_then(|()| set_complete(kernel, cookie, true))
        }
        Ok(Listeners { dialled, .. }) => {
            debug!(cookie, listeners = dialled.len(), "too many listening ports to record; {NOT_REFUSED}");
            set_complete(kernel, cookie, false)
        }
        Err(error) => {
            debug!(cookie, %error, "cannot list listening ports; {NOT_REFUSED}");
            set_complete(kernel, cookie, false)
        }
    };
    if let Err(error) = recorded {
        warn!(cookie, error = %Report::new(&error), "cannot record listening ports; {NOT_REFUSED}");
        let _ = set_complete(kernel, cookie, false);
    }
}

fn set_complete(kernel: &mut Kernel, cookie: u64, complete: bool) -> Result<(), KernelError> {
    let Some(state) = kernel.app_listener_state(cookie)? else { return Ok(()) };
    kernel.set_app_listener_state(cookie, &AppListenerState { complete: u32::from(complete), ..state })
}

fn add(kernel: &mut Kernel, cookie: u64, found: &BTreeSet<Listening>) -> Result<(), KernelError> {
    found.iter().try_for_each(|(port, family)| {
        let key = ListenerKey::new(cookie, *port, *family == 4);
        kernel.add_app_listener(&key)
    })
}

fn list(visitors: &Visitors, netns: &[Open]) -> Vec<io::Result<Listeners>> {
    visitors.visit_each(netns, |visitor, (_, fd)| visitor.enter(fd.as_fd(), || listeners(&RESERVED_PORTS)))
}
