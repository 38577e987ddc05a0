//! Finds what this machine lacks. Tries and undoes; attaches nothing and pins nothing.
//!
//! * this file: kernel, cgroups, bpffs, type information
//! * [`programs`]: every program by trial load, one check per type
//! * [`rights`]: capabilities, by name
//! * [`others`]: programs that are not ours where ours will be attached

use std::{fs, path::Path};

use aya::util::KernelVersion;
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, FsType, statfs};

use crate::btf::{self, CgroupOffsets};

mod others;
mod programs;
mod rights;

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// All is well.
    Ok,
    /// It works, with a limit that the operator should know.
    Warn,
    /// The node cannot run the watcher.
    Fail,
}

impl Level {
    /// As commands print it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One thing that is needed, or good to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Its name in the output of `watcher preflight`.
    pub name: &'static str,
    /// The result.
    pub level: Level,
    /// What this machine has.
    pub found: String,
    /// What the watcher needs.
    pub needed: String,
    /// What to do; empty when all is well.
    pub advice: String,
}

impl Check {
    /// A check that found what it needs.
    pub fn ok(name: &'static str, needed: &str, found: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, found: found.into(), needed: needed.to_owned(), advice: String::new() }
    }

    /// A check that found something to know about.
    pub fn warn(name: &'static str, needed: &str, found: impl Into<String>, advice: &str) -> Self {
        Self { level: Level::Warn, advice: advice.to_owned(), ..Self::ok(name, needed, found) }
    }

    /// A check that found something missing.
    pub fn fail(name: &'static str, needed: &str, found: impl Into<String>, advice: &str) -> Self {
        Self { level: Level::Fail, advice: advice.to_owned(), ..Self::ok(name, needed, found) }
    }

    /// Whether the watcher cannot run.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.level == Level::Fail
    }
}

/// All checks. `pods_cgroup` is where the pods' programs will be attached, the root of the mount if
/// not known.
#[must_use]
pub fn checks(bpffs: &Path, cgroup_root: &Path, pods_cgroup: Option<&Path>) -> Vec<Check> {
    let pods_cgroup = pods_cgroup.unwrap_or(cgroup_root);
    let mut checks =
        vec![kernel_version(), rights::capabilities(), cgroups(cgroup_root), bpffs_writable(bpffs)];
    checks.extend([type_information(), layouts_of_the_kernel()]);
    checks.extend(programs::load_each());
    checks.extend([others::nobody_in_the_way(pods_cgroup), others::balancers(cgroup_root, pods_cgroup)]);
    checks
}

fn kernel_version() -> Check {
    let (name, needed) = ("kernel", "Linux 5.10 or later");
    match KernelVersion::current() {
        Ok(version) if version >= KernelVersion::new(5, 10, 0) => {
            Check::ok(name, needed, version.to_string())
        }
        Ok(version) => Check::fail(name, needed, version.to_string(), "run the node on a newer kernel"),
        Err(error) => {
            Check::fail(name, needed, error.to_string(), "the kernel says no version that can be read")
        }
    }
}

fn cgroups(root: &Path) -> Check {
    let (name, needed) =
        ("cgroup v2", "a cgroup2 mount, alone (unified) or beside controllers of v1 (hybrid)");
    let advice = "mount cgroup v2 (`mount -t cgroup2 none /sys/fs/cgroup`), or name the folder where it is mounted (--cgroup-root)";
    match on(root, CGROUP2_SUPER_MAGIC) {
        Ok(found) => {
            let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
            let hybrid = mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup"));
            let layout = if hybrid { "hybrid" } else { "unified" };
            Check::ok(name, needed, format!("{found}, {layout}"))
        }
        Err(found) => Check::fail(name, needed, found, advice),
    }
}

fn bpffs_writable(path: &Path) -> Check {
    let (name, needed) = ("bpffs", "a writable bpffs mount");
    let found = match on(path, BPF_FS_MAGIC) {
        Ok(found) => found,
        Err(found) => {
            let advice = format!("mount one: `mount -t bpf bpf {}`", path.display());
            return Check::fail(name, needed, found, &advice);
        }
    };
    let probe = path.join(format!("adit-preflight-{}", std::process::id()));
    match fs::create_dir(&probe).and_then(|()| fs::remove_dir(&probe)) {
        Ok(()) => Check::ok(name, needed, found),
        Err(error) => {
            Check::fail(name, needed, format!("{found}, {error}"), "run as root, with the mount writable")
        }
    }
}

/// `path` as found, if it lies on a file system of type `wanted`.
fn on(path: &Path, wanted: FsType) -> Result<String, String> {
    match statfs(path) {
        Ok(stat) if stat.filesystem_type() == wanted => Ok(path.display().to_string()),
        Ok(_) => Err(format!("{} is on another file system", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

fn type_information() -> Check {
    let (name, needed) = ("BTF", "a kernel that takes type information, for socket storage");
    if aya::features().btf().is_some() {
        Check::ok(name, needed, "accepted")
    } else {
        let advice =
            "run with the capabilities above, on a kernel with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF";
        Check::fail(name, needed, "refused", advice)
    }
}

fn layouts_of_the_kernel() -> Check {
    let (name, needed) = ("kernel's BTF", "/sys/kernel/btf/vmlinux, to close a pod's cgroup as it is made");
    match CgroupOffsets::of_kernel() {
        Ok(_) => Check::ok(name, needed, btf::PATH),
        Err(error) => {
            let advice = "use a kernel with CONFIG_DEBUG_INFO_BTF that this version knows; without, a new pod's cgroup is closed a moment after it was made";
            Check::warn(name, needed, error.to_string(), advice)
        }
    }
}
