//! A cluster with Adit's image, and the steps that every story has.

use std::{fs, path::PathBuf, sync::Mutex};

use serde_json::{Value, json};
use testbed::{
    chart, image,
    program::binary,
    real_cluster::{Network, PAUSE_IMAGE, Pod, RealCluster, RealNode},
    wait::try_wait_slowly,
};

use crate::istiod;

/// The namespace that Adit is installed in, where the control plane is its own.
pub const SYSTEM: &str = "adit-system";
/// The namespace whose pods are enrolled.
pub const DEMO: &str = "demo";
/// The service before the pod `server`.
pub const SERVER: &str = "http://server.demo.svc/";
/// How long anything may take that pods, kubelets and controllers do.
pub const LIMIT: std::time::Duration = std::time::Duration::from_mins(2);

/// Where Istio's control plane is, and Adit with it.
pub const ISTIO: &str = "istio-system";

/// A cluster, and Adit's chart for it.
#[derive(Debug)]
pub struct Rig {
    pub cluster: RealCluster,
    /// The namespace that Adit is installed in.
    pub system: &'static str,
}

/// A pod of the tests.
#[derive(Clone, Copy, Debug)]
pub struct PodSpec<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    /// Its service account.
    pub account: &'a str,
    /// `node1` or `node2`.
    pub node: &'a str,
    /// What it does: words of `testbed::roles::play`.
    pub role: &'a [&'a str],
}

impl PodSpec<'_> {
    /// Its manifest.
    pub fn manifest(&self) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": self.name, "namespace": self.namespace, "labels": {"app": self.name}},
            "spec": {
                "serviceAccountName": self.account,
                "nodeSelector": {"kubernetes.io/hostname": self.node},
                "terminationGracePeriodSeconds": 0,
                "containers": [container("main", self.role)],
            },
        })
    }
}

/// A container that does what `role` says.
pub fn container(name: &str, role: &[&str]) -> Value {
    let command: Vec<&str> = ["/usr/local/bin/pod"].iter().chain(role).copied().collect();
    json!({"name": name, "image": image::POD, "imagePullPolicy": "Never", "command": command})
}

impl Rig {
    /// A cluster that knows Istio's kinds of policies, and nothing else.
    pub fn start() -> Self {
        Self::start_with(Network::Bridge)
    }

    /// The same with another network of pods.
    pub fn start_with(network: Network) -> Self {
        let rig = Self::bare(network, SYSTEM);
        let crds = concat!(env!("CARGO_MANIFEST_DIR"), "/../ztunnel/control/tests/crds.yaml");
        rig.cluster.apply(&fs::read_to_string(crds).expect("the definitions of Istio's policies"));
        rig
    }

    /// A cluster that knows nothing but Kubernetes.
    fn bare(network: Network, system: &'static str) -> Self {
        let images = images();
        let images: Vec<_> = images.iter().map(PathBuf::as_path).collect();
        Self { cluster: RealCluster::start(network, &images), system }
    }

    /// A cluster with Istio's control plane, and nothing else of Istio's.
    pub fn start_with_istio() -> Self {
        let rig = Self::bare(Network::Bridge, ISTIO);
        istiod::install(&rig);
        rig
    }

    /// Makes a namespace with service accounts.
    pub fn namespace(&self, name: &str, accounts: &[&str]) {
        self.cluster.kubectl(&["create", "namespace", name]);
        for account in accounts {
            self.cluster.kubectl(&["-n", name, "create", "serviceaccount", account]);
        }
    }

    /// Makes a pod, and waits until it is ready.
    pub fn pod(&self, spec: PodSpec<'_>) -> Pod {
        self.cluster.apply(&spec.manifest().to_string());
        self.cluster.ready_pod(spec.namespace, spec.name)
    }

    /// Makes a pod of `demo` that answers on port 8080, and waits until it is ready.
    pub fn serving(&self, name: &str, account: &str, node: &str) -> Pod {
        self.pod(PodSpec { namespace: DEMO, name, account, node, role: &["serve", "8080"] })
    }

    /// The pod `server` on `node2`, and the service before it.
    pub fn server(&self) -> Pod {
        let pod = self.serving("server", "server", "node2");
        self.cluster.kubectl(&["-n", DEMO, "expose", "pod", "server", "--port=80", "--target-port=8080"]);
        pod
    }

    /// The pods `server`, `client` and `other` of `demo`, and one of a namespace that is never labelled.
    pub fn demo_and_a_stranger(&self) -> [Pod; 4] {
        self.namespace(DEMO, &["client", "server", "other"]);
        self.namespace("outside", &[]);
        let stranger = PodSpec {
            namespace: "outside",
            name: "stranger",
            account: "default",
            node: "node1",
            role: &["serve", "8080"],
        };
        [
            self.server(),
            self.serving("client", "client", "node1"),
            self.serving("other", "other", "node2"),
            self.pod(stranger),
        ]
    }

