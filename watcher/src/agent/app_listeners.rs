//! Ports that somebody listens on, told to the kernel, so that whoever dials another one is refused as he would be
//! without a tunnel in between.
//!
//! The programs note the pods' sockets themselves, as they listen. What they cannot see is found by asking the kernel
//! for its list: what listened before the pod was enrolled, what was bound before the programs were there, what runs in
//! the pod's netns and not in its cgroups. And what has ended: only this scan removes anything, and looks again after it
//! did, so that a socket which listens just then is missed for no longer than that takes. While not everything is
//! known of a netns, nobody is refused there.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use adit_ebpf_common::pods::ListenerKey;
use adit_ebpf_loader::KernelError;
use tracing::{debug, warn};

use crate::observe::{
    listeners::{Listening, listening},
    netns::Visitors,
};

use super::Node;
use crate::model::error_chain::chain;

/// A netns, open.
pub type Open = (u64, Arc<OwnedFd>);

/// How long new pods may wait for a tunnel before the kernel is asked anyway who listens there; their netns are open meanwhile.
const PATIENCE: Duration = Duration::from_millis(100);

/// Netns of new pods, whose listeners have still to be asked for: until then nobody is refused there.
#[derive(Debug, Default)]
pub struct Unlisted {
    netns: BTreeMap<u64, Arc<OwnedFd>>,
    until: Option<Instant>,
}

impl Unlisted {
    pub fn due(&self) -> Option<Instant> {
        self.until
    }
}

impl Node {
    /// Has the programs note who begins to listen in `netns`, and leaves it for later to ask who does already: asking goes
    /// through the listeners of all netns of the node (`tcp_diag_dump`), and nobody comes before a tunnel serves the pod.
    pub fn list_later(&mut self, netns: impl IntoIterator<Item = Open>) {
        for (cookie, fd) in netns {
            self.begin_listened([cookie]);
            self.unlisted.netns.insert(cookie, fd);
            self.unlisted.until.get_or_insert_with(|| Instant::now() + PATIENCE);
        }
    }

    /// Asks, once a tunnel serves all of those pods.
    pub fn list_new(&mut self, now: Instant) {
        let Some(until) = self.unlisted.until else { return };
        // Who left again meanwhile has nothing noted.
        self.unlisted.netns.retain(|cookie, _| self.applied.netns.contains_key(cookie));
        let is_served = |cookie| self.applied.netns.get(cookie).is_some_and(|of| self.tunnels.serve(&of.uid));
        if until > now && !self.unlisted.netns.keys().all(is_served) {
            return;
        }
        let netns: Vec<Open> = std::mem::take(&mut self.unlisted).netns.into_iter().collect();
        let found = ask(&self.visitors, &netns);
        for ((cookie, _), found) in netns.iter().zip(&found) {
            self.complete_listened(*cookie, found);
        }
    }

    /// From here on the programs note what begins to listen there. To be called before the kernel is asked for what
    /// listens already.
    fn begin_listened(&mut self, cookies: impl IntoIterator<Item = u64>) {
        for cookie in cookies {
            let count = ListenerKey::about(cookie, ListenerKey::COUNT);
            if let Err(error) = self.kernel.set_listened(&count, 0) {
                warn!(cookie, error = %chain(&error), "cannot note who listens");
            }
        }
    }

    /// Notes what the kernel listed for a netns: it is everything there is.
    fn complete_listened(&mut self, cookie: u64, found: &io::Result<BTreeSet<Listening>>) {
        let complete = ListenerKey::about(cookie, ListenerKey::COMPLETE);
        let noted = match found {
            Ok(found) if found.len() <= ListenerKey::MOST_LISTENED as usize => {
                self.add_listened(cookie, found).and_then(|()| self.kernel.set_listened(&complete, 1))
            }
            Ok(found) => {
                debug!(cookie, listeners = found.len(), "too many to be noted: nobody is refused there");
                self.kernel.remove_listened(&complete)
            }
            Err(error) => {
                debug!(cookie, %error, "cannot ask what listens: nobody is refused there");
                self.kernel.remove_listened(&complete)
            }
        };
        if let Err(error) = noted {
            warn!(cookie, error = %chain(&error), "cannot note who listens: nobody is refused there");
            let _ = self.kernel.remove_listened(&complete);
        }
    }

    /// Does so for every netns that is steered, as far as it was opened for the scan.
    pub fn scan_steered(&mut self) {
        let steered = self.opened.iter().filter(|(cookie, _)| self.applied.netns.contains_key(cookie));
        let netns: Vec<Open> = steered.map(|(cookie, fd)| (*cookie, Arc::clone(fd))).collect();
        self.scan_listened(&netns);
        let Ok(noted) = self.kernel.listened() else { return };
        // Of netns that were left before they were steered.
        for key in noted.iter().filter(|key| !self.applied.netns.contains_key(&key.netns_cookie)) {
            let _ = self.kernel.remove_listened(key);
        }
    }

    /// Brings what is noted up to date with what listens in `netns`.
    fn scan_listened(&mut self, netns: &[Open]) {
        self.begin_listened(netns.iter().map(|(cookie, _)| *cookie));
        let found = ask(&self.visitors, netns);
        for ((cookie, _), found) in netns.iter().zip(&found) {
            self.complete_listened(*cookie, found);
        }
        let noted = match self.kernel.listened() {
            Ok(noted) => noted,
            Err(error) => return warn!(error = %chain(&error), "cannot read who is known to listen"),
        };
        let mut again: Vec<Open> = Vec::new();
        for ((cookie, fd), found) in netns.iter().zip(found) {
            let Ok(found) = found else { continue };
            let ended = noted.iter().filter(|key| {
                let listens = u16::try_from(key.port).is_ok_and(|port| found.contains(&(port, key.family)));
                key.netns_cookie == *cookie && key.port != 0 && !listens
            });
            let mut removed = false;
            for key in ended {
                removed |= self.kernel.remove_listened(key).is_ok();
            }
            if removed {
                again.push((*cookie, Arc::clone(fd)));
            }
        }
        let found = ask(&self.visitors, &again);
        for ((cookie, _), found) in again.iter().zip(&found) {
            self.complete_listened(*cookie, found);
        }
    }

    /// Whether somebody may listen on `port` of `address` there: as the programs see it.
    pub fn may_listen(&self, cookie: u64, port: u16, address: IpAddr) -> bool {
        let key = |port: u16, family| ListenerKey { netns_cookie: cookie, port: u32::from(port), family };
        let Ok(noted) = self.kernel.listened() else { return true };
        noted.contains(&key(port, 6))
            || address.is_ipv4() && noted.contains(&key(port, 4))
            || !noted.contains(&ListenerKey::about(cookie, ListenerKey::COMPLETE))
    }

    fn add_listened(&mut self, cookie: u64, found: &BTreeSet<Listening>) -> Result<(), KernelError> {
        found.iter().try_for_each(|(port, family)| {
            let key = ListenerKey { netns_cookie: cookie, port: u32::from(*port), family: *family };
            self.kernel.set_listened(&key, 1)
        })
    }
}

fn ask(visitors: &Visitors, netns: &[Open]) -> Vec<io::Result<BTreeSet<Listening>>> {
    visitors.visit_each(netns, |visitor, (_, fd)| visitor.enter(fd.as_fd(), listening))
}
