//! Private cgroups below the machine's cgroup v2 mount, by cgroups-rs.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process,
    time::Duration,
};

use cgroups_rs::fs::{Controller as _, freezer::FreezerController};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait::try_wait;

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside the controllers
/// of v1.
pub fn cgroup2_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc/self/mounts");
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    mount.and_then(|line| line.split(' ').nth(1)).expect("cgroup2 is mounted").into()
}

/// A cgroup. On drop, the processes in it and in the cgroups below it are killed, and all of them
/// removed.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes cgroup `name` below the mount.
    pub fn new(name: &str) -> Self {
        let path = cgroup2_mount().join(name);
        create(&path);
        Self(path)
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The folder of the cgroup `below` it, which need not exist.
    pub fn join(&self, below: impl AsRef<Path>) -> PathBuf {
        self.0.join(below)
    }

    /// Makes the cgroup `below` it, and returns its folder.
    pub fn create(&self, below: impl AsRef<Path>) -> PathBuf {
        let path = self.join(below);
        create(&path);
        path
    }

    /// The id of the cgroup `below` it, as the kernel programs see it.
    pub fn id(&self, below: impl AsRef<Path>) -> u64 {
        fs::metadata(self.join(below)).expect("the cgroup").ino()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// The cgroup in folder `path`, for cgroups-rs. Its `Cgroup` takes cgroup2 at `/sys/fs/cgroup` only
/// and switches controllers on in all cgroups above a new one. A controller of it takes any folder,
/// and the freezer is in every cgroup2 folder without being switched on (Linux 5.2).
fn controller(path: &Path) -> FreezerController {
    FreezerController::new(path.to_owned(), PathBuf::new(), true)
}

fn create(path: &Path) {
    controller(path).create().unwrap_or_else(|error| panic!("make cgroup {}: {error}", path.display()));
}

/// Kills the processes in the cgroup `top` and below it, then removes them. A process that is
/// killed leaves its cgroup some time after it has been waited for.
pub fn remove(top: &Path) {
    try_wait(Duration::from_secs(5), || {
        kill_below(top);
        controller(top).delete().ok()
    });
}

/// Not `cgroup.kill`, which is new in Linux 5.14: the tests run on 5.10.
fn kill_below(top: &Path) {
    for entry in fs::read_dir(top).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            kill_below(&entry.path());
        }
    }
    for pid in members(top).into_iter().filter(|pid| pid.as_raw().cast_unsigned() != process::id()) {
        let _ = kill(pid, Signal::SIGKILL);
    }
}

/// The processes in the cgroup `path` itself; none if there is no such cgroup.
pub fn members(path: &Path) -> Vec<Pid> {
    let pids = controller(path).procs().into_iter();
    pids.filter_map(|member| i32::try_from(member.pid).ok()).map(Pid::from_raw).collect()
}
