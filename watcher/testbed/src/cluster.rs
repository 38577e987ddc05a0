//! Two nodes made of network namespaces, pods made of cgroups and network namespaces, and on each
//! node the real `watcher` and the real `ztunnel`. The end-to-end tests, the demo and the
//! benchmarks use it.
//!
//! ```text
//!   pod ─eth0── bridge ┐ node a ─ link0 ════ link0 ─ node b ┌ bridge ──eth0─ pod
//!   10.77.1.x, fd77:1::x                                      10.77.2.x, fd77:2::x
//! ```
//!
//! Every cluster has names of its own, so several can stand side by side. Dropping one removes all
//! of it.

mod api;
mod files;
mod node;
mod pod;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tempfile::TempDir;

pub use self::{
    api::{WayToApi, Works},
    files::replace,
    node::ClusterNode,
    pod::{ClusterPod, Enrol},
};

use crate::{
    cgroup::{Cgroup, cgroup2_mount},
    command::run,
    fakes::FakeCa,
    mount::Mount,
    netns::TestNetns,
    process::Process,
    program::binary,
    wait::{LIMIT, try_wait, wait_for},
};

/// A policy of the namespace `demo` that refuses clients without an identity.
pub const STRICT: &str = "- name: strict\n  namespace: demo\n  scope: Namespace\n  action: Deny\n  \
                          rules:\n  - - - notPrincipals: [{Presence: []}]\n";

/// Two joined nodes with their pods, and what the tunnels know of them.
#[derive(Debug)]
pub struct Cluster {
    /// The prefix of all names.
    pub id: String,
    // Dropped in this order: programs, then the netns, cgroups and mounts that they use.
    processes: Vec<Process>,
    /// Nodes `a` and `b`.
    pub nodes: Vec<ClusterNode>,
    /// All pods made so far.
    pub pods: Vec<ClusterPod>,
    /// `policies:` of the mesh file, as YAML.
    pub policies: String,
    /// Where cgroup2 is mounted.
    pub cgroup2: PathBuf,
    fake_ca: Option<FakeCa>,
    cgroup: Cgroup,
    bpffs: Mount,
    _tmpfs: Mount,
    /// For files of this cluster.
    pub dir: TempDir,
}

/// The IPv4 address of the service `web`.
pub const WEB_V4: &str = "10.77.100.1";
/// The IPv6 address of the service `web`.
pub const WEB_V6: &str = "fd77:100::1";

