//! The cgroup tree that the bed makes its cgroups in.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside the controllers of v1.
pub fn cgroup2_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc/self/mounts");
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    mount.and_then(|line| line.split(' ').nth(1)).expect("cgroup2 is mounted nowhere").into()
}

/// Ends what is left in the cgroups below `top` (only ours are), then removes them, leaves first.
pub fn remove_cgroups(top: &Path) {
    for entry in fs::read_dir(top).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    for _ in 0..200 {
        for pid in fs::read_to_string(top.join("cgroup.procs")).unwrap_or_default().lines() {
            if let Ok(pid) = pid.parse() {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
        if fs::remove_dir(top).is_ok() || !top.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
