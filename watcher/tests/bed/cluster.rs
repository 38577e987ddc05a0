//! The whole bed: two nodes, their pods, and what the tunnels know of them.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use tempfile::TempDir;

use super::{
    ca::CarelessCa,
    cgroups::{cgroup2_mount, remove_cgroups},
    node::Node,
    pod::{Enrol, Pod},
    process::{Process, run, run_quietly, wait_for},
};

#[derive(Debug)]
pub struct Bed {
    pub id: String,
    // Before everything else in the order of drops: programs end first.
    processes: Vec<Process>,
    pub nodes: Vec<Node>,
    pub pods: Vec<Pod>,
    /// `policies:` of the mesh file, as YAML.
    pub policies: String,
    pub cgroup2: PathBuf,
    cgroup: PathBuf,
    ca_service: Option<CarelessCa>,
    pub dir: TempDir,
}

/// The service address that `web` has in both families.
pub const WEB_V4: &str = "10.77.100.1";
pub const WEB_V6: &str = "fd77:100::1";

impl Bed {
    /// Two joined nodes, `a` and `b`, without pods, watchers and tunnels.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("adit{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let cgroup2 = cgroup2_mount();
        let cgroup = cgroup2.join(&id);
        let dir = tempfile::Builder::new().prefix(&format!("{id}-")).tempdir().expect("temporary folder");
        // In memory, as a node's /run is: what is noted there is no work for a disk.
        run(&format!("mount -t tmpfs tmpfs {}", dir.path().display()));
        let bpffs = dir.path().join("bpf");
        fs::create_dir(&bpffs).expect("folder");
        run(&format!("mount -t bpf bpf {}", bpffs.display()));
        let mut bed = Self {
            nodes: Vec::new(),
            pods: Vec::new(),
            processes: Vec::new(),
            policies: String::new(),
            cgroup2,
            cgroup,
            ca_service: None,
            id,
            dir,
        };
        for (name, number) in [("a", 1), ("b", 2)] {
            bed.nodes.push(Node::new(&bed.id, name, number, &bed.cgroup, bed.dir.path()));
        }
        Node::join(&bed.nodes[0], &bed.nodes[1]);
        bed
    }

    pub fn bpffs(&self) -> PathBuf {
        self.dir.path().join("bpf")
    }

    pub fn mesh_file(&self) -> PathBuf {
        self.dir.path().join("mesh.yaml")
    }

    pub fn ca_dir(&self) -> PathBuf {
        self.dir.path().join("ca")
    }

    /// Makes a pod on node `node` (0: a, 1: b): cgroup, netns, address, and a process that holds them.
    pub fn pod(&mut self, name: &str, node: usize, enrol: Enrol) -> Pod {
        self.pod_as(name, node, enrol, &format!("pod{name}"))
    }

    /// The same with a cgroup of another name.
    pub fn pod_as(&mut self, name: &str, node: usize, enrol: Enrol, cgroup: &str) -> Pod {
        let host = 10 + self.pods.len();
        let (on, number) = (&self.nodes[node], self.nodes[node].number);
        let netns = format!("{}-{name}", self.id);
        let cgroup = on.pods_cgroup().join(cgroup).join("main");
        fs::create_dir_all(&cgroup).expect("cgroup");
        let pod = Pod {
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
        run(&format!("ip netns add {netns}"));
        run(&format!("ip -n {netns} link set lo up"));
        run(&format!("ip -n {} link add {outside} type veth peer name eth0 netns {netns}", on.netns));
        run(&format!("ip -n {} link set {outside} master pods up", on.netns));
        run(&format!("ip -n {netns} addr add {}/24 dev eth0", pod.v4));
        run(&format!("ip -n {netns} addr add {}/64 dev eth0 nodad", pod.v6));
        run(&format!("ip -n {netns} link set eth0 up"));
        run(&format!("ip -n {netns} route add default via 10.77.{number}.1"));
        run(&format!("ip -n {netns} -6 route add default via fd77:{number}::1"));
        let pause = pod.spawn("pause", &["sleep", "infinity"], &self.dir.path().join("pause.log"));
        self.processes.push(pause);
        self.pods.push(pod.clone());
        pod
    }

    /// An unmodified nginx in `pod` on 8080, which says who it is and whom it sees.
    pub fn serve_web(&mut self, pod: &Pod, greeting: &str) {
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
        wait_for("nginx to listen", Duration::from_secs(10), || {
            pod.exec(&["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8080"]).status.success().then_some(())
        });
        for known in &mut self.pods {
            known.serves_web |= known.name == pod.name;
        }
    }

    /// Keeps a program until the bed ends.
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

    pub fn publish_mesh(&self) {
        replace(&self.mesh_file(), &self.mesh_yaml());
    }

    pub fn publish_pods(&self, node: usize) {
        replace(&self.nodes[node].pods_file(), &self.pods_yaml(node));
    }

    fn pods_yaml(&self, node: usize) -> String {
        let mut yaml = String::from("pods:\n");
        for pod in self.pods.iter().filter(|pod| pod.node == node) {
            let _ = write!(
                yaml,
                "- uid: {}\n  name: {name}\n  namespace: demo\n  serviceAccount: {name}\n  cgroup: {}\n",
                pod.uid(),
                self.nodes[node].as_seen_inside(pod.cgroup.parent().expect("pod cgroup")).display(),
                name = pod.name,
            );
            if pod.enrol == Enrol::Mesh {
                yaml.push_str("  labels: {istio.io/dataplane-mode: ambient}\n");
            }
            if pod.fail_open {
                yaml.push_str("  failMode: open\n");
            }
        }
        if yaml == "pods:\n" { "pods: []\n".into() } else { yaml }
    }

    fn mesh_yaml(&self) -> String {
        let mut yaml = String::from("workloads:\n");
        for pod in &self.pods {
            let protocol = if pod.enrol == Enrol::Mesh { "HBONE" } else { "TCP" };
            let _ = write!(
                yaml,
                "- uid: Kubernetes//Pod/demo/{name}\n  name: {name}\n  namespace: demo\n  \
                 serviceAccount: {name}\n  workloadIps: [\"{}\", \"{}\"]\n  protocol: {protocol}\n  \
                 node: {}\n  canonicalName: {name}\n  canonicalRevision: latest\n  workloadName: {name}\n  \
                 workloadType: deployment\n  clusterId: Kubernetes\n",
                pod.v4,
                pod.v6,
                self.nodes[pod.node].name,
                name = pod.name,
            );
            // Istio's ztunnel refuses a workload without this key.
            yaml.push_str(if pod.serves_web {
                "  services:\n    demo/web.demo.svc.cluster.local:\n      80: 8080\n"
            } else {
                "  services: {}\n"
            });
        }
        let _ = write!(
            yaml,
            "services:\n- name: web\n  namespace: demo\n  hostname: web.demo.svc.cluster.local\n  \
             vips: [\"/{WEB_V4}\", \"/{WEB_V6}\"]\n  ports: {{80: 8080}}\n"
        );
        let _ = write!(yaml, "policies:{}", if self.policies.is_empty() { " []\n" } else { "\n" });
        yaml + &self.policies
    }

    /// The tunnels ask a certificate service, as they would ask Istio's.
    pub fn use_certificate_service(&mut self) {
        let folder = self.dir.path().join("ca-service");
        let netns: Vec<&str> = self.nodes.iter().map(|node| node.netns.as_str()).collect();
        self.ca_service = Some(CarelessCa::start(&folder, &netns));
        for node in &mut self.nodes {
            node.ca_service = Some(folder.clone());
        }
    }

    /// Publishes, then starts the watcher and the tunnel of each node, and waits for the pods to be open.
    pub fn start(&mut self) {
        let tunnel = super::node::binary("ztunnel");
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

    /// Labels or unlabels pods, in the order in which a control plane and the node agents do it: peers
    /// stop sending HBONE before the pod leaves, and start after it came.
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
            wait_for("the tunnel to read the mesh file", Duration::from_secs(10), || {
                let (_, dump) = super::node::http(&node.netns, "http://127.0.0.1:15000/config_dump");
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
            let deadline = std::time::Instant::now() + Duration::from_secs(15);
            while open_pods(&node.status()) != wanted {
                assert!(
                    std::time::Instant::now() < deadline,
                    "node {}: wanted open {wanted:?}\n{}\n{}",
                    node.name,
                    node.status(),
                    node.story()
                );
                std::thread::sleep(Duration::from_millis(10));
            }
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

/// Writes a file so that a reader sees the old or the new one, never half of it.
fn replace(path: &Path, content: &str) {
    let next = path.with_extension("next");
    fs::write(&next, content).expect("write");
    fs::rename(&next, path).expect("rename");
}

impl Drop for Bed {
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
            node.container = None;
        }
        for pod in &self.pods {
            run_quietly(&format!("ip netns del {}", pod.netns));
        }
        for node in &self.nodes {
            run_quietly(&format!("ip netns del {}", node.netns));
        }
        for mount in [self.bpffs().as_path(), self.dir.path()] {
            // Lazily: a program that is still ending may hold its log.
            run_quietly(&format!("umount --lazy {}", mount.display()));
        }
        remove_cgroups(&self.cgroup);
    }
}
