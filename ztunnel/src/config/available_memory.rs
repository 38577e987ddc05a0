//! How much memory this process may use.

use std::{fs, path::Path};

use procfs::{Current as _, Meminfo};

/// The limit of its cgroup, or what the machine has, in bytes.
pub(super) fn available_memory() -> usize {
    let machine = Meminfo::current().map_or(u64::MAX, |memory| memory.mem_total);
    let cgroup = fs::read_to_string("/proc/self/cgroup").ok();
    let limit = cgroup.and_then(|cgroup| limit_of(Path::new("/sys/fs/cgroup"), &cgroup));
    usize::try_from(limit.unwrap_or(machine).min(machine)).unwrap_or(usize::MAX)
}

/// `memory.max` of the cgroup that `text` (of `/proc/self/cgroup`) names, below `root`. Without a
/// limit, or with cgroup v1 alone, there is none.
fn limit_of(root: &Path, text: &str) -> Option<u64> {
    let own = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // A limit further up holds as well.
    let folders = Path::new(own).ancestors().map(|folder| root.join(folder));
    let limits = folders.filter_map(|folder| fs::read_to_string(folder.join("memory.max")).ok());
    limits.filter_map(|limit| limit.trim().parse().ok()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_on_the_way_up_holds() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("kubepods/pod1")).unwrap();
        let set =
            |folder: &str, limit| fs::write(root.path().join(folder).join("memory.max"), limit).unwrap();
        let limit = || limit_of(root.path(), "1:name=systemd:/x\n0::/kubepods/pod1\n");
        assert_eq!(limit(), None);
        set("kubepods", "max\n");
        set("kubepods/pod1", "1048576\n");
        assert_eq!(limit(), Some(1 << 20));
        set("kubepods", "4096\n");
        assert_eq!(limit(), Some(4096));
        assert_eq!(limit_of(root.path(), "1:memory:/v1\n"), None);
        assert!(available_memory() > 0);
    }
}
