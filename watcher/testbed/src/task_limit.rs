//! Limits the threads of a process while it runs, as a node's `pids.max` does.

use std::{fs, path::PathBuf, time::Duration};

use nix::unistd::Pid;

use crate::{cgroup::cgroup2_mount, wait::try_wait};

/// A cgroup of controller `pids` with one process. Removed on drop, when that has ended.
#[derive(Debug)]
pub struct TaskLimit(PathBuf);

impl TaskLimit {
    /// From now on `pid` can start no thread and no process.
    pub fn no_more(pid: Pid) -> Self {
        let path = mount().join(format!("no-more-{pid}"));
        fs::create_dir(&path).expect("make a cgroup");
        let limit = Self(path);
        limit.write("cgroup.procs", &pid.to_string());
        let current = fs::read_to_string(limit.0.join("pids.current")).expect("pids.current");
        limit.write("pids.max", current.trim());
        limit
    }

    fn write(&self, file: &str, value: &str) {
        fs::write(self.0.join(file), value).unwrap_or_else(|error| panic!("{file} = {value}: {error}"));
    }
}

impl Drop for TaskLimit {
    fn drop(&mut self) {
        let removed = try_wait(Duration::from_secs(10), || fs::remove_dir(&self.0).ok());
        if removed.is_none() {
            eprintln!("cannot remove cgroup {}", self.0.display());
        }
    }
}

/// The hierarchy with the controller: of cgroup v1 if it has one there, else cgroup2.
fn mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc/self/mounts");
    let v1 = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| {
        fields.get(2) == Some(&"cgroup")
            && fields.get(3).is_some_and(|options| options.split(',').any(|option| option == "pids"))
    });
    if let Some(fields) = v1 {
        return fields[1].into();
    }
    let mount = cgroup2_mount();
    fs::write(mount.join("cgroup.subtree_control"), "+pids").expect("controller pids");
    mount
}
