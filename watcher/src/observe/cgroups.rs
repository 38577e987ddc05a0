//! The cgroup2 tree.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::{self, File},
    io::{self, BufRead as _, BufReader},
    ops::ControlFlow,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use cgroups_rs::fs::hierarchies;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use procfs::{ProcError, process::Process};

use super::cgroup_path;

/// The 64-bit inode number of a cgroup2 directory, which is also `bpf_get_current_cgroup_id()`
/// inside it (Linux 5.5). Not reused before a reboot.
pub type CgroupId = u64;

/// Where cgroup2 is mounted: `/sys/fs/cgroup` on unified nodes, `/sys/fs/cgroup/unified` on hybrid
/// ones, else as the mount table has it.
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

/// Where the kubelet keeps pods, below `root`; `root` itself where there is no kubelet, or where it
/// cannot be told. Each cgroup driver has a directory of its own, and that of an earlier driver
/// stays until the node boots: it is the one without processes. A kubelet with a cgroup root of its
/// own, as in Kind, has it deeper: `kubelet/kubepods`, `kubelet.slice/kubelet-kubepods.slice`.
#[must_use]
pub fn pods_dir(root: &Path) -> PathBuf {
    /// `docker/<id>/kubelet/kubepods` is as deep.
    const DEEPEST: usize = 4;
    let mut level = vec![root.to_owned()];
    let (mut there, mut visited) = (Vec::new(), 0);
    for _ in 0..DEEPEST {
        let mut next = Vec::new();
        for dir in level.iter().flat_map(|dir| directories(dir)).take(MOST_VISITED - visited) {
            visited += 1;
            if is_kubepods(&dir) { there.push(dir) } else { next.push(dir) }
        }
        // A pod may have a cluster inside: what is nearer to the root is the node's own.
        let live: Vec<&PathBuf> = there.iter().filter(|dir| is_populated(dir).unwrap_or(true)).collect();
        match live.as_slice() {
            [] => level = next,
            [only] => return (*only).clone(),
            _ => return root.to_owned(),
        }
    }
    match there.as_slice() {
        [only] => only.clone(),
        _ => root.to_owned(),
    }
}

/// Directories that [`pods_dir`] looks at.
const MOST_VISITED: usize = 4096;

/// Whether a kubelet keeps all of its pods below a directory of this name.
fn is_kubepods(dir: &Path) -> bool {
    let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name == "kubepods" || name == "kubepods.slice" || name.ends_with("-kubepods.slice")
}

/// The cgroups right below `dir`; none where it cannot be read.
pub(super) fn directories(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.filter(is_dir).map(|entry| entry.path())
}

/// The id of the cgroup2 directory `dir`.
///
/// # Errors
/// `NotFound`: the pod ended before this call.
pub fn id(dir: &Path) -> io::Result<CgroupId> {
    Ok(fs::metadata(dir)?.ino())
}

/// A cgroup and the cgroups below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    /// By path; empty: the topmost one does not exist.
    pub cgroups: BTreeMap<PathBuf, CgroupId>,
    /// Whether these are all.
    pub is_whole: bool,
}

