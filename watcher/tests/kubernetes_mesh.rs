//! Labels and annotations at a real API server act on real traffic. A label that is taken off breaks
//! nobody: peers learn of it late.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use testbed::{
    api_node::REDIRECTION,
    api_server::ApiServer,
    cluster::{Cluster, ClusterPod, Enrol},
    traffic::RequestLoop,
    wait::{wait_at_most, wait_for},
};

const MODE: &str = "istio.io/dataplane-mode";
/// How much later than the API the peers of a pod learn of its annotation: the control plane's
/// debouncing, and the way to them.
const LATE: Duration = Duration::from_millis(500);

/// A client in the mesh on node a; a server on node b, whose watcher follows an API server. The
/// tunnels learn from a control plane that goes by the annotation.
struct Mesh {
    cluster: Cluster,
    api: Arc<ApiServer>,
    namespace: String,
    client: ClusterPod,
    server: ClusterPod,
    /// Whether a policy refuses clients without identity.
    is_strict: bool,
}

impl Mesh {
    fn new() -> Self {
        let api = ApiServer::shared();
        let mut cluster = Cluster::new();
        let namespace = format!("{}-demo", cluster.id);
        api.namespace(&namespace, &json!({}));
        cluster.follow_api(1, &api);
        let client = cluster.pod("client", 0, Enrol::Mesh);
        let server = cluster.pod_of_api(&api, &namespace, "server", 1);
        cluster.serve_web(&server, "hello");
        let mut mesh = Self { cluster, api, namespace, client, server, is_strict: false };
        mesh.publish("TCP");
        mesh.cluster.publish_pods(0);
        let (cgroup2, bpffs) = (mesh.cluster.cgroup2.clone(), mesh.cluster.bpffs());
        let (file, ca) = (mesh.cluster.mesh_file(), mesh.cluster.ca_dir());
        for node in &mut mesh.cluster.nodes {
            node.start_watcher(&cgroup2, &bpffs, &["--detach"]);
            node.start_tunnel(&file, &ca);
        }
        mesh
    }

    /// What the control plane says: the protocol by which peers reach the server.
    fn publish(&self, protocol: &str) {
        let workload = |pod: &ClusterPod, namespace: &str, account: &str, protocol: &str| {
            json!({"uid": pod.name, "name": pod.name, "namespace": namespace, "serviceAccount": account,
                "workloadIps": [pod.v4, pod.v6], "protocol": protocol, "services": {}})
        };
        let workloads = [
            workload(&self.client, "demo", "client", "HBONE"),
            workload(&self.server, &self.namespace, "default", protocol),
        ];
        let next = self.cluster.dir.path().join("mesh.next");
        let mut mesh = json!({"workloads": workloads});
        if self.is_strict {
            mesh["policies"] = json!([{"name": "strict", "namespace": self.namespace, "scope": "Namespace",
                "action": "Deny", "rules": [[[{"notPrincipals": [{"Presence": []}]}]]]}]);
        }
        fs::write(&next, mesh.to_string()).expect("mesh file");
        fs::rename(next, self.cluster.mesh_file()).expect("mesh file");
    }

    fn label(&self, value: &Value) {
        let patch = json!({"metadata": {"labels": {MODE: value}}});
        self.api.patch_pod(&self.namespace, "server", &patch);
    }

    fn annotation(&self) -> Option<String> {
        self.api.annotation(&self.namespace, "server", REDIRECTION)
    }

    fn state(&self) -> Value {
        let status: Value = serde_json::from_str(&self.cluster.nodes[1].status()).expect("JSON");
        status["pods"].as_array().expect("pods")[0].clone()
    }

    /// The label comes, and with it the annotation and then the peers.
    fn enter(&self) {
        self.label(&json!("ambient"));
        wait_for("the annotation", || self.annotation().as_deref() == Some("enabled"));
        self.publish("HBONE");
        self.cluster_knows("HBONE");
    }

    /// The label goes, and with it the annotation; the peers learn of it late.
    fn leave(&self) {
        self.label(&Value::Null);
        wait_at_most(Duration::from_secs(2), "the annotation to go", || self.annotation().is_none());
        let gone = Instant::now();
        wait_for("the control plane to debounce", || gone.elapsed() >= LATE);
        self.publish("TCP");
        self.cluster_knows("TCP");
    }

    fn cluster_knows(&self, protocol: &str) {
        for node in &self.cluster.nodes {
            wait_for("the tunnel to learn", || {
                let (_, dump) = node.http("http://127.0.0.1:15000/config_dump");
                let dump: Value = serde_json::from_str(&dump).ok()?;
                let all = dump.get("workloads")?.as_array()?;
                let server = all.iter().find(|workload| workload["name"] == "server")?;
                (server["protocol"] == protocol).then_some(())
            });
        }
    }

    fn url(&self) -> String {
        format!("http://{}:8080/", self.server.v4)
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_label_that_is_taken_off_fails_no_request_of_peers_that_learn_of_it_late() {
    let mesh = Mesh::new();
    mesh.enter();
    let requests: Vec<RequestLoop> = ["one", "two", "three"]
        .iter()
        .map(|name| RequestLoop::start(&mesh.client, &mesh.url(), &mesh.cluster.dir.path().join(name)))
        .collect();
    for _ in 0..4 {
        for requests in &requests {
            requests.more(5);
        }
        mesh.leave();
        for requests in &requests {
            requests.more(5);
        }
        mesh.enter();
    }
    mesh.leave();
    for requests in requests {
        let (count, failed) = requests.finish();
        assert!(failed.is_empty(), "{} of {count}: {failed:?}", failed.len());
    }
    // Then nothing of the mesh is left.
    let prepared = || mesh.server.netns.run("ip rule").contains("0x539");
    wait_for("the pod to have left", || mesh.state()["reason"].is_null() && !prepared());
    assert_eq!(mesh.state()["state"], "plain");
}

/// As of Istio's agent: policy does not apply to what arrives in plaintext, and peers in the mesh
/// reach the pod as before.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_whose_inbound_capture_is_bypassed_is_reached_directly_and_by_hbone() {
    let mut mesh = Mesh::new();
    let stranger = mesh.cluster.pod("stranger", 0, Enrol::Plain);
    mesh.is_strict = true;
    mesh.enter();
    let url = mesh.url();
    wait_for("the policy to hold", || stranger.curl(&url).is_err());
    assert!(mesh.client.curl(&url).is_ok());
    let annotate = |value: Value| {
        let patch = json!({"metadata": {"annotations": {"ambient.istio.io/bypass-inbound-capture": value}}});
        mesh.api.patch_pod(&mesh.namespace, "server", &patch);
    };
    annotate(json!("true"));
    wait_for("the stranger to be let in", || stranger.curl(&url).is_ok());
    let reply = mesh.client.curl(&url).expect("by HBONE");
    assert!(reply.contains(&mesh.client.v4), "{reply}");
    wait_for("a record of the client at the server", || {
        mesh.cluster.nodes[1].access_log().iter().any(|line| line.contains("/sa/client"))
    });
    annotate(Value::Null);
    wait_for("the policy to hold again", || stranger.curl(&url).is_err());
}