    /// Installs, with `more` values, and has the server of `demo` enrolled.
    pub fn install_enrolled(&self, more: &[&str]) {
        self.namespace(DEMO, &["client", "server"]);
        self.install(more);
        self.label(DEMO, "ambient");
        let server = self.server();
        self.wait_enrolled(&server, true);
    }

    /// `helm install`, with `more` values.
    pub fn install(&self, more: &[&str]) {
        self.install_chart(chart::folder().to_str().expect("UTF-8 path"), more);
    }

    /// The same of the chart in `folder`.
    pub fn install_chart(&self, folder: &str, more: &[&str]) {
        let words = ["install", "adit", folder, "--namespace", self.system, "--create-namespace"];
        self.cluster
            .helm(&[&words, VALUES, more].concat())
            .unwrap_or_else(|said| panic!("helm install: {said}"));
        self.wait_rolled_out();
    }

    /// `helm upgrade`, with these values beside those of the tests.
    ///
    /// # Errors
    /// What Helm says when it refuses.
    pub fn upgrade(&self, more: &[&str]) -> Result<String, String> {
        let folder = chart::folder();
        let words = ["upgrade", "adit", folder.to_str().expect("UTF-8 path"), "--namespace", self.system];
        self.cluster.helm(&[&words, VALUES, more].concat())
    }

    /// Waits until control plane, watchers and tunnels are ready, as they were asked for last.
    ///
    /// Not by `kubectl rollout status` alone: of a DaemonSet it waits for old pods to have ended,
    /// too, and those serve the connections that they have.
    pub fn wait_rolled_out(&self) {
        let control = if self.system == SYSTEM { "deployment/ztunnel-control" } else { "deployment/istiod" };
        let control = ["-n", self.system, "rollout", "status", control, "--timeout=120s"];
        let done = self.cluster.try_kubectl(&control);
        assert!(done.status.success(), "the control plane is not rolled out\n{}", self.system_story());
        let done = try_wait_slowly(LIMIT, || self.is_rolled_out());
        assert!(done.is_some(), "the DaemonSet is not rolled out\n{}", self.system_story());
    }