impl Cluster {
    /// Two joined nodes, `a` and `b`, without pods, watchers and tunnels.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("adit{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix(&format!("{id}-")).tempdir().expect("temporary folder");
        // In memory, as `/run` of a node is: what a watcher writes there is no work for a disk.
        let tmpfs = Mount::tmpfs(dir.path());
        let bpffs = dir.path().join("bpf");
        fs::create_dir(&bpffs).expect("folder");
        let mut cluster = Self {
            processes: Vec::new(),
            nodes: Vec::new(),
            pods: Vec::new(),
            policies: String::new(),
            cgroup2: cgroup2_mount(),
            fake_ca: None,
            cgroup: Cgroup::new(&id),
            bpffs: Mount::bpffs(&bpffs),
            _tmpfs: tmpfs,
            id,
            dir,
        };
        for (name, number) in [("a", 1), ("b", 2)] {
            let node = ClusterNode::new(&cluster.id, name, number, cluster.cgroup.path(), cluster.dir.path());
            cluster.nodes.push(node);
        }
        ClusterNode::join(&cluster.nodes[0], &cluster.nodes[1]);
        cluster
    }

    /// The bpffs that both watchers pin to.
    pub fn bpffs(&self) -> PathBuf {
        self.bpffs.path().to_owned()
    }

    /// What the tunnels read.
    pub fn mesh_file(&self) -> PathBuf {
        self.dir.path().join("mesh.yaml")
    }

    /// The development CA that the tunnels share.
    pub fn ca_dir(&self) -> PathBuf {
        self.dir.path().join("ca")
    }

    /// Makes a pod on node `node` (0: a, 1: b): cgroup, netns, address, and a process that holds
    /// them.
    pub fn pod(&mut self, name: &str, node: usize, enrol: Enrol) -> ClusterPod {
        self.pod_as(name, node, enrol, &format!("pod{name}"))
    }

    /// The same with a cgroup of another name.
    pub fn pod_as(&mut self, name: &str, node: usize, enrol: Enrol, cgroup: &str) -> ClusterPod {
        let host = 10 + self.pods.len();
        let (on, number) = (&self.nodes[node], self.nodes[node].number);
        let netns = Arc::new(TestNetns::new(format!("{}-{name}", self.id)));
        let cgroup = on.pods_cgroup().join(cgroup).join("main");
        fs::create_dir_all(&cgroup).expect("cgroup");
        let pod = ClusterPod {
            name: name.to_owned(),
            node,
            cgroup,
            v4: format!("10.77.{number}.{host}"),
            v6: format!("fd77:{number}::{host:x}"),
            enrol,
            serves_web: false,
            fail_open: false,
            inside: on.inside(),
            netns,
        };
        let (netns, outside) = (&pod.netns, format!("p{host}"));
        run(&format!(
            "ip -n {node} link add {outside} type veth peer name eth0 netns {netns}
             ip -n {node} link set {outside} master pods up
             ip -n {netns} addr add {v4}/24 dev eth0
             ip -n {netns} addr add {v6}/64 dev eth0 nodad
             ip -n {netns} link set eth0 up
             ip -n {netns} route add default via 10.77.{number}.1
             ip -n {netns} -6 route add default via fd77:{number}::1",
            node = on.netns,
            v4 = pod.v4,
            v6 = pod.v6,
        ));
        let pause = pod.spawn("pause", &["sleep", "infinity"], &self.dir.path().join("pause.log"));
        self.processes.push(pause);
        self.pods.push(pod.clone());
        pod
    }

    /// An unmodified nginx in `pod` on 8080, which says who it is and whom it sees.
    pub fn serve_web(&mut self, pod: &ClusterPod, greeting: &str) {
        let folder = self.dir.path().join(format!("nginx-{}", pod.name));
        fs::create_dir(&folder).expect("folder");
        let at = folder.display();
        let config = format!(
            "daemon off; worker_processes 1; pid {at}/pid; error_log {at}/error.log;\n\
             events {{ worker_connections 4096; }}\n\
             http {{ access_log off; client_body_temp_path {at}/b; proxy_temp_path {at}/p;\n\
             fastcgi_temp_path {at}/f; uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
             keepalive_requests 100000000;\n\
             server {{ listen 8080; listen [::]:8080;\n\
             location / {{ return 200 \"{greeting}, client $remote_addr\\n\"; }} }} }}\n"
        );
        let file = folder.join("nginx.conf");
        fs::write(&file, config).expect("nginx.conf");
        let command =
            ["/usr/sbin/nginx", "-p", folder.to_str().expect("UTF-8"), "-c", file.to_str().expect("UTF-8")];
        let log = folder.join("output.log");
        self.processes.push(pod.spawn("nginx", &command, &log));
        wait_for("nginx to listen", || {
            pod.exec(&["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8080"]).status.success().then_some(())
        });
        for known in &mut self.pods {
            known.serves_web |= known.name == pod.name;
        }
    }

    /// Keeps a program until the cluster ends.
    pub fn keep(&mut self, process: Process) {
        self.processes.push(process);
    }

    /// Writes what tunnels and watchers read; both notice by themselves.
    pub fn publish(&self) {
        self.publish_mesh();
        for node in 0..self.nodes.len() {
            self.publish_pods(node);
        }
    }

    /// Replaces the tunnels' file of workloads, services and policies, which they follow.
    pub fn publish_mesh(&self) {
        replace(&self.mesh_file(), &self.mesh_yaml());
    }

    /// Replaces the pods file of node number `node`, which its watcher follows.
    pub fn publish_pods(&self, node: usize) {
        replace(&self.nodes[node].pods_file(), &self.pods_yaml(node));
    }

    /// The tunnels ask a certificate service, as they would ask Istio's.
    pub fn use_certificate_service(&mut self) {
        let folder = self.dir.path().join("ca-service");
        let netns: Vec<&TestNetns> = self.nodes.iter().map(|node| &node.netns).collect();
        self.fake_ca = Some(FakeCa::start(&folder, &netns));
        for node in &mut self.nodes {
            node.ca_service = Some(folder.clone());
        }
    }

    /// Publishes, then starts the watcher and the tunnel of each node, and waits for the pods to be
    /// open.
    pub fn start(&mut self) {
        let tunnel = binary("ztunnel");
        self.start_with(&tunnel);
    }

    /// The same with another binary for the tunnel.
    pub fn start_with(&mut self, tunnel: &Path) {
        self.publish();
        let (cgroup2, bpffs, mesh, ca) =
            (self.cgroup2.clone(), self.bpffs(), self.mesh_file(), self.ca_dir());
        for node in &mut self.nodes {
            let root = node.as_seen_inside(&node.cgroup_root(&cgroup2));
            node.start_watcher(&root, &bpffs, &["--detach"]);
            tunnel.clone_into(&mut node.tunnel_binary);
            node.start_tunnel(&mesh, &ca);
        }
        self.wait_settled();
    }

    /// Kills the watcher of a node, and after `pause` starts another one.
    pub fn replace_watcher(&mut self, node: usize, pause: Duration) {
        let (cgroup2, bpffs) = (self.cgroup2.clone(), self.bpffs());
        let node = &mut self.nodes[node];
        if let Some(mut watcher) = node.watcher.take() {
            watcher.kill();
        }
        std::thread::sleep(pause);
        let root = node.as_seen_inside(&node.cgroup_root(&cgroup2));
        node.start_watcher(&root, &bpffs, &["--detach"]);
    }

    /// Labels or unlabels pods, in the order in which a control plane and the node agents do it:
    /// peers stop sending HBONE before the pod leaves, and start after it came.
    pub fn label(&mut self, names: &[&str], enrol: Enrol) {
        for pod in self.pods.iter_mut().filter(|pod| names.contains(&pod.name.as_str())) {
            pod.enrol = enrol;
        }
        if enrol == Enrol::Plain {
            self.publish_mesh();
            self.wait_mesh_read();
        }
        for node in 0..self.nodes.len() {
            self.publish_pods(node);
        }
        self.wait_settled();
        if enrol == Enrol::Mesh {
            self.publish_mesh();
            self.wait_mesh_read();
        }
    }

    /// Until each tunnel's dump shows the protocols of the mesh file.
    pub fn wait_mesh_read(&self) {
        for node in &self.nodes {
            if node.tunnel.is_none() {
                continue;
            }
            wait_for("the tunnel to read the mesh file", || {
                let (_, dump) = node.http("http://127.0.0.1:15000/config_dump");
                let dump: serde_json::Value = serde_json::from_str(&dump).ok()?;
                let workloads = dump.get("workloads")?.as_array()?;
                self.pods
                    .iter()
                    .all(|pod| {
                        let wanted = if pod.enrol == Enrol::Mesh { "HBONE" } else { "TCP" };
                        workloads.iter().any(|workload| {
                            workload.get("name").and_then(|v| v.as_str()) == Some(&pod.name)
                                && workload.get("protocol").and_then(|v| v.as_str()) == Some(wanted)
                        })
                    })
                    .then_some(())
            });
        }
    }

    /// Until the watchers report exactly the labelled pods as open.
    pub fn wait_settled(&self) {
        for (index, node) in self.nodes.iter().enumerate() {
            if node.watcher.is_none() {
                continue;
            }
            let mut wanted: Vec<&str> = self
                .pods
                .iter()
                .filter(|pod| pod.node == index && pod.enrol == Enrol::Mesh)
                .map(|pod| pod.name.as_str())
                .collect();
            wanted.sort_unstable();
            let settled = try_wait(LIMIT, || open_pods(&node.status()) == wanted);
            assert!(
                settled.is_some(),
                "node {}: wanted open {wanted:?}\n{}\n{}",
                node.name,
                node.status(),
                node.story()
            );
        }
    }
}

/// The names of the pods that `watcher status pods -o json` shows as open.
fn open_pods(status: &str) -> Vec<String> {
    let Ok(value) = serde_json::from_str::<serde_json::Value>(status) else {
        return vec![format!("unreadable status: {status}")];
    };
    let mut names: Vec<String> = value
        .get("pods")
        .and_then(|pods| pods.as_array())
        .into_iter()
        .flatten()
        .filter(|pod| pod.get("state").and_then(|v| v.as_str()) == Some("open"))
        .filter_map(|pod| pod.get("name")?.as_str().map(str::to_owned))
        .collect();
    names.sort_unstable();
    names
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in &self.nodes {
                eprintln!("{}", node.story());
            }
        }
        self.processes.clear();
        for node in &mut self.nodes {
            node.tunnel = None;
            node.watcher = None;
            node.end_container();
        }
        for pod in &self.pods {
            pod.netns.delete();
        }
    }
}
