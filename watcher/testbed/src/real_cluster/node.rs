//! A node: a container as Kind's nodes are, with pid, mount, cgroup and network namespaces of its
//! own, in which containerd and a kubelet run.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use super::{
    CENTER_V6,
    cgroups::NodeCgroups,
    container::{contain, in_cgroups},
    programs::{cni, containerd, runc},
    settings::{self, CNI, Network, NodeSettings},
};
use crate::{
    api_server::ApiServer,
    command::{run, text},
    netns::TestNetns,
    process::Process,
    program::kubernetes,
    wait::wait_for,
};

/// A node. On drop, everything that runs on it ends.
#[derive(Debug)]
pub struct RealNode {
    /// Its name, as the API server has it.
    pub name: String,
    /// Its address.
    pub address: String,
    /// The addresses of its pods.
    pub pods: String,
    /// Its IPv6 address and those of its pods, where the network has them.
    pub v6: Option<(String, String)>,
    /// For its files.
    pub dir: PathBuf,
    // Dropped in this order: programs, what holds the namespaces and with it every container, then
    // what they use.
    /// containerd, the kubelet and kube-proxy.
    services: Vec<(String, Process)>,
    namespaces: Process,
    /// Its first process, as seen from outside.
    init: u32,
    /// Its netns.
    pub netns: TestNetns,
    cgroups: NodeCgroups,
}

/// What a node needs to know of its cluster.
#[derive(Debug)]
pub(super) struct Place<'a> {
    /// The prefix of all names.
    pub id: &'a str,
    /// The netns of the control plane, whose bridge joins all nodes.
    pub center: &'a TestNetns,
    /// The address of the control plane, and of the cluster's DNS.
    pub center_address: String,
    /// For files.
    pub dir: &'a Path,
    /// The API server.
    pub api: &'a ApiServer,
    /// How pods are joined to their node.
    pub network: Network,
}

impl RealNode {
    /// Node number `number`, from 1 on, on which nothing runs yet.
    pub(super) fn new(place: &Place<'_>, number: u8) -> Self {
        let name = format!("node{number}");
        let netns = TestNetns::new(format!("{}-{name}", place.id));
        let (address, pods) = (format!("10.99.0.{number}"), format!("10.244.{number}.0/24"));
        let dir = place.dir.join(&name);
        let center = place.center;
        run(&format!(
            "ip -n {center} link add {name} type veth peer name eth0 netns {netns}
             ip -n {center} link set {name} master nodes up
             ip -n {center} route add {pods} via {address} dev nodes onlink
             ip -n {netns} addr add {address}/24 dev eth0
             ip -n {netns} link set eth0 up
             ip -n {netns} route add default via {}
             nsenter --net=/run/netns/{netns} sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
            place.center_address
        ));
        let v6 = place.network.has_v6().then(|| (format!("fd99::{number}"), format!("fd44:{number}::/64")));
        if let Some((address, pods)) = &v6 {
            run(&format!(
                "ip -n {netns} addr add {address}/64 dev eth0 nodad
                 ip -n {netns} route add default via {CENTER_V6}
                 ip -n {center} route add {pods} via {address} dev nodes"
            ));
        }
        let cgroups = NodeCgroups::new(&format!("{}-{name}", place.id));
        let (namespaces, init) = contain(&netns, &cgroups, &dir);
        Self { name, address, pods, v6, dir, services: Vec::new(), namespaces, init, netns, cgroups }
    }

    /// The settings of its programs.
    pub(super) fn write_settings(&self, place: &Place<'_>) {
        let user = format!("system:node:{}", self.name);
        let names = [self.name.as_str(), &self.address];
        place.api.kubeconfig_of_user(&self.name, "system:nodes", &user, &names);
        let settings = NodeSettings {
            dir: &self.dir,
            address: self.address.clone(),
            pods: self.pods.clone(),
            pods_v6: self.v6.as_ref().map(|(_, pods)| pods.clone()),
            dns: place.center_address.clone(),
            network: place.network,
            certificate: &place.api.file(&format!("{}.crt", self.name)),
            key: &place.api.file(&format!("{}.key", self.name)),
            ca: &place.api.file("ca.crt"),
        };
        let write = |name: &str, text: &str| fs::write(self.dir.join(name), text).expect(name);
        write("pods.conflist", &settings.cni().to_string());
        let list = self.dir.join("pods.conflist");
        self.run(&format!(
            "mkdir -p {CNI}/bin {CNI}/net.d && cp {} {CNI}/net.d/10-pods.conflist",
            list.display()
        ));
        write("containerd.toml", &settings.containerd(&cni(), &runc()));
        write("kubelet.json", &settings.kubelet().to_string());
        let admin = place.api.admin_kubeconfig();
        write("kube-proxy.json", &settings::proxy(&self.name, place.network, &admin).to_string());
        fs::copy(place.api.file(&format!("{}.kubeconfig", self.name)), self.dir.join("kubeconfig"))
            .expect("kubeconfig");
        write("resolv.conf", "");
    }

