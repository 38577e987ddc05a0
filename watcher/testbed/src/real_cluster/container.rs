//! What makes a node: namespaces, held by a first process.

use std::{
    fmt::Write as _,
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::cgroups::NodeCgroups;
use crate::{
    netns::TestNetns,
    process::{Process, UNSHARE},
    wait::wait_for,
};

/// A command in cgroups and a netns, and in the other namespaces of process `node` if there is one.
pub(super) fn in_cgroups(
    cgroups: &[PathBuf],
    netns: &TestNetns,
    node: Option<u32>,
    words: &[&str],
) -> Command {
    let mut command = Command::new("sh");
    let join =
        r#"while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || exit 1; shift; done; shift; exec "$@""#;
    command.args(["-c", join, "sh"]).args(cgroups).arg("--");
    command.arg("nsenter").arg(format!("--net={}", netns.path().display()));
    if let Some(pid) = node {
        command.args(["--target", &pid.to_string(), "--pid", "--mount", "--cgroup"]);
    }
    command.arg("--").args(words).stdin(Stdio::null()).process_group(0);
    command
}

/// Starts what holds the node's namespaces.
pub(super) fn contain(netns: &TestNetns, cgroups: &NodeCgroups, dir: &Path) -> (Process, u32) {
    fs::create_dir_all(dir).expect("folder");
    let mut mounts = String::new();
    for hierarchy in &cgroups.hierarchies {
        let (at, kind) = (hierarchy.mount.display(), &hierarchy.kind);
        let options = hierarchy.mount_options();
        // One tree is not mounted over itself.
        let _ = writeln!(mounts, "umount -l {at}\nmount -t {kind} {options} cgroup {at}");
    }
    let ready = dir.join("ready");
    // A mount of a netns would keep it alive. Kubelets and containerd have folders at fixed places.
    // bash reaps what is orphaned.
    let script = format!(
        "for at in $(awk '$5 ~ \"^/run/netns/\" {{ print $5 }}' /proc/self/mountinfo); do umount -l $at || true; done
         {mounts}
         mount -t tmpfs tmpfs /run
         mount -t bpf bpf /sys/fs/bpf
         for at in /var/lib /var/log; do
           mkdir -p {dir}/fs$at
           mount --bind {dir}/fs$at $at
         done
         mount --make-rshared /
         echo $$ > {ready}
         while :; do sleep infinity & wait $!; done",
        dir = dir.display(),
        ready = ready.display(),
    );
    let words = [&UNSHARE[..], &["bash", "-ec", &script]].concat();
    let command = in_cgroups(&cgroups.dirs(""), netns, None, &words);
    let mut process = Process::spawn("node", command, &dir.join("node.log"));
    let init = wait_for("the node's namespaces", || {
        assert!(process.is_running(), "the node ended: {}", process.output());
        let children = format!("/proc/{0}/task/{0}/children", process.pid());
        let init: u32 = fs::read_to_string(children).ok()?.split(' ').next()?.parse().ok()?;
        ready.exists().then_some(init)
    });
    (process, init)
}
