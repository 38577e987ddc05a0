//! One node: a network namespace with a bridge for its pods, a watcher and a tunnel.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use super::replace;
use crate::{
    cgroup,
    command::{run, text},
    fakes::FakeCa,
    netns::TestNetns,
    process::{Placement, Process, UNSHARE},
    program::binary,
    wait::wait_for,
};

/// A node.
#[derive(Debug)]
pub struct ClusterNode {
    /// `a` or `b`.
    pub name: String,
    /// Pods of node 1 are 10.77.1.x and fd77:1::x.
    pub number: u8,
    /// Its netns, with the bridge of its pods and the link to the other node.
    pub netns: TestNetns,
    /// `…/<cluster>/<node>`; below it `kubepods`, `ztunnel` and `watcher`.
    pub cgroup: PathBuf,
    /// For its files.
    pub dir: PathBuf,
    /// The name of its pins: two clusters on one kernel share none.
    pub pins_name: String,
    /// Its watcher, while one runs.
    pub watcher: Option<Process>,
    /// Its tunnel, while one runs.
    pub tunnel: Option<Process>,
    tunnels_started: usize,
    /// What is started as its tunnel.
    pub tunnel_binary: PathBuf,
    /// Where the node is a container: what holds its namespaces.
    container: Option<Container>,
    /// The kubeconfig by which its watcher follows an API server; `None`: it reads the pods file.
    pub kubeconfig: Option<PathBuf>,
    /// More options of its watcher.
    pub watcher_words: Vec<String>,
    /// What its watcher is started by: a program that runs the rest of its command line.
    pub watcher_wrapper: Vec<String>,
    /// What is started as its watcher.
    pub watcher_binary: PathBuf,
    /// The folder of the certificate service that its tunnel uses; `None`: the development CA.
    pub ca_service: Option<PathBuf>,
}

/// A container that is a node.
#[derive(Debug)]
struct Container {
    _process: Process,
    /// Its first process, as seen from outside.
    pid: u32,
    /// Where it has mounted its own cgroup tree.
    mount: PathBuf,
}