    /// Starts containerd and waits until it serves.
    pub fn start_containerd(&mut self) {
        let program = containerd("containerd");
        let mut command = self
            .command("containerd", &[text_of(&program), "-c", text_of(&self.dir.join("containerd.toml"))]);
        // Where it finds its shim.
        let folder = program.parent().expect("a folder").display();
        command.env("PATH", format!("{folder}:/usr/sbin:/usr/bin:/sbin:/bin"));
        self.start("containerd", command);
        wait_for("containerd to serve", || self.ctr(&["version"]).status.success());
    }

    /// Starts the kubelet.
    pub fn start_kubelet(&mut self) {
        let (config, kubeconfig) = (self.dir.join("kubelet.json"), self.dir.join("kubeconfig"));
        let v6 = self.v6.as_ref().map(|(address, _)| format!(",{address}")).unwrap_or_default();
        let command = self.command(
            "kubelet",
            &[
                text_of(&kubernetes("kubelet")),
                &format!("--config={}", config.display()),
                &format!("--kubeconfig={}", kubeconfig.display()),
                &format!("--hostname-override={}", self.name),
                &format!("--node-ip={}{v6}", self.address),
            ],
        );
        self.start("kubelet", command);
    }

    /// Starts kube-proxy.
    pub fn start_proxy(&mut self) {
        let config = format!("--config={}", self.dir.join("kube-proxy.json").display());
        let command = self.command("kube-proxy", &[text_of(&kubernetes("kube-proxy")), &config]);
        self.start("kube-proxy", command);
    }

    /// Kills one of its services at once, as a crash does: `containerd`, `kubelet` or `kube-proxy`.
    /// The kubelet's cgroup goes with it, as with systemd; containerd's has the shims of containers.
    pub fn kill_service(&mut self, name: &str) {
        let (found, rest) =
            std::mem::take(&mut self.services).into_iter().partition(|(known, _)| known == name);
        self.services = rest;
        let found: Vec<(String, Process)> = found;
        assert_eq!(found.len(), 1, "{name} runs");
        for (_, service) in found {
            end(service);
        }
        if name == "kubelet" {
            self.cgroups.remove(name);
        }
    }

    fn start(&mut self, name: &str, command: Command) {
        let process = Process::spawn(name, command, &self.log(name));
        self.services.push((name.to_owned(), process));
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// `ctr` in the namespace of Kubernetes.
    pub fn ctr(&self, words: &[&str]) -> Output {
        let (program, socket) = (containerd("ctr"), self.dir.join("containerd.sock"));
        let words = [&[text_of(&program), "-a", text_of(&socket), "-n", "k8s.io"], words].concat();
        self.command("", &words).output().expect("ctr")
    }

    /// Imports an image.
    pub fn import(&self, archive: &Path) {
        let output = self.ctr(&["images", "import", text_of(archive)]);
        assert!(output.status.success(), "import {}: {}", archive.display(), text(&output));
    }

    /// The command that runs `words` on the node, in its cgroup `service`; "": at the root.
    pub fn command(&self, service: &str, words: &[&str]) -> Command {
        self.cgroups.create(service);
        in_cgroups(&self.cgroups.dirs(service), &self.netns, Some(self.init), words)
    }

    /// Runs `script` on the node with `sh -e` and returns what it printed.
    pub fn run(&self, script: &str) -> String {
        let output = self.command("", &["sh", "-ec", script]).output().expect("sh");
        assert!(output.status.success(), "{}: {script}\n{}", self.name, text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The last lines of its logs, for the message of a test that fails.
    pub fn story(&self) -> String {
        let last = |name: &str| {
            let log = fs::read(self.log(name)).unwrap_or_default();
            let log = String::from_utf8_lossy(&log).into_owned();
            let lines: Vec<&str> = log.lines().collect();
            format!("--- {name} of {}\n{}\n", self.name, lines[lines.len().saturating_sub(15)..].join("\n"))
        };
        ["containerd", "kubelet", "kube-proxy"].map(last).concat()
    }
}

impl Drop for RealNode {
    fn drop(&mut self) {
        // The kubelet first: it would start again what ends.
        while let Some((_, service)) = self.services.pop() {
            end(service);
        }
        self.namespaces.kill();
    }
}

/// Kills a program on the node at once, with the `nsenter` that waits for it.
fn end(mut service: Process) {
    let group = i32::try_from(service.pid()).expect("a pid");
    let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    service.kill();
}

fn text_of(path: &Path) -> &str {
    path.to_str().expect("UTF-8 path")
}
