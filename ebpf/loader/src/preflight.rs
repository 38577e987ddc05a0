//! What this machine lacks. Asks, tries and takes back; attaches nothing and pins nothing.

use std::{
    fs::{self, File},
    path::Path,
};

use aya::{EbpfLoader, util::KernelVersion};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, FsType, statfs};

use crate::{
    links,
    object::{self, PODS},
};

/// One thing that is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub name: &'static str,
    pub ok: bool,
    pub found: String,
    pub needed: String,
    /// What to do; empty when `ok`.
    pub advice: String,
}

/// All checks. `pods_cgroup` is where the pods' programs will be attached, the root of the mount if not known.
pub fn checks(bpffs: &Path, cgroup_root: &Path, pods_cgroup: Option<&Path>) -> Vec<Check> {
    vec![
        kernel_version(),
        cgroup2(cgroup_root),
        bpffs_writable(bpffs),
        type_information(),
        programs_load(),
        nobody_in_the_way(pods_cgroup.unwrap_or(cgroup_root)),
    ]
}

fn check(name: &'static str, needed: &str, outcome: Result<String, (String, &str)>) -> Check {
    let (ok, found, advice) = match outcome {
        Ok(found) => (true, found, String::new()),
        Err((found, advice)) => (false, found, advice.to_owned()),
    };
    Check { name, ok, found, needed: needed.to_owned(), advice }
}

fn kernel_version() -> Check {
    let outcome = match KernelVersion::current() {
        Ok(version) if version >= KernelVersion::new(5, 10, 0) => Ok(version.to_string()),
        Ok(version) => Err((version.to_string(), "run the node on a newer kernel")),
        Err(error) => Err((error.to_string(), "the kernel says no version that can be read")),
    };
    check("kernel", "Linux 5.10 or later", outcome)
}

fn cgroup2(root: &Path) -> Check {
    let advice =
        "mount cgroup v2 (`mount -t cgroup2 none /sys/fs/cgroup`), or name the folder where it is mounted";
    let outcome = on(root, CGROUP2_SUPER_MAGIC).map_err(|found| (found, advice));
    check("cgroup v2", "a cgroup2 mount", outcome)
}

fn bpffs_writable(path: &Path) -> Check {
    let outcome = on(path, BPF_FS_MAGIC)
        .map_err(|found| (found, "mount one: `mount -t bpf bpf /sys/fs/bpf`"))
        .and_then(|found| {
            let probe = path.join(format!("adit-preflight-{}", std::process::id()));
            match fs::create_dir(&probe).and_then(|()| fs::remove_dir(&probe)) {
                Ok(()) => Ok(found),
                Err(error) => Err((format!("{found}, {error}"), "run as root, with the mount writable")),
            }
        });
    check("bpffs", "a writable bpffs mount", outcome)
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
    let outcome = if aya::features().btf().is_some() {
        Ok("accepted".to_owned())
    } else {
        Err((
            "refused".to_owned(),
            "run as root, on a kernel with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF",
        ))
    };
    check("BTF", "a kernel that takes type information", outcome)
}

/// Loads every program for good measure; they go when this function returns.
fn programs_load() -> Check {
    let advice = "run as root or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON; a kernel needs CONFIG_CGROUP_BPF and CONFIG_BPF_STREAM_PARSER";
    let outcome = match EbpfLoader::new().load(object::BYTES) {
        Err(error) => Err((chain(&error), advice)),
        Ok(mut object) => match object::load_programs(&mut object) {
            Ok(()) => Ok(format!("{} programs accepted", object.programs().count())),
            Err(error) => Err((chain(&error), advice)),
        },
    };
    check("programs", "a kernel that accepts every program", outcome)
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    // The verifier's log follows on further lines.
    text.lines().next().unwrap_or_default().to_owned()
}

fn nobody_in_the_way(cgroup: &Path) -> Check {
    let needed = "no program attached without BPF_F_ALLOW_MULTI at the pods' cgroup or above";
    let outcome = match File::open(cgroup) {
        Err(error) => {
            Err((format!("{}: {error}", cgroup.display()), "name the cgroup that the pods are below"))
        }
        Ok(_) => match PODS.iter().find_map(|place| links::culprit(cgroup, place.attach_type)) {
            None => Ok("none".to_owned()),
            Some(culprit) => Err((culprit, "detach it, or have its owner attach it by a link")),
        },
    };
    check("other programs", needed, outcome)
}