    /// Whether each node has one pod of the DaemonSet that is not being deleted, which is ready and
    /// of the last revision.
    fn is_rolled_out(&self) -> bool {
        let json = |kind: &str| -> Value {
            let list =
                self.cluster.kubectl(&["-n", self.system, "get", kind, "-l", "app=ztunnel", "-o", "json"]);
            serde_json::from_str(&list).expect("JSON")
        };
        let path = "jsonpath={.metadata.generation} {.status.observedGeneration}";
        let generations =
            self.cluster.kubectl(&["-n", self.system, "get", "daemonset", "ztunnel", "-o", path]);
        let is_seen = generations.split_once(' ').is_some_and(|(wanted, observed)| wanted == observed);
        let revisions = json("controllerrevisions");
        let last = revisions["items"]
            .as_array()
            .expect("revisions")
            .iter()
            .max_by_key(|item| item["revision"].as_u64());
        let Some(last) = last.filter(|_| is_seen) else { return false };
        let hash = &last["metadata"]["labels"]["controller-revision-hash"];
        let pods = json("pods");
        let pods = pods["items"].as_array().expect("pods");
        let staying: Vec<&Value> =
            pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).collect();
        let is_current = |pod: &&Value| {
            let conditions = pod["status"]["conditions"].as_array();
            let ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
            pod["metadata"]["labels"]["controller-revision-hash"] == *hash
                && conditions.is_some_and(|conditions| conditions.iter().any(ready))
        };
        staying.len() == self.cluster.nodes.len() && staying.iter().all(is_current)
    }

    /// What the pods of Adit say of themselves.
    pub fn system_story(&self) -> String {
        let describe = self.cluster.kubectl_text(&["-n", self.system, "describe", "pods"]);
        let logs = ["watcher", "ztunnel", "ztunnel-control", "discovery"].map(|container| {
            let pods = self.cluster.kubectl_text(&["-n", self.system, "get", "pods", "-o", "name"]);
            pods.lines()
                .map(|pod| {
                    self.cluster.kubectl_text(&["-n", self.system, "logs", pod, "-c", container, "--tail=25"])
                })
                .collect::<Vec<_>>()
                .join("\n")
        });
        format!("{describe}\n{}", logs.join("\n"))
    }

    /// Enrols the namespace (`ambient`), or takes it out again (`none`).
    pub fn label(&self, namespace: &str, mode: &str) {
        let label = format!("istio.io/dataplane-mode={mode}");
        self.cluster.kubectl(&["label", "--overwrite", "namespace", namespace, &label]);
    }

    /// Waits until the watcher reports that a pod is in the mesh, or is not.
    pub fn wait_enrolled(&self, pod: &Pod, is_enrolled: bool) {
        let path = r"jsonpath={.metadata.annotations.ambient\.istio\.io/redirection}";
        let wanted = if is_enrolled { "enabled" } else { "" };
        let mut last = None;
        let reached = try_wait_slowly(LIMIT, || {
            last = self.cluster.kubectl_line(&["-n", &pod.namespace, "get", "pod", &pod.name, "-o", path]);
            last.as_deref() == Some(wanted)
        });
        assert!(
            reached.is_some(),
            "{}: wanted {wanted:?}, found {last:?}\n{}",
            pod.name,
            self.system_story()
        );
    }

    /// One GET by a pod: the body, or why there is none.
    ///
    /// # Errors
    /// What the pod's program says when there is no answer.
    pub fn get(&self, client: &Pod, url: &str) -> Result<String, String> {
        self.cluster.exec(client, "main", &["/usr/local/bin/pod", "get", url])
    }

    /// Waits until a GET succeeds, or fails.
    pub fn wait_get(&self, client: &Pod, url: &str, succeeds: bool) -> String {
        let mut last = None;
        let reached = try_wait_slowly(LIMIT, || {
            let answer = self.get(client, url);
            let reached = answer.is_ok() == succeeds;
            last = Some(answer);
            reached
        });
        assert!(reached.is_some(), "{} to {url}: {last:?}\n{}", client.name, self.system_story());
        last.expect("an answer").unwrap_or_else(|said| said)
    }

    /// The pod of Adit on a node.
    pub fn agent(&self, node: &str) -> Pod {
        let pods = self.cluster.pods(self.system, "app=ztunnel");
        let on_node =
            |pod: &&Value| pod["spec"]["nodeName"] == node && pod["metadata"]["deletionTimestamp"].is_null();
        let pod = pods.iter().find(on_node).unwrap_or_else(|| panic!("no tunnel on {node}"));
        self.cluster.pod(self.system, pod["metadata"]["name"].as_str().expect("a name")).expect("a pod")
    }

    /// Waits for a record of the tunnel of `node` that contains all of `parts`.
    pub fn wait_record(&self, node: &str, parts: &[&str]) -> String {
        let agent = self.agent(node);
        let mut last = String::new();
        let found = try_wait_slowly(LIMIT, || {
            last = self.cluster.kubectl_text(&["-n", self.system, "logs", &agent.name, "-c", "ztunnel"]);
            last.lines().find(|line| parts.iter().all(|part| line.contains(part))).map(str::to_owned)
        });
        found.unwrap_or_else(|| panic!("no record with {parts:?} in\n{last}"))
    }

    /// Kills a container of Adit on a node at once, as a crash does.
    pub fn kill(&self, node: &str, container: &str) {
        let on = self.cluster.nodes.iter().find(|on| on.name == node).expect("a node");
        // Its processes are those of the pod with that name.
        on.run(&format!(
            "for pid in $(pgrep -x {container}); do
               grep -q pod{} /proc/$pid/cgroup && kill -9 $pid
             done",
            self.agent(node).uid
        ));
    }

    /// Has the kernel kill a container of Adit on a node for the memory of its cgroup, which must have a
    /// limit: a file in memory, written from there, takes all of it.
    pub fn fill_memory(&self, node: &str, container: &str) {
        let on = self.cluster.nodes.iter().find(|on| on.name == node).expect("a node");
        on.run(&format!(
            r#"for pid in $(pgrep -x {container}); do
                 grep -q pod{} /proc/$pid/cgroup || continue
                 cgroup=$(sed -n 's/^[0-9]*:memory://p; s/^0:://p' /proc/$pid/cgroup | head -n 1)
                 for dir in /sys/fs/cgroup/memory$cgroup /sys/fs/cgroup$cgroup; do [ -d "$dir" ] && break; done
                 sh -c 'echo $$ > "$0/cgroup.procs" && exec dd if=/dev/zero of=/run/filler bs=1M' "$dir" || true
                 rm -f /run/filler
               done"#,
            self.agent(node).uid
        ));
    }

    /// How often a container of Adit on a node was started again and is ready.
    pub fn restarts(&self, node: &str, container: &str) -> i64 {
        let agent = self.agent(node);
        let path = format!("jsonpath={{.status.containerStatuses[?(@.name==\"{container}\")]}}");
        let status = self.cluster.kubectl(&["-n", self.system, "get", "pod", &agent.name, "-o", &path]);
        let status: Value = serde_json::from_str(&status).expect("JSON");
        if status["ready"] == true { status["restartCount"].as_i64().expect("a count") } else { 0 }
    }

    /// Uninstalls as docs/install.md says.
    pub fn uninstall(&self) {
        let folder = chart::folder();
        let words = ["upgrade", "adit", folder.to_str().expect("UTF-8 path"), "--namespace", self.system];
        let more = ["--reset-then-reuse-values", "--set", "watcher.detach=true"];
        self.cluster
            .helm(&[&words[..], &more].concat())
            .unwrap_or_else(|said| panic!("helm upgrade: {said}"));
        self.wait_rolled_out();
        self.cluster.kubectl(&["-n", self.system, "delete", "daemonset/ztunnel"]);
        self.cluster.wait_gone(self.system, "app=ztunnel");
        self.cluster
            .helm(&["uninstall", "adit", "--namespace", self.system])
            .unwrap_or_else(|said| panic!("{said}"));
        self.cluster.wait_gone(self.system, "app.kubernetes.io/name=adit");
    }

    /// What is on the nodes and in the netns of `pods` is as if Adit had never been there.
    pub fn assert_nothing_left(&self, pods: &[&Pod]) {
        for node in &self.cluster.nodes {
            assert_eq!(left_on(node), "", "left on {}", node.name);
        }
        for pod in pods {
            assert_eq!(left_in(self.node_of(pod), pod), "", "left in {}", pod.name);
        }
    }

    /// The node of a pod.
    pub fn node_of(&self, pod: &Pod) -> &RealNode {
        self.cluster.nodes.iter().find(|node| node.name == pod.node).expect("a node")
    }

    /// The first process of a pod of the tests, as its node numbers it.
    pub fn process_of(&self, pod: &Pod) -> String {
        process_of(self.node_of(pod), pod)
    }

    /// `watcher WORDS` on a node.
    pub fn watcher(&self, node: &str, words: &[&str]) -> String {
        let words = [&["/usr/local/bin/watcher"], words].concat();
        self.cluster
            .exec(&self.agent(node), "watcher", &words)
            .unwrap_or_else(|said| panic!("{words:?}: {said}"))
    }
}

