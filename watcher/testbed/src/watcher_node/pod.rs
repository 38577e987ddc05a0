//! A pod of a node without a tunnel.

use std::{fs, path::PathBuf};

use crate::{command::run, netns::TestNetns, process::Process, wait::wait_for};

/// A pod: a cgroup with one container, whose process is in a netns of its own.
#[derive(Debug)]
pub struct NodePod {
    /// Its name.
    pub name: String,
    /// Its netns, with `e0` as its interface.
    pub netns: TestNetns,
    /// The pod's cgroup; the container's is `container` below it.
    pub cgroup: PathBuf,
    /// Its IPv4 address.
    pub address: String,
    pub(super) process: Process,
}

impl NodePod {
    /// Ends it as when a pod is deleted: its processes and its cgroup go, its netns stays.
    pub fn end(&mut self) {
        self.process.kill();
        for dir in [self.cgroup.join("container"), self.cgroup.clone()] {
            wait_for("the cgroup to be empty", || fs::remove_dir(&dir).is_ok());
        }
    }

    /// The rules, routes and sysctls of its netns: all that a watcher may change there.
    pub fn traces(&self) -> String {
        let Self { netns, .. } = self;
        let sysctls = "net.ipv4.tcp_fwmark_accept net.ipv4.fwmark_reflect net.ipv6.fwmark_reflect net.ipv4.tcp_migrate_req net.ipv4.tcp_tw_reuse";
        let shown: String = [
            format!("ip -n {netns} rule"),
            format!("ip -n {netns} -6 rule"),
            format!("ip -n {netns} route show table all"),
            format!("ip -n {netns} -6 route show table all"),
            format!("ip netns exec {netns} sysctl {sysctls}"),
        ]
        .iter()
        .map(|line| run(line))
        .collect();
        // Link-local addresses and their routes come by themselves, some time after the interface.
        shown.split_inclusive('\n').filter(|line| !line.contains("fe80:")).collect()
    }

    /// Whether a watcher has prepared its netns.
    pub fn is_prepared(&self) -> bool {
        run(&format!("ip -n {} rule", self.netns)).contains("0x539")
    }
}