impl ClusterNode {
    pub(super) fn new(cluster: &str, name: &str, number: u8, cgroups: &Path, dir: &Path) -> Self {
        let netns = TestNetns::new(format!("{cluster}-{name}"));
        let node = Self {
            name: name.to_owned(),
            number,
            cgroup: cgroups.join(name),
            dir: dir.join(name),
            pins_name: netns.name().to_owned(),
            netns,
            watcher: None,
            tunnel: None,
            tunnels_started: 0,
            tunnel_binary: binary("ztunnel"),
            container: None,
            ca_service: None,
            kubeconfig: None,
            watcher_words: Vec::new(),
            watcher_wrapper: Vec::new(),
            watcher_binary: binary("watcher"),
        };
        for below in ["kubepods", "ztunnel", "watcher"] {
            fs::create_dir_all(node.cgroup.join(below)).expect("cgroup");
        }
        fs::create_dir_all(&node.dir).expect("folder");
        let Self { netns, .. } = &node;
        // Without an address of its own it takes the lowest of its ports', and changes it as pods come:
        // what pods know of their gateway would be wrong for up to a minute.
        run(&format!("ip -n {netns} link add pods address 02:00:ad:17:00:{number:02x} type bridge"));
        run(&format!("ip -n {netns} addr add 10.77.{number}.1/24 dev pods"));
        run(&format!("ip -n {netns} addr add fd77:{number}::1/64 dev pods nodad"));
        run(&format!("ip -n {netns} link set pods up"));
        for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
            run(&format!("ip netns exec {netns} sysctl -qw {setting}"));
        }
        node
    }

    /// Joins two nodes by a veth pair, `link0` at both ends, and routes each one's pods to the
    /// other.
    pub fn join(a: &Self, b: &Self) {
        run(&format!("ip -n {} link add link0 type veth peer name link0 netns {}", a.netns, b.netns));
        for (here, there) in [(a, b), (b, a)] {
            let Self { netns, number, .. } = here;
            let other = there.number;
            run(&format!("ip -n {netns} addr add 10.77.0.{number}/24 dev link0"));
            run(&format!("ip -n {netns} addr add fd77::{number}/64 dev link0 nodad"));
            run(&format!("ip -n {netns} link set link0 up"));
            run(&format!("ip -n {netns} route add 10.77.{other}.0/24 via 10.77.0.{other}"));
            run(&format!("ip -n {netns} -6 route add fd77:{other}::/64 via fd77::{other}"));
        }
    }

    /// The cgroup of all its pods.
    pub fn pods_cgroup(&self) -> PathBuf {
        self.cgroup.join("kubepods")
    }

    /// Makes the node a container, as Kind's nodes are: pid, mount and cgroup namespaces of its
    /// own, the last with its own mount of the tree. To be called before anything runs on it.
    pub fn contain(&mut self, cgroup2: &Path) {
        // One tree is not mounted over itself.
        let script = "umount -l \"$0\" && mount -t cgroup2 cgroup2 \"$0\" && exec sleep infinity";
        let shell = ["sh", "-c", script, cgroup2.to_str().expect("UTF-8 path")];
        let words = [&UNSHARE[..], &shell].concat();
        let command = Placement::in_cgroup(&self.cgroup).in_netns(&self.netns).command(&words);
        let process = Process::spawn("node", command, &self.dir.join("node.log"));
        let pid = wait_for("the node's container", || {
            let members = cgroup::members(&self.cgroup).into_iter().map(|pid| pid.as_raw().cast_unsigned());
            members.into_iter().find(|pid| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep")
            })
        });
        self.container = Some(Container { _process: process, pid, mount: cgroup2.to_owned() });
    }

    /// Its first process, where it is a container.
    pub(super) fn inside(&self) -> Option<u32> {
        self.container.as_ref().map(|container| container.pid)
    }

    /// On this node, in `cgroup`.
    pub fn at(&self, cgroup: &Path) -> Placement {
        Placement::in_cgroup(cgroup).in_netns(&self.netns).in_node(self.inside())
    }

    /// Ends what holds the container's namespaces.
    pub(super) fn end_container(&mut self) {
        self.container = None;
    }

    /// The root of the cgroup tree that the node's programs see, as a path on the outside.
    pub fn cgroup_root(&self, cgroup2: &Path) -> PathBuf {
        if self.container.is_some() { self.cgroup.clone() } else { cgroup2.to_owned() }
    }

    /// A cgroup's path as the node's programs see it.
    pub fn as_seen_inside(&self, cgroup: &Path) -> PathBuf {
        match &self.container {
            Some(container) => {
                container.mount.join(cgroup.strip_prefix(&self.cgroup).expect("a cgroup of this node"))
            }
            None => cgroup.to_owned(),
        }
    }

    /// What its watcher reads.
    pub fn pods_file(&self) -> PathBuf {
        self.dir.join("pods.yaml")
    }

    /// Replaces that: `entries` are what follows `pods:`.
    pub fn write_pods(&self, entries: &str) {
        replace(&self.pods_file(), &format!("pods:\n{entries}"));
    }

    /// One more watcher of this node, which the caller keeps, with `more` options.
    pub fn spawn_watcher(&self, cgroup2: &Path, bpffs: &Path, more: &[&str]) -> Process {
        let path = |p: &Path| p.to_str().expect("UTF-8 path").to_owned();
        let (pods, zds, status) =
            (path(&self.pods_file()), path(&self.zds_socket()), path(&self.status_socket()));
        let (attach, root, bpffs) =
            (path(&self.as_seen_inside(&self.pods_cgroup())), path(cgroup2), path(bpffs));
        let binary = path(&self.watcher_binary);
        let mut line: Vec<&str> = self.watcher_wrapper.iter().map(String::as_str).collect();
        line.extend([binary.as_str(), "run", "--node", &self.pins_name]);
        match &self.kubeconfig {
            Some(_) => line.push("--kubernetes"),
            None => line.extend(["--pods", &pods]),
        }
        line.extend(["--zds-socket", &zds, "--status-socket", &status]);
        let run_dir = path(&self.dir.join("run"));
        line.extend(["--run-dir", &run_dir]);
        line.extend(["--bpffs", &bpffs, "--cgroup-root", &root, "--attach", &attach]);
        line.extend(more);
        line.extend(self.watcher_words.iter().map(String::as_str));
        let mut command = self.at(&self.cgroup.join("watcher")).command(&line);
        command.env("RUST_LOG", "info");
        if let Some(kubeconfig) = &self.kubeconfig {
            command.env("KUBECONFIG", kubeconfig);
        }
        Process::spawn("watcher", command, &self.dir.join("watcher.log"))
    }

    /// Starts its watcher with `more` options, and waits until it serves.
    pub fn start_watcher(&mut self, cgroup2: &Path, bpffs: &Path, more: &[&str]) {
        let (zds, status) = (self.zds_socket(), self.status_socket());
        let log = self.dir.join("watcher.log");
        let watcher = self.spawn_watcher(cgroup2, bpffs, more);
        let watcher = self.watcher.insert(watcher);
        wait_for("the watcher to serve", || {
            assert!(
                watcher.is_running(),
                "the watcher ended: {}",
                fs::read_to_string(&log).unwrap_or_default()
            );
            (zds.exists() && status.exists()).then_some(())
        });
    }

    /// Where the watcher listens for tunnels.
    pub fn zds_socket(&self) -> PathBuf {
        self.dir.join("zds.sock")
    }

    /// Where the watcher listens for commands.
    pub fn status_socket(&self) -> PathBuf {
        self.dir.join("status.sock")
    }

    /// Another tunnel process beside the one there is, as in an upgrade; the caller keeps it.
    pub fn spawn_tunnel(&mut self, mesh_file: &Path, ca_dir: &Path, env: &[(&str, &str)]) -> Process {
        // A tunnel's successor has a cgroup of its own, as its pod in a cluster has.
        let cgroup = self.cgroup.join("ztunnel").join(self.tunnels_started.to_string());
        self.tunnels_started += 1;
        fs::create_dir_all(&cgroup).expect("cgroup");
        let binary = self.tunnel_binary.to_str().expect("UTF-8 path");
        let mut command = self.at(&cgroup).command(&[binary]);
        command
            .env("INPOD_UDS", self.zds_socket())
            .env("LOCAL_XDS_PATH", mesh_file)
            .env("XDS_ADDRESS", "")
            .env("NODE_NAME", &self.name)
            .env("CLUSTER_ID", "Kubernetes")
            .env("ISTIO_META_DNS_CAPTURE", "false")
            .env("RUST_LOG", "info");
        match &self.ca_service {
            Some(folder) => command.envs(FakeCa::env(folder)),
            None => command.env("DEVELOPMENT_CA_DIR", ca_dir),
        };
        for (key, value) in env {
            command.env(key, value);
        }
        Process::spawn("ztunnel", command, &self.dir.join("ztunnel.log"))
    }

    /// Starts its tunnel and waits until it is ready.
    pub fn start_tunnel(&mut self, mesh_file: &Path, ca_dir: &Path) {
        self.tunnel = Some(self.spawn_tunnel(mesh_file, ca_dir, &[]));
        self.wait_tunnel_ready();
    }

    /// Waits until its tunnel is ready.
    pub fn wait_tunnel_ready(&mut self) {
        let netns = self.netns.alias();
        let log = self.dir.join("ztunnel.log");
        let tunnel = self.tunnel.as_mut().expect("a tunnel");
        wait_for(&format!("the tunnel of {netns} to be ready"), || {
            assert!(
                tunnel.is_running(),
                "the tunnel ended: {}",
                fs::read_to_string(&log).unwrap_or_default()
            );
            let (code, _) = netns.curl("http://127.0.0.1:15021/healthz/ready");
            (code == 200).then_some(())
        });
    }

    /// What its tunnels have written so far.
    pub fn tunnel_log(&self) -> String {
        fs::read_to_string(self.dir.join("ztunnel.log")).unwrap_or_default()
    }

    /// What its watchers have written so far.
    pub fn watcher_log(&self) -> String {
        fs::read_to_string(self.dir.join("watcher.log")).unwrap_or_default()
    }

    /// The access records that the tunnel has written so far.
    pub fn access_log(&self) -> Vec<String> {
        self.tunnel_log().lines().filter(|line| is_access_record(line)).map(plain).collect()
    }

    /// The tunnel's metrics.
    pub fn metrics(&self) -> String {
        self.http("http://127.0.0.1:15020/metrics").1
    }

    /// GETs `url` on this node: status and body; 0 when there is no answer.
    pub fn http(&self, url: &str) -> (u16, String) {
        self.netns.curl(url)
    }

    /// Runs `watcher …` of this node with `-o json` left to the caller.
    pub fn watcher_command(&self, words: &[&str]) -> Output {
        Command::new(binary("watcher"))
            .args(words)
            .args(["--status-socket"])
            .arg(self.status_socket())
            .stdin(Stdio::null())
            .output()
            .expect("watcher")
    }

    /// `watcher status pods -o json`.
    pub fn status(&self) -> String {
        text(&self.watcher_command(&["status", "pods", "-o", "json"]))
    }

    /// The last lines of both logs, for the message of a test that fails.
    pub fn story(&self) -> String {
        let mut story = String::new();
        for (what, log) in [("watcher", self.watcher_log()), ("ztunnel", self.tunnel_log())] {
            let lines: Vec<&str> = log.lines().collect();
            let _ = writeln!(story, "--- {what} of {} (last lines)", self.netns);
            for line in &lines[lines.len().saturating_sub(12)..] {
                let _ = writeln!(story, "{}", line.chars().take(400).collect::<String>());
            }
        }
        story
    }
}

fn is_access_record(line: &str) -> bool {
    let line = plain(line);
    line.contains(" access") && line.contains("src.addr")
}

/// A log line without a terminal's colours.
fn plain(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        if character == '\u{1b}' {
            for end in characters.by_ref() {
                if end.is_ascii_alphabetic() {
                    break;
                }
            }
        } else {
            text.push(character);
        }
    }
    text
}
