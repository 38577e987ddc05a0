//! Netns made ready for steering, many at a time.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use crate::{
    apply::{
        journal::NetnsRecord,
        netns_setup::{self, Sysctls},
    },
    observe::{
        netns::{self, Visitor},
        processes,
    },
    plan::{Netns, Reason, ReasonCode},
};

use super::Node;

impl Node {
    /// Prepares netns, side by side; those that are in order now, by cookie.
    pub fn prepare(&mut self, wanted: &[(u64, Netns)]) -> BTreeMap<u64, Arc<OwnedFd>> {
        let mut problems: Vec<(String, io::Error)> = Vec::new();
        let mut open: Vec<(u64, &Netns, Arc<OwnedFd>)> = Vec::new();
        for (cookie, netns) in wanted {
            match self.open(*cookie, netns) {
                Ok(fd) => open.push((*cookie, netns, fd)),
                Err(error) => problems.push((netns.uid.clone(), error)),
            }
        }
        let sysctls = self.visitors.visit_each(&open, |visitor, (_, _, fd)| Sysctls::of(visitor, fd.as_fd()));
        let (mut records, mut readable) = (Vec::new(), Vec::new());
        for ((cookie, netns, fd), sysctls) in open.into_iter().zip(sysctls) {
            match sysctls {
                Ok(sysctls) => {
                    let (id, uid, sysctls_before) = (netns.id, netns.uid.clone(), sysctls.values());
                    records.push((cookie, NetnsRecord { id, uid, sysctls_before }));
                    readable.push((cookie, netns, fd, sysctls));
                }
                Err(error) => problems.push((netns.uid.clone(), error)),
            }
        }
        // Noted before the change, and all at once: writing a file for each would take longer than the rest.
        if let Err(error) = self.records.add_netns(records) {
            let text = format!("cannot note the netns in {}: {error}", self.config.run_dir.display());
            let unnoted = readable.drain(..);
            problems
                .extend(unnoted.map(|(_, netns, ..)| (netns.uid.clone(), io::Error::other(text.clone()))));
        }
        self.list_later(readable.iter().map(|(cookie, _, fd, _)| (*cookie, Arc::clone(fd))));
        let results =
            self.visitors.visit_each(&readable, |visitor: &Visitor<'_>, (_, netns, fd, sysctls)| {
                netns_setup::prepare(visitor, fd.as_fd(), sysctls, netns.v6)
            });
        let mut prepared = BTreeMap::new();
        for ((cookie, netns, fd, _), result) in readable.into_iter().zip(results) {
            self.lingering.remove(&cookie);
            match result {
                Ok(()) => drop(prepared.insert(cookie, fd)),
                Err(error) => problems.push((netns.uid.clone(), error)),
            }
        }
        for (uid, error) in problems {
            self.note_problem(&uid, Reason::new(ReasonCode::NetnsNotPrepared, error.to_string()));
        }
        prepared
    }

    /// The netns itself: as it was opened when the pod was looked at, else through one of the pod's processes.
    fn open(&mut self, cookie: u64, netns: &Netns) -> io::Result<Arc<OwnedFd>> {
        if let Some(fd) = self.opened.get(&cookie) {
            return Ok(Arc::clone(fd));
        }
        let fd = processes::open_netns(&netns.pod_cgroup, netns.id)?;
        if netns::cookie(fd.as_fd())? != cookie {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the pod moved to another netns meanwhile"));
        }
        Ok(Arc::new(fd))
    }
}
