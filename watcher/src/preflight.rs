//! Whether this process sees the node as the watcher must, in a container too. Each check tries what
//! it says and changes nothing.
//!
//! A container that is not privileged has a private cgroup namespace and a read-only `/proc/sys`,
//! whatever capabilities it is given; without `hostPID` it sees no process of the pods.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead as _, BufReader},
    path::{Path, PathBuf},
    sync::Arc,
};

use adit_ebpf_loader::preflight::Check;
use nix::sys::resource::{Resource, getrlimit};

use crate::{apply::netns_setup, model::pod::Pod, observe::cgroups};

const PRIVILEGED: &str = "in a pod, set securityContext.privileged: true for the watcher's container";

mod istio;

pub use self::istio::istio_rules;

/// All of them. `root` is where cgroup2 is mounted, `attach` the cgroup above all pods.
#[must_use]
pub fn checks(root: &Path, attach: &Path) -> Vec<Check> {
    vec![
        sysctls(netns_setup::are_writable()),
        cgroup_namespace(fs::read_to_string("/proc/1/cgroup").as_deref(), is_alone(root)),
        pid_namespace(&visible_processes(root, attach, own_cgroup(root).as_deref())),
        descriptors(getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard)),
        controllers(is_before_5_15(), &fs::read_to_string("/proc/self/mounts").unwrap_or_default()),
    ]
}

/// The watcher sets them in each pod's netns. Which of them a process sees is decided by its netns;
/// whether it may write them, by its mount of `/proc/sys`.
fn sysctls(tried: io::Result<()>) -> Check {
    let (name, needed) = ("sysctls", "a writable /proc/sys/net, to prepare the pods' netns");
    match tried {
        Ok(()) => Check::ok(name, needed, "writable"),
        Err(error) => {
            let advice = format!("{PRIVILEGED}: others have /proc/sys mounted read-only");
            Check::fail(name, needed, error.to_string(), &advice)
        }
    }
}

/// Whether the tree has no cgroup but our own: it is a container's, seen from inside.
fn is_alone(root: &Path) -> bool {
    own_cgroup(root).as_deref() == Some(root) && !has_directory(root)
}

/// In another cgroup namespace than process 1 the kernel shows the cgroups of processes as paths
/// that lead nowhere. Where process 1 is of the same container, the tree ends at that.
fn cgroup_namespace(of_first: Result<&str, &io::Error>, is_alone: bool) -> Check {
    let (name, needed) = ("cgroup namespace", "the node's, to find the cgroups of tunnels and pods");
    let of_first = match of_first {
        Ok(text) => text,
        Err(error) => {
            let found = format!("/proc/1/cgroup: {error}");
            return Check::warn(name, needed, found, "mount proc, and run with CAP_SYS_PTRACE");
        }
    };
    let outside = of_first.lines().filter_map(|line| line.strip_prefix("0::")).find(|path| {
        Path::new(path).components().any(|component| component == std::path::Component::ParentDir)
    });
    let advice = format!("{PRIVILEGED}, or run outside of a cgroup namespace of your own");
    match outside {
        None if is_alone => {
            let found = "the tree has no cgroup but that of this process";
            Check::fail(name, needed, found, &advice)
        }
        None => Check::ok(name, needed, "the same as that of process 1"),
        Some(path) => {
            let found = format!("process 1 is in {path}, outside this cgroup namespace");
            Check::fail(name, needed, found, &advice)
        }
    }
}

/// Whose processes this pid namespace has.
#[derive(Debug, Default)]
struct Visible {
    /// Cgroups with processes, none of which it has.
    hidden: Vec<PathBuf>,
    /// How many cgroups have processes that it has, besides our own.
    seen: usize,
}

/// Looks at the root's processes, and at those at and below `attach`. The kernel lists a process of
/// another pid namespace as 0. One beside others is somebody's from outside, as `nsenter` is.
/// `own`: our own cgroup, whose processes we see in any case.
fn visible_processes(root: &Path, attach: &Path, own: Option<&Path>) -> Visible {
    /// A node with more cgroups has its answer by then.
    const MOST: usize = 4096;
    let mut visible = Visible::default();
    let below = cgroups::tree(attach, MOST).map(|tree| tree.cgroups).unwrap_or_default();
    let mut dirs: Vec<&Path> = below.keys().map(PathBuf::as_path).collect();
    if !below.contains_key(root) {
        dirs.insert(0, root);
    }
    for dir in dirs {
        let Ok(file) = fs::File::open(dir.join("cgroup.procs")) else { continue };
        let (mut outside, mut seen) = (false, false);
        for line in BufReader::new(file).lines().map_while(Result::ok) {
            outside |= line == "0";
            seen |= line != "0" && own != Some(dir);
        }
        if outside && !seen {
            visible.hidden.push(dir.to_owned());
        }
        visible.seen += usize::from(seen);
    }
    visible
}

