//! What runs on a node beside its pods: watchers and tunnels, which are killed and replaced.

use std::{fs, path::PathBuf, time::Duration};

use nix::sys::signal::Signal;
use testbed::{
    cluster::{Cluster, ClusterNode},
    process::Process,
};

use super::size::Builds;

/// The programs of a node.
#[derive(Debug)]
pub struct Host {
    index: usize,
    /// The oldest first. The first works, the others stand by.
    pub watchers: Vec<Process>,
    /// The oldest first. The last one is meant to serve.
    pub tunnels: Vec<Process>,
    /// Watchers and tunnels that were asked to end.
    leaving: Vec<Process>,
    watchers_started: usize,
    tunnels_started: usize,
    /// The programs that start in turn.
    builds: Builds,
    /// Whether the pods file is broken or away.
    pub is_source_broken: bool,
}

impl Host {
    /// The node with this index; nothing runs on it.
    pub fn new(index: usize) -> Self {
        let (watchers, tunnels, leaving) = (Vec::new(), Vec::new(), Vec::new());
        let builds = Builds::get();
        Self {
            index,
            watchers,
            tunnels,
            leaving,
            watchers_started: 0,
            tunnels_started: 0,
            builds,
            is_source_broken: false,
        }
    }

    /// Starts a watcher; one that stands by if there is one.
    pub fn start_watcher(&mut self, cluster: &mut Cluster, few_descriptors: bool) {
        let (cgroup2, bpffs) = (cluster.cgroup2.clone(), cluster.bpffs());
        let node = &mut cluster.nodes[self.index];
        let words: &[&str] = if few_descriptors { &["prlimit", "--nofile=256:"] } else { &[] };
        node.watcher_binary = Builds::next(&self.builds.watchers, &mut self.watchers_started);
        node.watcher_wrapper = words.iter().map(|word| (*word).to_owned()).collect();
        self.watchers.push(node.spawn_watcher(&cgroup2, &bpffs, &["--rescan", "5"]));
    }

    /// Starts a tunnel, beside those that there are.
    pub fn start_tunnel(&mut self, cluster: &mut Cluster) {
        let (mesh, ca) = (cluster.mesh_file(), cluster.ca_dir());
        // In a cluster each tunnel has a network of its own.
        let base = 16_000 + self.tunnels_started % 200 * 50;
        cluster.nodes[self.index].tunnel_binary =
            Builds::next(&self.builds.tunnels, &mut self.tunnels_started);
        let at = |more: usize| format!("127.0.0.1:{}", base + more);
        let (admin, stats, readiness) = (at(0), at(20), at(21));
        let env = [("ADMIN_ADDR", &*admin), ("STATS_ADDR", &*stats), ("READINESS_ADDR", &*readiness)];
        self.tunnels.push(cluster.nodes[self.index].spawn_tunnel(&mesh, &ca, &env));
    }

    /// Sends `signal` to the oldest of `programs`, and forgets it.
    pub fn end_oldest_watcher(&mut self, signal: Signal) {
        let oldest = self.watchers.remove(0);
        self.end(oldest, signal);
    }

    /// The same with a tunnel.
    pub fn end_oldest_tunnel(&mut self, signal: Signal) {
        let oldest = self.tunnels.remove(0);
        self.end(oldest, signal);
    }

    fn end(&mut self, mut program: Process, signal: Signal) {
        if signal == Signal::SIGKILL {
            program.kill();
        } else {
            program.signal(signal);
            self.leaving.push(program);
        }
    }

    /// Kills everything at once.
    pub fn kill_all(&mut self) {
        for programs in [&mut self.watchers, &mut self.tunnels, &mut self.leaving] {
            programs.drain(..).for_each(|mut program| program.kill());
        }
    }

    /// Forgets the programs that have ended as they were asked to; those that ended by themselves,
    /// by name.
    pub fn ended(&mut self) -> Vec<&'static str> {
        self.leaving.retain_mut(Process::is_running);
        let mut ended = Vec::new();
        for (name, programs) in [("watcher", &mut self.watchers), ("tunnel", &mut self.tunnels)] {
            let before = programs.len();
            programs.retain_mut(Process::is_running);
            ended.extend(std::iter::repeat_n(name, before - programs.len()));
        }
        ended
    }

    /// Removes everything that is pinned, and what is in memory only, as a reboot does.
    pub fn forget_everything(&mut self, cluster: &Cluster) {
        self.kill_all();
        let node = &cluster.nodes[self.index];
        // Cgroups outlive the links that hold programs on them; netns too.
        let _ = fs::remove_dir_all(pins(cluster, node));
        let _ = fs::remove_dir_all(node.dir.join("run"));
    }

    /// Waits for those that were asked to end.
    pub fn wait_left(&mut self) {
        for mut program in self.leaving.drain(..) {
            program.stop(Duration::from_secs(20));
        }
    }
}

/// The folder of a node's pins.
pub fn pins(cluster: &Cluster, node: &ClusterNode) -> PathBuf {
    cluster.bpffs().join("adit").join(&node.pins_name)
}
