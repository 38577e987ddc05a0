//! A real cluster: an API server with its store, controller manager, scheduler and DNS, and nodes
//! with a kubelet, containerd, runc, CNI's plugins and kube-proxy. Nothing is simulated.
//!
//! ```text
//!   control plane ── bridge "nodes" ══ eth0 ─ node1 ─ cni0 ── pods 10.244.1.x
//!   10.99.0.254                     ╚═ eth0 ─ node2 ─ cni0 ── pods 10.244.2.x
//! ```
//!
//! `cni0` is a bridge; or there is none, and the node routes to each pod: [`Network`].
//!
//! Everything is in network namespaces of its own; nothing of the machine's network is changed.
//! Every cluster has names of its own. Dropping one removes all of it.

mod cgroups;
mod container;
mod control_plane;
mod kubectl;
mod node;
mod programs;
mod settings;

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use tempfile::TempDir;

pub use self::{
    kubectl::Pod,
    node::RealNode,
    settings::{CNI, Network, PAUSE_IMAGE},
};

use self::{control_plane::ControlPlane, node::Place};
use crate::{api_server::ApiServer, command::run, netns::TestNetns, wait::wait_slowly};

/// The address of the control plane.
const CENTER: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 254);
/// The same of IPv6.
const CENTER_V6: &str = "fd99::254";
/// Until a node, or a pod, is there: two cores may be busy with something else.
const LIMIT: Duration = Duration::from_mins(2);

/// A cluster of two nodes.
#[derive(Debug)]
pub struct RealCluster {
    /// Nodes `node1` and `node2`.
    pub nodes: Vec<RealNode>,
    control_plane: ControlPlane,
    /// The API server.
    pub api: ApiServer,
    /// The netns of the control plane, with the bridge that joins the nodes.
    pub netns: TestNetns,
    /// For files.
    pub dir: TempDir,
}

impl RealCluster {
    /// A cluster of two ready nodes, which have these images, with `network` for their pods.
    ///
    /// The calling thread moves into the network of the control plane, and stays there: it is to be
    /// a thread of a single test. Whatever it starts is there too.
    pub fn start(network: Network, images: &[&Path]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("adit{}r{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix(&format!("{id}-")).tempdir().expect("temporary folder");
        let netns = TestNetns::new(format!("{id}-cp"));
        run(&format!(
            "ip -n {netns} link add nodes type bridge
             ip -n {netns} addr add {CENTER}/24 dev nodes
             ip -n {netns} link set nodes up"
        ));
        if network.has_v6() {
            run(&format!("ip -n {netns} addr add {CENTER_V6}/64 dev nodes nodad"));
        }
        setns(netns.open(), CloneFlags::CLONE_NEWNET).expect("entering the cluster's network");
        let options = control_plane::api_options(network);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let api = ApiServer::start_at(CENTER, &options);
        let control_plane = ControlPlane::start(&api, CENTER, network, dir.path());
        let mut cluster = Self { nodes: Vec::new(), control_plane, api, netns, dir };
        let place = Place {
            id: &id,
            center: &cluster.netns,
            center_address: CENTER.to_string(),
            dir: cluster.dir.path(),
            api: &cluster.api,
            network,
        };
        let mut nodes: Vec<RealNode> = [1, 2].map(|number| RealNode::new(&place, number)).into();
        // Routes first: bridges of pods come with the pods.
        for (here, there) in [(0, 1), (1, 0)] {
            let RealNode { pods, address, v6, .. } = &nodes[there];
            run(&format!("ip -n {} route add {pods} via {address}", nodes[here].netns));
            if let Some((address, pods)) = v6 {
                run(&format!("ip -n {} route add {pods} via {address}", nodes[here].netns));
            }
        }
        for node in &mut nodes {
            node.write_settings(&place);
            node.start_containerd();
        }
        std::thread::scope(|scope| {
            for node in &nodes {
                scope.spawn(|| images.iter().for_each(|image| node.import(image)));
            }
        });
        for node in &mut nodes {
            node.start_kubelet();
            node.start_proxy();
        }
        cluster.nodes = nodes;
        for node in ["node1", "node2"] {
            wait_slowly(LIMIT, &format!("{node} to be ready"), || {
                cluster.kubectl_line(&["get", "node", node, "-o", READY]).is_some_and(|ready| ready == "True")
            });
        }
        cluster
    }

    /// A file of this cluster.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The last lines of all logs.
    pub fn story(&self) -> String {
        let nodes: String = self.nodes.iter().map(RealNode::story).collect();
        self.control_plane.story() + &nodes
    }
}

/// The status of a node's or pod's condition "Ready".
const READY: &str = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;

impl Drop for RealCluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.story());
            eprintln!("{}", self.kubectl_text(&["get", "pods", "-A", "-o", "wide"]));
            eprintln!("{}", self.kubectl_text(&["get", "events", "-A", "--sort-by=.lastTimestamp"]));
        }
    }
}
