//! The cgroup2 tree.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use cgroups_rs::fs::{Controller as _, freezer::FreezerController, hierarchies};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use procfs::{ProcError, process::Process};

use super::cgroup_path;

/// The 64-bit inode number of a cgroup2 directory, which is also `bpf_get_current_cgroup_id()` inside
/// it (Linux 5.5). Not reused before a reboot.
pub type CgroupId = u64;

/// Where cgroup2 is mounted: `/sys/fs/cgroup` on unified nodes, `/sys/fs/cgroup/unified` on hybrid ones,
/// else as the mount table has it.
#[must_use]
pub fn find_root() -> Option<PathBuf> {
    let unified = PathBuf::from(hierarchies::UNIFIED_MOUNTPOINT);
    if hierarchies::is_cgroup2_unified_mode() {
        return Some(unified);
    }
    let hybrid = unified.join("unified");
    if is_cgroup2(&hybrid) {
        return Some(hybrid);
    }
    let mounts = Process::myself().ok()?.mountinfo().ok()?;
    mounts.into_iter().find(|mount| mount.fs_type == "cgroup2").map(|mount| mount.mount_point)
}

/// Whether `dir` is on a cgroup2 mount.
#[must_use]
pub fn is_cgroup2(dir: &Path) -> bool {
    statfs(dir).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Where the kubelet keeps pods, below `root`; `root` itself where there is no kubelet.
#[must_use]
pub fn pods_dir(root: &Path) -> PathBuf {
    ["kubepods", "kubepods.slice"]
        .into_iter()
        .map(|name| root.join(name))
        .find(|dir| dir.is_dir())
        .unwrap_or_else(|| root.to_owned())
}

/// The id of the cgroup2 directory `dir`.
///
/// # Errors
/// `NotFound`: the pod ended before this call.
pub fn id(dir: &Path) -> io::Result<CgroupId> {
    Ok(fs::metadata(dir)?.ino())
}

/// `dir` and every cgroup below it; empty if `dir` is gone.
///
/// # Errors
/// A directory cannot be read for another reason than that it is gone.
pub fn tree(dir: &Path) -> io::Result<BTreeMap<PathBuf, CgroupId>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        // A directory may vanish during the walk; that is no error.
        match below(&dir) {
            Ok((id, children)) => {
                waiting.extend(children);
                found.insert(dir, id);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The id of the cgroup2 directory `dir`, and the directories in it.
fn below(dir: &Path) -> io::Result<(CgroupId, Vec<PathBuf>)> {
    /// The link count of a directory without subdirectories (`kernfs_refresh_inode` counts them). Most are like
    /// that, and listing their forty files would take longer than all other reads for a pod.
    const CHILDLESS: u64 = 2;
    let metadata = fs::metadata(dir)?;
    let mut children = Vec::new();
    if metadata.nlink() != CHILDLESS {
        let entries = fs::read_dir(dir)?.filter_map(Result::ok);
        let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        children.extend(dirs.map(|entry| entry.path()));
    }
    Ok((metadata.ino(), children))
}

/// The cgroup2 directory of process `pid`, below `root`.
///
/// # Errors
/// * `NotFound`: the process has ended.
/// * `Unsupported`: the process is in no cgroup2 directory, or in one outside of our cgroup namespace.
pub fn of_process(root: &Path, pid: i32) -> io::Result<PathBuf> {
    let unsupported = |message| io::Error::new(io::ErrorKind::Unsupported, message);
    let cgroups = Process::new(pid).and_then(|process| process.cgroups()).map_err(io_error)?;
    let unified = cgroups.into_iter().find(|cgroup| cgroup.hierarchy == 0);
    let path =
        unified.ok_or_else(|| unsupported(format!("process {pid} is in no cgroup2 directory")))?.pathname;
    if path.starts_with("/..") {
        return Err(unsupported(format!("process {pid} is in {path}, outside this cgroup namespace")));
    }
    Ok(root.join(path.trim_start_matches('/')).components().collect())
}

fn io_error(error: ProcError) -> io::Error {
    let kind = match error {
        ProcError::NotFound(_) => io::ErrorKind::NotFound,
        ProcError::PermissionDenied(_) => io::ErrorKind::PermissionDenied,
        ProcError::Io(error, None) => return error,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

/// The processes directly in the cgroup `dir`; none where it is gone. A process outside this pid
/// namespace is listed as 0 by the kernel, and left out.
///
/// # Errors
/// The list cannot be read for another reason than that the cgroup is gone.
pub fn processes(dir: &Path) -> io::Result<Vec<i32>> {
    // Its `Cgroup` takes cgroup2 at `/sys/fs/cgroup` only; a controller of it takes any folder, and
    // the freezer is part of every cgroup2 folder.
    let members = FreezerController::new(dir.to_owned(), PathBuf::new(), true).procs();
    if members.is_empty() {
        // It takes a list that it cannot read for an empty one. Only what can be read is believed.
        return match fs::read_to_string(dir.join("cgroup.procs")) {
            Ok(text) => {
                Ok(text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0).collect())
            }
            Err(error) if is_gone(&error) => Ok(Vec::new()),
            Err(error) => Err(error),
        };
    }
    let pids = members.into_iter().filter_map(|member| i32::try_from(member.pid).ok());
    Ok(pids.filter(|pid| *pid != 0).collect())
}

/// Whether a process is in the cgroup `dir` or below it.
///
/// # Errors
/// `NotFound`: the cgroup is gone.
pub(crate) fn is_populated(dir: &Path) -> io::Result<bool> {
    let events = fs::read_to_string(dir.join("cgroup.events"))?;
    Ok(events.lines().any(|line| line == "populated 1"))
}

/// Whether a cgroup is gone: before its file was opened, or while it was read (`ENODEV`, kernfs).
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// The pods' directories below `base`, by uid. Of two with one uid, which no kubelet makes, the one that
/// comes first by path counts.
#[must_use]
pub fn pods(base: &Path) -> BTreeMap<String, PathBuf> {
    let mut found: BTreeMap<String, PathBuf> = BTreeMap::new();
    visit_above_pods(base, &mut |dir, uid| {
        if let Some(uid) = uid
            && found.get(&uid).is_none_or(|other| *other > dir)
        {
            found.insert(uid, dir);
        }
    });
    found
}

/// `base` and every directory below it in which a pod's directory may be made.
#[must_use]
pub fn above_pods(base: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::from([base.to_owned()]);
    visit_above_pods(base, &mut |dir, uid| {
        if uid.is_none() {
            found.insert(dir);
        }
    });
    found
}

/// Directories below `base`, those inside pods excepted, each with the uid that it is named by.
fn visit_above_pods(base: &Path, visit: &mut impl FnMut(PathBuf, Option<String>)) {
    let entries = fs::read_dir(base).into_iter().flatten().filter_map(Result::ok);
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        let uid = cgroup_path::pod_uid(&entry.file_name());
        if uid.is_none() {
            visit_above_pods(&entry.path(), visit);
        }
        visit(entry.path(), uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vanished_cgroup_is_an_empty_tree() {
        let dir = tempfile::tempdir().unwrap();
        assert!(tree(&dir.path().join("gone")).unwrap().is_empty());
        fs::create_dir_all(dir.path().join("pod/container/nested")).unwrap();
        let tree = tree(&dir.path().join("pod")).unwrap();
        assert_eq!(tree.len(), 3);
        assert_eq!(tree[&dir.path().join("pod")], id(&dir.path().join("pod")).unwrap());
    }

    #[test]
    fn pods_are_found_by_uid_wherever_below_and_never_inside_a_pod() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = ("0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210");
        for path in [format!("burstable/pod{one}/c/kubepods/pod{two}"), "besteffort".to_owned()] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        let found = pods(dir.path());
        assert_eq!(found, [(one.to_owned(), dir.path().join(format!("burstable/pod{one}")))].into());
        let above: Vec<_> = above_pods(dir.path()).into_iter().collect();
        assert_eq!(
            above,
            [dir.path().to_owned(), dir.path().join("besteffort"), dir.path().join("burstable")]
        );
    }

    #[test]
    #[ignore = "makes a cgroup, needs root: make test"]
    fn members_are_those_of_the_moment() {
        let cgroup = testbed::cgroup::Cgroup::new(&format!("adit-members-{}", std::process::id()));
        let mut seen = vec![processes(cgroup.path()).unwrap()];
        let placement = testbed::process::Placement::in_cgroup(cgroup.path());
        let mut process = placement.command(&["sleep", "1000"]).spawn().unwrap();
        testbed::wait::wait_for("the process in its cgroup", || {
            Some(processes(cgroup.path()).unwrap()).filter(|members| !members.is_empty())
        });
        seen.push(processes(cgroup.path()).unwrap());
        process.kill().and_then(|()| process.wait()).unwrap();
        testbed::wait::wait_for("an empty cgroup", || {
            processes(cgroup.path()).unwrap().is_empty().then_some(())
        });
        let dir = cgroup.path().to_owned();
        drop(cgroup);
        seen.push(processes(&dir).unwrap());
        assert_eq!(seen, [vec![], vec![i32::try_from(process.id()).unwrap()], vec![]]);
    }

    #[test]
    fn a_list_that_cannot_be_read_is_not_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("cgroup.procs")).unwrap();
        assert!(processes(dir.path()).is_err());
    }

    #[test]
    fn an_ordinary_folder_is_no_cgroup() {
        assert!(!is_cgroup2(tempfile::tempdir().unwrap().path()));
    }
}
