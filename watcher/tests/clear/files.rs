//! What tunnels, watchers and the pods' programs read.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use testbed::{
    cluster::{Works, replace},
    pod_program::PORT,
};

use super::{
    life::{Life, Mode},
    network::Place,
    rig::{ROLES, Rig, Role, SLOTS, letter, number},
};

impl Rig {
    /// What the tunnels read: it stays as it is.
    pub fn write_mesh(&self) {
        let mut yaml = String::from("workloads:\n");
        for node in 0..2 {
            let fixed = ROLES.iter().map(|(role, name, mode)| (*role as u8, (*name).to_owned(), *mode));
            let slots = SLOTS.map(|host| (host, format!("slot{host}"), Mode::Closed));
            for (host, name, mode) in fixed.chain(slots) {
                let [v4, v6] = Place { node: number(node), host }.told();
                let protocol = if mode == Mode::Plain { "TCP" } else { "HBONE" };
                let _ = write!(
                    yaml,
                    "- uid: Kubernetes//Pod/demo/{letter}-{name}\n  name: {letter}-{name}\n  namespace: demo\n  \
                     serviceAccount: {letter}-{name}\n  workloadIps: [\"{v4}\", \"{v6}\"]\n  \
                     protocol: {protocol}\n  node: {letter}\n  clusterId: Kubernetes\n  services: {{}}\n",
                    letter = letter(node),
                );
            }
        }
        let _ = write!(yaml, "services: []\npolicies:\n{}", self.cluster.policies);
        if self.cluster.policies.is_empty() {
            yaml = yaml.replace("policies:\n", "policies: []\n");
        }
        replace(&self.cluster.mesh_file(), &yaml);
    }

    /// Takes the policy away.
    pub fn lift_policy(&mut self) {
        self.note("the policy is lifted".to_owned());
        self.cluster.policies.clear();
        self.write_mesh();
    }

    pub fn targets(&self, name: &str) -> PathBuf {
        self.cluster.dir.path().join(name)
    }

    /// What pods dial, and what attackers dial.
    pub fn write_targets(&self) {
        let lines = |addresses: Vec<IpAddr>| -> String {
            addresses.iter().fold(String::new(), |mut lines, address| {
                let _ = writeln!(lines, "{}", SocketAddr::new(*address, PORT));
                lines
            })
        };
        let servers = (0..2).flat_map(|node| Place { node: number(node), host: Role::Server as u8 }.told());
        replace(&self.targets("servers"), &lines(servers.collect()));
        replace(&self.targets("none"), "");
        for node in 0..2 {
            let mut addresses = Vec::new();
            for life in self.lives.iter().filter(|life| life.running.is_some() && life.mode == Mode::Closed) {
                let here = life.node == node;
                let reached = |address: &IpAddr| match address {
                    IpAddr::V6(v6) => here || !v6.is_unicast_link_local(),
                    IpAddr::V4(_) => true,
                };
                addresses.extend(life.place.addresses().into_iter().filter(reached));
            }
            replace(&self.targets(&format!("attack-{node}")), &lines(addresses));
        }
    }

    /// Whether the pods of a node come from an API server.
    pub fn follows_api(&self, node: usize) -> bool {
        self.api.as_ref().is_some_and(|api| api.node == node)
    }

    /// Has a node's source of pods be away, else be broken or silent.
    pub fn break_source(&mut self, node: usize, away: bool) {
        self.hosts[node].is_source_broken = true;
        let file = self.cluster.nodes[node].pods_file();
        match &self.api {
            Some(api) if api.node == node => api.set(if away { Works::Cut } else { Works::Silent }),
            _ if away => fs::remove_file(&file).expect("the pods file"),
            _ => replace(&file, "pods: [\n"),
        }
    }

    /// Has it work, with everything that has changed meanwhile.
    pub fn mend_source(&mut self, node: usize) {
        self.hosts[node].is_source_broken = false;
        if let Some(api) = self.api.as_ref().filter(|api| api.node == node) {
            api.set(Works::Yes);
        }
        self.publish(node);
    }

    /// Tells a node's source of its pods: changes objects, whether the node reaches the API server
    /// or not, or writes the pods file, unless that is broken at present.
    pub fn publish(&mut self, node: usize) {
        let Self { api, lives, .. } = self;
        if let Some(api) = api.as_mut().filter(|api| api.node == node) {
            return api.publish(lives.iter().filter(|life| life.node == node));
        }
        if self.hosts[node].is_source_broken {
            return;
        }
        let named = self.lives.iter().filter(|life| life.node == node && life.named);
        let entries: String = named.map(Life::entry).collect();
        let text = if entries.is_empty() { "pods: []\n".to_owned() } else { format!("pods:\n{entries}") };
        replace(&self.cluster.nodes[node].pods_file(), &text);
    }
}
