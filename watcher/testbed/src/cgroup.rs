//! Private cgroups below the machine's cgroup v2 mount.
//!
//! Written by hand, since it is a few calls of the file system. cgroups-rs 0.5 takes cgroup2 only
//! at `/sys/fs/cgroup`, which a hybrid machine has at `/sys/fs/cgroup/unified`, kills by
//! `cgroup.kill` alone (Linux 5.14; the tests run on 5.10), and links a D-Bus client with an async
//! runtime of its own.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process,
    time::Duration,
};

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
        fs::create_dir_all(&path).expect("a cgroup");
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
        fs::create_dir_all(&path).expect("a cgroup");
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

/// Kills the processes in the cgroup `top` and below it, then removes them, leaves first. A process
/// that is killed leaves its cgroup some time after it has been waited for.
pub fn remove(top: &Path) {
    for entry in fs::read_dir(top).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    try_wait(Duration::from_secs(5), || {
        for pid in members(top).into_iter().filter(|pid| pid.as_raw().cast_unsigned() != process::id()) {
            let _ = kill(pid, Signal::SIGKILL);
        }
        match fs::remove_dir(top) {
            Err(error) if error.kind() != ErrorKind::NotFound => None,
            _ => Some(()),
        }
    });
}

/// The processes in the cgroup `path` itself; none if there is no such cgroup.
pub fn members(path: &Path) -> Vec<Pid> {
    let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect()
}