/// The cgroup2 directory of this process. By `/proc/self`, which is right whatever pid namespace
/// `/proc` is of.
fn own_cgroup(root: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(root.join(path).components().collect())
}

fn pid_namespace(visible: &Visible) -> Check {
    let (name, needed) = ("pid namespace", "the node's, to see the processes of pods");
    let Some(first) = visible.hidden.first() else {
        return Check::ok(name, needed, "it has the processes of every cgroup looked at");
    };
    let found = format!(
        "the processes of {} cgroups are outside of it, such as those of {}",
        visible.hidden.len(),
        first.display()
    );
    let advice = "in a pod, set hostPID: true; else run outside of a pid namespace";
    if visible.seen == 0 {
        Check::fail(name, needed, found, advice)
    } else {
        Check::warn(name, needed, found, advice)
    }
}

/// The watcher raises its soft limit to the hard one.
fn descriptors(hard: u64) -> Check {
    const ENOUGH: u64 = 4096;
    const LEAST: u64 = 256;
    let (name, needed) = ("open files", "a hard limit of 4096: each pod that is looked at costs some");
    let advice = "raise it: LimitNOFILE of the container runtime's unit, `ulimit -Hn`, or default_ulimits of the runtime";
    let found = format!("{hard}");
    match hard {
        ENOUGH.. => Check::ok(name, needed, found),
        LEAST.. => Check::warn(name, needed, found, advice),
        _ => Check::fail(name, needed, found, advice),
    }
}

fn is_before_5_15() -> bool {
    let release = nix::sys::utsname::uname().ok();
    let release = release.as_ref().and_then(|name| name.release().to_str()).unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version < (5, 15)
}

/// Before Linux 5.15 (8520e224f547) the first write of a class or a priority makes the kernel
/// forget the cgroup2 of every socket made later, on the whole node: programs of cgroups below the
/// root run for none of them. Who makes cgroups there is about to write.
fn controllers(is_concerned: bool, mounts: &str) -> Check {
    let (name, needed) =
        ("net_cls, net_prio", "not in use beside cgroup2 before Linux 5.15: they switch capture off");
    if !is_concerned {
        return Check::ok(name, needed, "harmless on this kernel");
    }
    let used: Vec<String> = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (dir, kind, options) = (words.next()?, words.next()?, words.next()?);
            let concerned = |option: &str| matches!(option, "net_cls" | "net_prio");
            (kind == "cgroup" && options.split(',').any(concerned)).then(|| PathBuf::from(dir))
        })
        .filter(|dir| has_directory(dir))
        .map(|dir| dir.display().to_string())
        .collect();
    if used.is_empty() {
        return Check::ok(name, needed, "not in use");
    }
    let found = format!("cgroups in {}", used.join(", "));
    let advice = "boot with cgroup_no_v1=net_cls,net_prio, or run the node on Linux 5.15 or later";
    Check::warn(name, needed, found, advice)
}

fn has_directory(dir: &Path) -> bool {
    let mut entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    entries.any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
}

/// How many of the node's pods can be found: those that run, by the word of their source. Of a
/// source that does not know, all.
#[must_use]
pub fn pods_found(pods: &[Arc<Pod>], attach: &Path) -> Check {
    let (name, needed) = ("pods", "a cgroup with visible processes for every pod that runs");
    let dirs: BTreeMap<String, PathBuf> = match cgroups::pods(attach) {
        Ok(dirs) => dirs,
        Err(error) => {
            let found = format!("{}: {error}", attach.display());
            return Check::fail(name, needed, found, "name the cgroup that the pods are below (--attach)");
        }
    };
    let is_told = pods.iter().any(|pod| pod.is_running);
    let running: Vec<&Arc<Pod>> = pods.iter().filter(|pod| pod.is_running || !is_told).collect();
    let is_found = |pod: &&&Arc<Pod>| {
        let dir = pod.cgroup.as_ref().or_else(|| dirs.get(&pod.uid));
        dir.is_some_and(|dir| dir.starts_with(attach) && has_process(dir))
    };
    let missing: Vec<String> = running
        .iter()
        .filter(|pod| !is_found(pod))
        .map(|pod| format!("{}/{}", pod.namespace, pod.name))
        .collect();
    let count = running.len() - missing.len();
    let found = format!("{count} of {} found below {}", running.len(), attach.display());
    if missing.is_empty() {
        return Check::ok(name, needed, found);
    }
    let some = missing.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
    let found = format!("{found}; not {some}{}", if missing.len() > 3 { ", …" } else { "" });
    let advice = "compare --attach and the cgroup drivers of kubelet and container runtime with where the pods' processes are (/proc/PID/cgroup)";
    if count == 0 && is_told {
        Check::fail(name, needed, found, advice)
    } else {
        Check::warn(name, needed, found, advice)
    }
}

