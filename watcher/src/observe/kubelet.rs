//! The kubelet's cgroup: that of the socket which listens on the kubelet's port in the node's netns.
//!
//! Not by the name of a process: k3s, MicroK8s and others have a kubelet inside of another program.

use std::{
    collections::{BTreeSet, VecDeque},
    fs::File,
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use super::{
    cgroups::{self, CgroupId},
    listeners::cgroups_listening,
    netns::run_in,
};

/// Cgroups that are looked at to find the one with an id. The kubelet's is near the root.
const MOST_VISITED: usize = 4096;

/// Why the kubelet's connections cannot be told from others'.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoKubelet {
    /// Its port is not in use.
    #[error("nobody listens on the kubelet's port {0} in the node's netns; see --kubelet-port")]
    NoListener(u16),
    /// The listener is a pod's, or its cgroup is not below the root.
    #[error("the cgroup of the listener on port {0} is not found outside of the pods' cgroup")]
    NoCgroup(u16),
    /// Whatever else is in there would pass too.
    #[error("the kubelet runs in cgroup {0}, {1}; start it in one of its own, as systemd does")]
    Shared(PathBuf, &'static str),
    /// The kernel or the node does not say.
    #[error("cannot look for the listener on port {0}: {1}")]
    Failed(u16, String),
}

/// Which cgroups cannot be the kubelet's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds<'a> {
    /// The root of the cgroup2 tree.
    pub root: &'a Path,
    /// The cgroup above all pods.
    pub pods: &'a Path,
}

/// The ids of the cgroups in which the listeners on the kubelet's `port` were made.
///
/// # Errors
/// Nobody listens, or the kernel does not say.
pub(crate) fn listening(port: u16) -> Result<BTreeSet<CgroupId>, NoKubelet> {
    let failed = |error: io::Error| NoKubelet::Failed(port, error.to_string());
    // The netns of the node's first process: the watcher of a cluster has one of its own.
    let node = File::open("/proc/1/ns/net").map_err(failed)?;
    let ids = run_in(node.as_fd(), || cgroups_listening(port)).map_err(failed)?;
    if ids.is_empty() { Err(NoKubelet::NoListener(port)) } else { Ok(ids) }
}

/// The cgroup of the kubelet, which is that of one of the listeners on `port`, and its id.
///
/// # Errors
/// There is none, or it is not the kubelet's alone.
pub(crate) fn find(
    port: u16,
    ids: &BTreeSet<CgroupId>,
    bounds: Bounds<'_>,
) -> Result<(PathBuf, CgroupId), NoKubelet> {
    let found = directory(bounds, |id| ids.contains(&id)).ok_or(NoKubelet::NoCgroup(port))?;
    if found.0 == bounds.root {
        return Err(NoKubelet::Shared(found.0, "the root of all"));
    }
    if bounds.pods.starts_with(&found.0) {
        return Err(NoKubelet::Shared(found.0, "which contains the pods"));
    }
    Ok(found)
}

/// The cgroup nearest to the root whose id is wanted; none of those of pods, which may listen on
/// any port of a node whose netns they share.
fn directory(bounds: Bounds<'_>, is_wanted: impl Fn(CgroupId) -> bool) -> Option<(PathBuf, CgroupId)> {
    let mut waiting = VecDeque::from([bounds.root.to_owned()]);
    for _ in 0..MOST_VISITED {
        let dir = waiting.pop_front()?;
        let Ok(id) = cgroups::id(&dir) else { continue };
        if is_wanted(id) {
            return Some((dir, id));
        }
        let below = cgroups::directories(&dir);
        waiting.extend(below.filter(|dir| dir != bounds.pods));
    }
    None
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_cgroup_is_found_by_its_id_but_not_a_pods() {
        let dir = tempfile::tempdir().unwrap();
        let (kubelet, pod) =
            (dir.path().join("system.slice/kubelet.service"), dir.path().join("kubepods/pod0"));
        for dir in [&kubelet, &pod] {
            fs::create_dir_all(dir).unwrap();
        }
        let pods = dir.path().join("kubepods");
        let bounds = Bounds { root: dir.path(), pods: &pods };
        let id = |dir: &Path| cgroups::id(dir).unwrap();
        let find = |wanted| directory(bounds, |found| found == wanted).map(|(dir, _)| dir);
        assert_eq!(find(id(&kubelet)), Some(kubelet.clone()));
        assert_eq!(find(id(dir.path())), Some(dir.path().to_owned()));
        assert_eq!(find(id(&pod)), None);
    }
}
