//! The cgroups of a node: one in each hierarchy of the machine, those of cgroup v1 too.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait::{LIMIT, try_wait};

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// `cgroup` or `cgroup2`.
    pub kind: String,
    /// What tells it from the others of cgroup v1: its controllers or its name.
    pub options: String,
}

impl Hierarchy {
    /// The options by which mount(8) mounts it once more.
    pub(super) fn mount_options(&self) -> String {
        match self.options.as_str() {
            "" => String::new(),
            options if options.starts_with("name=") => format!("-o none,{options}"),
            options => format!("-o {options}"),
        }
    }
}

/// All of the machine, from its mount table.
pub(super) fn hierarchies() -> Vec<Hierarchy> {
    let table = fs::read_to_string("/proc/self/mounts").expect("/proc/self/mounts");
    table.lines().filter_map(hierarchy).collect()
}

fn hierarchy(line: &str) -> Option<Hierarchy> {
    let mut words = line.split(' ').skip(1);
    let (mount, kind, options) = (words.next()?, words.next()?, words.next()?);
    let own = |option: &&str| !matches!(*option, "rw" | "relatime" | "nosuid" | "nodev" | "noexec" | "xattr");
    let options: Vec<&str> = options.split(',').filter(own).collect();
    let options = if kind == "cgroup" { options.join(",") } else { String::new() };
    matches!(kind, "cgroup" | "cgroup2").then(|| Hierarchy {
        mount: mount.into(),
        kind: kind.to_owned(),
        options,
    })
}

/// A cgroup of one name in each hierarchy. On drop, what is in them is killed, and all of them
/// removed.
#[derive(Debug)]
pub(super) struct NodeCgroups {
    name: String,
    pub hierarchies: Vec<Hierarchy>,
}

impl NodeCgroups {
    pub(super) fn new(name: &str) -> Self {
        let cgroups = Self { name: name.to_owned(), hierarchies: hierarchies() };
        cgroups.create("");
        cgroups
    }

    /// Makes the cgroup `below` it in each hierarchy.
    pub(super) fn create(&self, below: &str) {
        for dir in self.dirs(below) {
            fs::create_dir_all(&dir).unwrap_or_else(|error| panic!("make cgroup {}: {error}", dir.display()));
            // A cpuset takes no process before it has these.
            for file in ["cpuset.cpus", "cpuset.mems"].map(|name| dir.join(name)) {
                let above = dir.parent().and_then(|above| Some(above.join(file.file_name()?)));
                if let Some(value) = above.and_then(|above| fs::read_to_string(above).ok())
                    && file.exists()
                {
                    fs::write(&file, value).expect("cpuset");
                }
            }
        }
    }

    /// Removes the cgroup `below` it, with what is in it.
    pub(super) fn remove(&self, below: &str) {
        let gone = try_wait(LIMIT, || remove_all(&self.dirs(below)));
        assert!(gone.is_some(), "cgroup {} cannot be removed", self.dirs(below)[0].display());
    }

    /// The folders of the cgroup `below` it.
    pub(super) fn dirs(&self, below: &str) -> Vec<PathBuf> {
        let dir = |hierarchy: &Hierarchy| hierarchy.mount.join(&self.name).join(below);
        self.hierarchies.iter().map(dir).collect()
    }
}

impl Drop for NodeCgroups {
    fn drop(&mut self) {
        try_wait(Duration::from_secs(10), || remove_all(&self.dirs("")));
    }
}

/// Whether all of them are gone. Each is tried.
fn remove_all(dirs: &[PathBuf]) -> bool {
    let left = dirs.iter().filter(|dir| !remove(dir)).count();
    left == 0
}

/// Kills what is in `dir` and below it, and removes all of it. Whether it is gone.
fn remove(dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(dir) else { return true };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove(&entry.path());
    }
    for line in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
        if let Some(pid) = line.parse().ok().filter(|pid| *pid != 0) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    fs::remove_dir(dir).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_both_versions_are_read() {
        let lines = [
            "cgroup /sys/fs/cgroup/cpu cgroup rw,nosuid,relatime,cpu,cpuacct 0 0",
            "cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,name=systemd 0 0",
            "cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime,nsdelegate 0 0",
            "tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0",
        ];
        let found: Vec<_> = lines
            .iter()
            .filter_map(|line| hierarchy(line))
            .map(|found| (found.kind, found.options))
            .collect();
        let expected = [("cgroup", "cpu,cpuacct"), ("cgroup", "name=systemd"), ("cgroup2", "")];
        assert_eq!(found, expected.map(|(kind, options)| (kind.to_owned(), options.to_owned())));
    }
}