/// What Adit has on a node: pins, files, cgroups.
fn left_on(node: &RealNode) -> String {
    node.run(
        "find /sys/fs/bpf -mindepth 1 ! -name maps.debug ! -name progs.debug
         find /run/adit /run/ztunnel -mindepth 1 2>/dev/null || true
         find /var/lib/adit -type f 2>/dev/null || true",
    )
}

/// The first process of a pod of the tests, as its node numbers it.
fn process_of(node: &RealNode, pod: &Pod) -> String {
    let find = format!(
        "for pid in $(pgrep -f '^/usr/local/bin/pod'); do
           grep -q pod{} /proc/$pid/cgroup && echo $pid && break
         done",
        pod.uid
    );
    node.run(&find).trim().to_owned()
}

/// What Adit has in the netns of a pod: rules, routes, sockets, the sysctl.
fn left_in(node: &RealNode, pod: &Pod) -> String {
    let pid = process_of(node, pod);
    let script = "
        for family in -4 -6; do
          ip $family rule | grep -vE \"lookup (local|main|default)\" || true
          ip $family route show table all | grep -E \"table [0-9]+\" || true
        done
        grep -v 0 /proc/sys/net/ipv4/tcp_fwmark_accept || true
        ss -Hltn | grep -E \":(15001|15006|15008|15053)\" || true";
    node.run(&format!("nsenter -t {pid} -n sh -ec '{script}'"))
}

/// Where Adit comes from, as the tests have it.
const VALUES: &[&str] = &["--set", "image=localhost/adit:e2e", "--set", "imagePullPolicy=Never"];

/// Where the archives of images are.
pub fn image_folder() -> PathBuf {
    let folder = binary("watcher").with_file_name("e2e-images");
    fs::create_dir_all(&folder).expect("folder");
    folder
}

/// The archives of all images, made anew when a program of theirs has changed.
fn images() -> Vec<PathBuf> {
    static MAKING: Mutex<()> = Mutex::new(());
    let _alone = MAKING.lock().expect("no panic");
    let folder = image_folder();
    vec![image::adit(&folder), image::pod(&folder), image::pause(&folder, PAUSE_IMAGE)]
}
