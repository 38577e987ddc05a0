//! Which netns the processes of a pod are in.
//!
//! A pid alone may be another process a moment later. So each is pinned by an fd of its `/proc/PID`
//! directory, which never leads to another process, *before* the cgroup's members are read again: a pid
//! that is still a member then is a process of this pod, and what is opened through the fd is its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};

use super::{
    Observed, Seen,
    cgroup_path::{self, Below},
    cgroups::{self, CgroupId},
    netns::{self, NetnsId, Visitor},
};

/// A process that cannot be mistaken for another.
struct Pinned {
    pid: i32,
    dir: OwnedFd,
}

impl Pinned {
    fn new(pid: i32) -> io::Result<Self> {
        Ok(Self { pid, dir: File::open(format!("/proc/{pid}"))?.into() })
    }

    fn netns(&self) -> io::Result<OwnedFd> {
        Ok(openat(&self.dir, "ns/net", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)
    }
}

/// The processes in `cgroups`, all at or below `pod_dir`, pinned. CRI-O's conmon is none of the pod's, although
/// it is in its cgroup: it lives in the node's own netns.
fn members(cgroups: &BTreeMap<PathBuf, CgroupId>, pod_dir: &Path) -> Vec<Pinned> {
    let is_conmon = |dir: &Path| {
        let name = dir.strip_prefix(pod_dir).ok().and_then(|below| below.iter().next());
        name.is_some_and(|name| cgroup_path::below(name) == Below::Conmon)
    };
    let list = || {
        let dirs = cgroups.keys().filter(|dir| !is_conmon(dir));
        dirs.flat_map(|dir| cgroups::processes(dir)).collect::<BTreeSet<_>>()
    };
    let pinned: Vec<Pinned> = list().into_iter().filter_map(|pid| Pinned::new(pid).ok()).collect();
    if pinned.is_empty() {
        return pinned;
    }
    let still = list();
    pinned.into_iter().filter(|process| still.contains(&process.pid)).collect()
}

/// Looks at the pod whose directory is `cgroup`. Each netns is entered every time: neither its id nor its
/// addresses may be taken from memory, since both come back with other pods. Also gives the netns themselves,
/// by cookie, to whoever goes on at once; kept, they would outlive their pods.
pub fn observe(
    visitor: &Visitor,
    cgroup: &Path,
    host: &BTreeSet<NetnsId>,
) -> io::Result<(Observed, BTreeMap<u64, OwnedFd>)> {
    let cgroups: BTreeMap<PathBuf, CgroupId> = cgroups::tree(cgroup)?;
    let mut found: BTreeMap<NetnsId, Seen> = BTreeMap::new();
    let mut opened = BTreeMap::new();
    for process in members(&cgroups, cgroup) {
        // A process that ended, or a zombie, has no netns any more.
        let Ok(netns) = process.netns() else { continue };
        let id = netns::id(netns.as_fd())?;
        if found.contains_key(&id) {
            continue;
        }
        let seen = if host.contains(&id) {
            Seen::Host
        } else {
            match netns::facts(visitor, netns.as_fd()) {
                Ok(facts) => {
                    opened.insert(facts.cookie, netns);
                    Seen::Pod(facts)
                }
                Err(error) => Seen::Unreadable(format!("process {}: {error}", process.pid)),
            }
        };
        found.insert(id, seen);
    }
    let netns = found.into_values().collect();
    Ok((Observed { dir: Some(cgroup.to_owned()), cgroups, netns }, opened))
}

/// Opens netns `id` through a process of the pod whose directory is `cgroup`.
///
/// # Errors
/// `NotFound`: no process of the pod is in it any more.
pub fn open_netns(cgroup: &Path, id: NetnsId) -> io::Result<OwnedFd> {
    let cgroups = cgroups::tree(cgroup)?;
    members(&cgroups, cgroup)
        .into_iter()
        .filter_map(|process| process.netns().ok())
        .find(|netns| netns::id(netns.as_fd()).is_ok_and(|found| found == id))
        .ok_or_else(|| {
            let message = format!("no process of {} is in netns {} any more", cgroup.display(), id.inode);
            io::Error::new(io::ErrorKind::NotFound, message)
        })
}