fn has_process(dir: &Path) -> bool {
    let tree = cgroups::tree(dir, 64).unwrap_or_default();
    tree.cgroups.keys().any(|dir| cgroups::processes(dir, 1).is_ok_and(|found| !found.is_empty()))
}

#[cfg(test)]
mod tests {
    use adit_ebpf_loader::preflight::Level;

    use super::*;

    #[test]
    fn a_process_1_outside_of_the_cgroup_namespace_is_told() {
        for (text, level) in [
            ("0::/\n", Level::Ok),
            ("3:cpu:/x\n0::/init.scope\n", Level::Ok),
            ("0::/../../init.scope\n", Level::Fail),
            ("1:name=systemd:/..\n0::/..\n", Level::Fail),
        ] {
            let check = cgroup_namespace(Ok(text), false);
            assert_eq!(check.level, level, "{text:?}: {check:?}");
        }
        assert_eq!(cgroup_namespace(Err(&io::Error::other("x")), false).level, Level::Warn);
        assert!(cgroup_namespace(Ok("0::/\n"), true).failed(), "process 1 is of the same container");
    }

    #[test]
    fn processes_of_another_pid_namespace_are_known_by_their_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let pods = dir.path().join("kubepods");
        fs::create_dir_all(pods.join("poda")).unwrap();
        let write = |dir: &Path, text: &str| fs::write(dir.join("cgroup.procs"), text).unwrap();
        let check = |own: &Path| pid_namespace(&visible_processes(dir.path(), &pods, Some(own)));
        let (root, pod) = (dir.path(), pods.join("poda"));
        let nobodys = root.join("nobodys");
        write(root, "");
        write(&pod, "70\n");
        assert_eq!(check(&nobodys).level, Level::Ok);
        write(&pod, "0\n70\n");
        assert_eq!(check(&nobodys).level, Level::Ok, "one came from outside");
        write(&pod, "0\n0\n");
        let failed = check(&nobodys);
        assert!(failed.failed() && failed.found.contains("of 1 cgroups"), "{failed:?}");
        assert!(failed.advice.contains("hostPID: true"));
        // Our own processes prove nothing.
        write(root, "12\n");
        assert!(check(root).failed());
        assert_eq!(check(&nobodys).level, Level::Warn);
        write(&pod, "70\n");
        write(root, "0\n");
        assert!(check(&pod).failed());
    }

    #[test]
    fn too_few_descriptors_are_told() {
        for (hard, level) in [(1 << 20, Level::Ok), (1024, Level::Warn), (64, Level::Fail)] {
            assert_eq!(descriptors(hard).level, level, "{hard}");
        }
    }

    #[test]
    fn controllers_that_switch_capture_off_are_told_where_they_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let (used, unused) = (dir.path().join("used"), dir.path().join("unused"));
        fs::create_dir_all(used.join("a")).unwrap();
        fs::create_dir_all(&unused).unwrap();
        let mount = |dir: &Path, options: &str| format!("cgroup {} cgroup {options} 0 0\n", dir.display());
        for (is_old, text, level) in [
            (true, mount(&used, "rw,net_cls,net_prio"), Level::Warn),
            (true, mount(&used, "rw,net_prio"), Level::Warn),
            (true, mount(&used, "rw,cpu,cpuacct"), Level::Ok),
            (true, mount(&unused, "rw,net_cls"), Level::Ok),
            (false, mount(&used, "rw,net_cls"), Level::Ok),
        ] {
            assert_eq!(controllers(is_old, &text).level, level, "{is_old} {text}");
        }
    }

    #[test]
    fn a_read_only_proc_names_the_field_of_the_pod() {
        let check = sysctls(Err(io::Error::from_raw_os_error(libc::EROFS)));
        assert!(check.failed() && check.advice.contains("privileged: true"), "{check:?}");
    }

    #[test]
    fn pods_that_run_and_are_not_found_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let pod = |number: usize, is_running: bool| {
            let uid = format!("{number:032}");
            let (name, namespace) = (format!("p{number}"), "d".to_owned());
            Arc::new(Pod { uid, name, namespace, is_running, ..Pod::default() })
        };
        let cgroup = dir.path().join(format!("pod{:032}/c", 1));
        fs::create_dir_all(&cgroup).unwrap();
        fs::write(cgroup.join("cgroup.procs"), "12\n").unwrap();
        for (pods, level, found) in [
            (vec![pod(1, true)], Level::Ok, "1 of 1"),
            (vec![pod(1, true), pod(2, true), pod(3, false)], Level::Warn, "1 of 2"),
            (vec![pod(2, true)], Level::Fail, "0 of 1"),
            // A pods file does not say what runs.
            (vec![pod(2, false)], Level::Warn, "0 of 1"),
            (vec![], Level::Ok, "0 of 0"),
        ] {
            let check = pods_found(&pods, dir.path());
            assert!(check.level == level && check.found.starts_with(found), "{check:?}");
        }
    }
}