/// `dir` and the cgroups below it, at most `limit` of them, those near `dir` first.
///
/// # Errors
/// A directory cannot be read for another reason than that it is gone.
pub fn tree(dir: &Path, limit: usize) -> io::Result<Tree> {
    let mut found = Tree { is_whole: true, ..Tree::default() };
    let mut waiting = VecDeque::from([dir.to_owned()]);
    while let Some(dir) = waiting.pop_front() {
        if found.cgroups.len() == limit {
            found.is_whole = false;
            break;
        }
        // A directory may vanish during the walk; that is no error.
        match below(&dir, limit - waiting.len().min(limit)) {
            Ok((id, children, is_whole)) => {
                found.is_whole &= is_whole;
                waiting.extend(children);
                found.cgroups.insert(dir, id);
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The id of the cgroup2 directory `dir`, at most `limit` directories in it, and whether these are
/// all.
fn below(dir: &Path, limit: usize) -> io::Result<(CgroupId, Vec<PathBuf>, bool)> {
    /// The link count of a directory without subdirectories (`kernfs_refresh_inode` counts them).
    /// Most are like that, and listing their forty files would take longer than all other reads for
    /// a pod.
    const CHILDLESS: u64 = 2;
    let metadata = fs::metadata(dir)?;
    let mut children = Vec::new();
    if metadata.nlink() != CHILDLESS {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                continue;
            }
            if children.len() == limit {
                return Ok((metadata.ino(), children, false));
            }
            children.push(entry.path());
        }
    }
    Ok((metadata.ino(), children, true))
}

/// The cgroup2 directory of process `pid`, below `root`.
///
/// # Errors
/// * `NotFound`: the process has ended.
/// * `Unsupported`: the process is in no cgroup2 directory, or in one outside of our cgroup
///   namespace.
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

/// The processes directly in the cgroup `dir`, at most `limit`; none where it is gone, and none in
/// a threaded cgroup, whose processes are listed by the one above. A process outside this pid
/// namespace is listed as 0 by the kernel, and left out.
///
/// Not by cgroups-rs, which reads the whole list and takes one that it cannot read for an empty
/// one.
///
/// # Errors
/// The list cannot be read for another reason than that the cgroup is gone.
pub fn processes(dir: &Path, limit: usize) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    each_process(dir, limit, |pid| {
        found.push(pid);
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

/// Whether `pid` is among the first `limit` processes of the cgroup `dir`.
///
/// # Errors
/// As of [`processes`].
pub fn has_process(dir: &Path, pid: i32, limit: usize) -> io::Result<bool> {
    let mut found = false;
    each_process(dir, limit, |member| {
        found = member == pid;
        if found { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(found)
}

fn each_process(dir: &Path, limit: usize, mut visit: impl FnMut(i32) -> ControlFlow<()>) -> io::Result<()> {
    let none = |error: &io::Error| is_gone(error) || error.raw_os_error() == Some(libc::EOPNOTSUPP);
    let file = match File::open(dir.join("cgroup.procs")) {
        Ok(file) => file,
        Err(error) if none(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    for line in BufReader::new(file).lines().take(limit) {
        match line {
            Ok(line) => {
                let pid = line.parse().ok().filter(|pid| *pid != 0);
                if pid.is_some_and(|pid| visit(pid).is_break()) {
                    break;
                }
            }
            Err(error) if none(&error) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether a process is in the cgroup `dir` or below it; not if it is gone.
///
/// # Errors
/// It cannot be read for another reason than that the cgroup is gone.
pub fn is_populated(dir: &Path) -> io::Result<bool> {
    match fs::read_to_string(dir.join("cgroup.events")) {
        Ok(text) => Ok(text.lines().any(|line| line == "populated 1")),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether there is a cgroup `dir`.
///
/// # Errors
/// That cannot be told.
pub fn exists(dir: &Path) -> io::Result<bool> {
    match id(dir) {
        Ok(_) => Ok(true),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a cgroup is gone: before its file was opened, or while it was read (`ENODEV`, kernfs).
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// The pods' directories below `base`, by uid. Of two with one uid, which no kubelet makes, the one
/// that comes first by path counts.
///
/// # Errors
/// A directory cannot be read for another reason than that it is gone.
pub fn pods(base: &Path) -> io::Result<BTreeMap<String, PathBuf>> {
    let mut found: BTreeMap<String, PathBuf> = BTreeMap::new();
    visit_above_pods(base, &mut |dir, uid| {
        if let Some(uid) = uid
            && found.get(&uid).is_none_or(|other| *other > dir)
        {
            found.insert(uid, dir);
        }
    })?;
    Ok(found)
}

/// `base` and every directory below it in which a pod's directory may be made.
///
/// # Errors
/// As of [`pods`].
pub fn above_pods(base: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::from([base.to_owned()]);
    visit_above_pods(base, &mut |dir, uid| {
        if uid.is_none() {
            found.insert(dir);
        }
    })?;
    Ok(found)
}

/// Directories below `base`, those inside pods excepted, each with the uid that it is named by.
fn visit_above_pods(base: &Path, visit: &mut impl FnMut(PathBuf, Option<String>)) -> io::Result<()> {
    let entries = match fs::read_dir(base) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) if is_gone(&error) => break,
            Err(error) => return Err(error),
        };
        if !entry.file_type()?.is_dir() {
            continue;
        }
        let uid = cgroup_path::pod_uid(&entry.file_name());
        if uid.is_none() {
            visit_above_pods(&entry.path(), visit)?;
        }
        visit(entry.path(), uid);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vanished_cgroup_is_an_empty_tree() {
        let dir = tempfile::tempdir().unwrap();
        assert!(tree(&dir.path().join("gone"), 10).unwrap().cgroups.is_empty());
        fs::create_dir_all(dir.path().join("pod/container/nested")).unwrap();
        let tree = tree(&dir.path().join("pod"), 3).unwrap();
        assert_eq!((tree.cgroups.len(), tree.is_whole), (3, true));
        assert_eq!(tree.cgroups[&dir.path().join("pod")], id(&dir.path().join("pod")).unwrap());
    }

    #[test]
    fn what_an_earlier_cgroup_driver_left_is_not_taken_for_the_pods() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let make = |name: &str, populated: u8| {
            fs::create_dir_all(root.join(name)).unwrap();
            fs::write(root.join(name).join("cgroup.events"), format!("populated {populated}\nfrozen 0\n"))
                .unwrap();
        };
        assert_eq!(pods_dir(root), root);
        make("kubepods", 0);
        assert_eq!(pods_dir(root), root.join("kubepods"), "a node without pods");
        make("kubepods.slice", 1);
        assert_eq!(pods_dir(root), root.join("kubepods.slice"));
        make("kubepods", 1);
        assert_eq!(pods_dir(root), root, "pods of both drivers run");
    }

    #[test]
    fn the_pods_of_a_kubelet_with_a_cgroup_root_of_its_own_are_found() {
        for path in [
            "kubelet/kubepods",
            "kubelet.slice/kubelet-kubepods.slice",
            "a.slice/a-b.slice/a-b-kubepods.slice",
            "docker/0123abcd/kubelet/kubepods",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path();
            let make = |name: &str, populated: u8| {
                let dir = root.join(name);
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join("cgroup.events"), format!("populated {populated}\n")).unwrap();
            };
            make("system.slice/containerd.service", 1);
            make(path, 0);
            assert_eq!(pods_dir(root), root.join(path), "without pods");
            make(path, 1);
            make(&format!("{path}/burstable/pod0/c/kubelet/kubepods"), 1);
            assert_eq!(pods_dir(root), root.join(path), "with a cluster inside a pod");
            make("kubepods", 0);
            assert_eq!(pods_dir(root), root.join(path), "beside an empty rest");
            make("kubepods", 1);
            assert_eq!(pods_dir(root), root.join("kubepods"), "the node's own is nearer to the root");
        }
    }

    #[test]
    fn of_a_large_tree_what_is_near_the_top_is_read_and_the_rest_is_known_to_be_missing() {
        let dir = tempfile::tempdir().unwrap();
        for container in ["a", "b"] {
            for nested in 0..10 {
                fs::create_dir_all(dir.path().join(format!("{container}/{nested}"))).unwrap();
            }
        }
        let tree = tree(dir.path(), 5).unwrap();
        assert_eq!((tree.cgroups.len(), tree.is_whole), (5, false));
        for near in [dir.path().to_owned(), dir.path().join("a"), dir.path().join("b")] {
            assert!(tree.cgroups.contains_key(&near), "{tree:?}");
        }
    }

    #[test]
    fn pods_are_found_by_uid_wherever_below_and_never_inside_a_pod() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = ("0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210");
        for path in [format!("burstable/pod{one}/c/kubepods/pod{two}"), "besteffort".to_owned()] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        let found = pods(dir.path()).unwrap();
        assert_eq!(found, [(one.to_owned(), dir.path().join(format!("burstable/pod{one}")))].into());
        let above: Vec<_> = above_pods(dir.path()).unwrap().into_iter().collect();
        assert_eq!(
            above,
            [dir.path().to_owned(), dir.path().join("besteffort"), dir.path().join("burstable")]
        );
    }

    #[test]
    #[ignore = "makes a cgroup, needs root: make test"]
    fn members_are_those_of_the_moment() {
        let cgroup = testbed::cgroup::Cgroup::new(&format!("adit-members-{}", std::process::id()));
        let mut seen = vec![processes(cgroup.path(), 10).unwrap()];
        let placement = testbed::process::Placement::in_cgroup(cgroup.path());
        let mut process = placement.command(&["sleep", "1000"]).spawn().unwrap();
        testbed::wait::wait_for("the process in its cgroup", || {
            Some(processes(cgroup.path(), 10).unwrap()).filter(|members| !members.is_empty())
        });
        seen.push(processes(cgroup.path(), 10).unwrap());
        process.kill().and_then(|()| process.wait()).unwrap();
        testbed::wait::wait_for("an empty cgroup", || {
            processes(cgroup.path(), 10).unwrap().is_empty().then_some(())
        });
        let dir = cgroup.path().to_owned();
        drop(cgroup);
        seen.push(processes(&dir, 10).unwrap());
        assert_eq!(seen, [vec![], vec![i32::try_from(process.id()).unwrap()], vec![]]);
    }

    #[test]
    fn a_list_that_cannot_be_read_is_not_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("cgroup.procs")).unwrap();
        assert!(processes(dir.path(), 10).is_err());
    }

    #[test]
    fn an_ordinary_folder_is_no_cgroup() {
        assert!(!is_cgroup2(tempfile::tempdir().unwrap().path()));
    }
}
