//! A real API server with its store, on loopback, for as long as it is held.
//!
//! The programs come from `KUBEBUILDER_ASSETS`, else from `PATH`, else from the cache, where
//! `.ci/setup/kube-tools` builds them. No kubelet runs pods: tests create them with the name of a
//! node, set their status, and start the processes themselves.

use std::{
    fmt, fs,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, LazyLock, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use json_patch::merge;
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

mod access;
mod apply;
mod keys;

use self::{
    access::{client, write_kubeconfig},
    keys::Keys,
};
use crate::{chart, process::KillOnDrop, program::kubernetes};

const LIMIT: Duration = Duration::from_mins(1);
/// The addresses of services.
pub const SERVICES: &str = "10.96.0.0/16";
/// That of the service `kubernetes`, by which pods reach the API server.
const SERVICE_ADDRESS: &str = "10.96.0.1";

/// The account and the rights of the watcher, and the lists that it follows, from the chart.
pub fn rbac() -> &'static str {
    static RENDERED: LazyLock<String> = LazyLock::new(|| {
        let of = |name| chart::template("redirect-only", name, &[]);
        format!("{}\n---\n{}", of("watcher-rbac.yaml"), of("watcher-lists.yaml"))
    });
    &RENDERED
}

static SHARED: Mutex<Weak<ApiServer>> = Mutex::new(Weak::new());

/// An API server and its store.
pub struct ApiServer {
    // Dropped in this order.
    server: Mutex<Option<KillOnDrop>>,
    store: Mutex<Option<KillOnDrop>>,
    dir: tempfile::TempDir,
    port: u16,
    store_port: u16,
    address: Ipv4Addr,
    options: Vec<String>,
    keys: Keys,
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiServer").field("port", &self.port).finish_non_exhaustive()
    }
}

/// A port for a server that starts later. Not one of those that the kernel gives to clients (32768
/// and up, ip-sysctl): a connection could take it in between.
fn free_port() -> u16 {
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    std::iter::repeat_with(|| rand::random_range(20_000..32_000)).find(is_free).expect("endless")
}

fn log(dir: &Path, name: &str) -> fs::File {
    fs::File::options().create(true).append(true).open(dir.join(format!("{name}.log"))).expect("log")
}

fn spawn(dir: &Path, name: &str, arguments: &[String]) -> KillOnDrop {
    let mut command = Command::new(kubernetes(name));
    command.args(arguments).stdin(Stdio::null()).stdout(log(dir, name)).stderr(log(dir, name));
    KillOnDrop(command.spawn().expect(name))
}

impl ApiServer {
    /// The one that the tests of this executable share while any of them runs.
    pub fn shared() -> Arc<Self> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = shared.upgrade() {
            return server;
        }
        let server = Arc::new(Self::start());
        *shared = Arc::downgrade(&server);
        server
    }

    /// One for a single test, which may stop it.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with more options of the API server.
    pub fn start_with(options: &[&str]) -> Self {
        let server = Self::start_at(Ipv4Addr::LOCALHOST, options);
        server.namespace("adit-system", &json!({}));
        server.apply(rbac());
        server
    }

    /// One for nodes that reach it at `address`, without namespaces and rights of ours.
    pub fn start_at(address: Ipv4Addr, options: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("adit-api").tempdir().expect("folder");
        let keys = Keys::make(dir.path(), &[&address.to_string(), SERVICE_ADDRESS]);
        let (port, store_port) = (free_port(), free_port());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("runtime");
        let admin = dir.path().join("admin.kubeconfig");
        write_kubeconfig(
            &admin,
            dir.path(),
            &format!("https://{address}:{port}"),
            &json!({"client-certificate": dir.path().join("admin.crt"), "client-key": dir.path().join("admin.key")}),
        );
        let client = runtime.block_on(client(&admin));
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let server = Self {
            address,
            options,
            keys,
            dir,
            port,
            store_port,
            store: Mutex::default(),
            server: Mutex::default(),
            runtime,
            client,
        };
        server.start_store();
        server.start_server();
        server
    }

    fn start_store(&self) {
        let (address, peers) =
            (format!("http://127.0.0.1:{}", self.store_port), format!("http://127.0.0.1:{}", free_port()));
        let arguments = [
            format!("--data-dir={}", self.dir.path().join("etcd").display()),
            "--unsafe-no-fsync".to_owned(),
            format!("--listen-client-urls={address}"),
            format!("--advertise-client-urls={address}"),
            format!("--listen-peer-urls={peers}"),
            format!("--initial-advertise-peer-urls={peers}"),
            format!("--initial-cluster=default={peers}"),
        ];
        *self.store.lock().expect("store") = Some(spawn(self.dir.path(), "etcd", &arguments));
        self.wait("the store to listen", || async {
            tokio::net::TcpStream::connect(("127.0.0.1", self.store_port)).await.ok().map(drop)
        });
    }

    /// Starts the API server and waits until it serves.
    pub fn start_server(&self) {
        let path = |name: &str| self.file(name).display().to_string();
        let issuer = "https://kubernetes.default.svc.cluster.local";
        let arguments = [
            format!("--etcd-servers=http://127.0.0.1:{}", self.store_port),
            format!("--bind-address={}", self.address),
            format!("--advertise-address={}", self.address),
            format!("--secure-port={}", self.port),
            format!("--tls-cert-file={}", path("server.crt")),
            format!("--tls-private-key-file={}", path("server.key")),
            format!("--client-ca-file={}", path("ca.crt")),
            format!("--service-account-issuer={issuer}"),
            format!("--api-audiences={issuer}"),
            format!("--service-account-key-file={}", path("accounts.pub")),
            format!("--service-account-signing-key-file={}", path("accounts.key")),
            format!("--kubelet-client-certificate={}", path("admin.crt")),
            format!("--kubelet-client-key={}", path("admin.key")),
            format!("--kubelet-certificate-authority={}", path("ca.crt")),
            "--authorization-mode=Node,RBAC".to_owned(),
            format!("--service-cluster-ip-range={SERVICES}"),
            "--allow-privileged=true".to_owned(),
            // No service can have an endpoint on loopback.
            format!(
                "--endpoint-reconciler-type={}",
                if self.address.is_loopback() { "none" } else { "lease" }
            ),
            "--profiling=false".to_owned(),
        ];
        let arguments = [arguments.as_slice(), &self.options].concat();
        *self.server.lock().expect("server") = Some(spawn(self.dir.path(), "kube-apiserver", &arguments));
        self.wait("the API server to serve", || async {
            let request = http::Request::get("/readyz").body(Vec::new()).expect("request");
            self.client().request_text(request).await.ok().filter(|text| text == "ok").map(drop)
        });
    }

    /// Starts another program of Kubernetes beside it, which ends when the result is dropped. Its log
    /// is in the same folder.
    pub fn start_beside(&self, name: &str, arguments: &[String]) -> KillOnDrop {
        spawn(self.dir.path(), name, arguments)
    }

    /// Ends the API server at once, as a crash does; its store stays.
    pub fn kill_server(&self) {
        drop(self.server.lock().expect("server").take());
    }

    /// Sends `signal` to the API server.
    pub fn signal_server(&self, signal: Signal) {
        let server = self.server.lock().expect("server");
        let pid = server.as_ref().expect("a running server").0.id();
        kill(nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid")), signal).expect("signal");
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it serves.
    pub fn url(&self) -> String {
        format!("https://{}:{}", self.address, self.port)
    }

    /// A file in its folder, such as `ca.crt`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A client with all rights.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Waits for a request to the API.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(async { tokio::time::timeout(LIMIT, future).await.expect("an answer in time") })
    }

    /// Attempts a request until it returns a value.
    pub fn wait<T, F: Future<Output = Option<T>>>(&self, what: &str, mut attempt: impl FnMut() -> F) -> T {
        let deadline = Instant::now() + LIMIT;
        loop {
            let limited =
                async { tokio::time::timeout(Duration::from_secs(5), attempt()).await.ok().flatten() };
            if let Some(found) = self.runtime.block_on(limited) {
                return found;
            }
            let ended = |server: &mut Option<KillOnDrop>| {
                server.as_mut().is_some_and(|server| !matches!(server.0.try_wait(), Ok(None)))
            };
            if ended(&mut self.server.lock().expect("server")) || Instant::now() > deadline {
                let log = fs::read_to_string(self.dir.path().join("kube-apiserver.log")).unwrap_or_default();
                let last: Vec<&str> = log.lines().rev().take(15).collect();
                panic!(
                    "waited in vain for {what}\n{}",
                    last.into_iter().rev().collect::<Vec<_>>().join("\n")
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A namespace with these labels, ready for pods.
    pub fn namespace(&self, name: &str, labels: &Value) {
        let namespace = json!({"metadata": {"name": name, "labels": labels}});
        let namespace: Namespace = serde_json::from_value(namespace).expect("a namespace");
        self.block_on(Api::all(self.client()).create(&PostParams::default(), &namespace)).expect("created");
        // The controller manager would make it.
        self.service_account(name, "default");
    }

    /// Creates a service account.
    pub fn service_account(&self, namespace: &str, name: &str) {
        let account = json!({"metadata": {"name": name}});
        let account: ServiceAccount = serde_json::from_value(account).expect("a service account");
        let api = Api::namespaced(self.client(), namespace);
        self.block_on(api.create(&PostParams::default(), &account)).expect("created");
    }

    /// Sets (or with `null` removes) labels of a namespace.
    pub fn label_namespace(&self, name: &str, labels: &Value) {
        let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
        let api: Api<Namespace> = Api::all(self.client());
        self.block_on(api.patch(name, &PatchParams::default(), &patch)).expect("patched");
    }

    /// Creates a pod of `node`, with `more` merged into it, and returns its uid.
    pub fn pod(&self, namespace: &str, name: &str, node: &str, more: &Value) -> String {
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {"nodeName": node, "containers": [{"name": "main", "image": "none"}]},
        });
        merge(&mut pod, more);
        let pod: Pod = serde_json::from_value(pod).expect("a pod");
        let api: Api<Pod> = Api::namespaced(self.client(), namespace);
        // The server refuses it until its own watch has seen the service account.
        let pod = self.wait("the pod to be taken", || async {
            api.create(&PostParams::default(), &pod).await.inspect_err(|error| eprintln!("{error}")).ok()
        });
        pod.metadata.uid.expect("a uid")
    }

    /// Merges `patch` into a pod.
    pub fn patch_pod(&self, namespace: &str, name: &str, patch: &Value) {
        let api: Api<Pod> = Api::namespaced(self.client(), namespace);
        self.block_on(api.patch(name, &PatchParams::default(), &Patch::Merge(patch))).expect("patched");
    }

    /// Sets the status of a pod, as a kubelet does.
    pub fn set_status(&self, namespace: &str, name: &str, status: &Value) {
        let api: Api<Pod> = Api::namespaced(self.client(), namespace);
        let patch = Patch::Merge(json!({"status": status}));
        self.block_on(api.patch_status(name, &PatchParams::default(), &patch)).expect("patched");
    }

    /// Deletes a pod at once.
    pub fn delete_pod(&self, namespace: &str, name: &str) {
        let api: Api<Pod> = Api::namespaced(self.client(), namespace);
        let params = kube::api::DeleteParams::default().grace_period(0);
        drop(self.block_on(api.delete(name, &params)).expect("deleted"));
    }

    /// The value of an annotation of a pod.
    pub fn annotation(&self, namespace: &str, name: &str, key: &str) -> Option<String> {
        let api: Api<Pod> = Api::namespaced(self.client(), namespace);
        let pod = self.block_on(api.get(name)).expect("the pod");
        pod.metadata.annotations.and_then(|annotations| annotations.get(key).cloned())
    }

    /// Drops all versions but the last: a watch from an older one must start with a new list.
    pub fn compact(&self) {
        // The store's own gateway of gRPC, since no client of it is needed otherwise.
        let base = format!("http://127.0.0.1:{}/v3/kv", self.store_port);
        let post = |path: &str, body: &Value| -> Value {
            let output = Command::new("curl")
                .args([
                    "-sS",
                    "--fail",
                    "--noproxy",
                    "*",
                    "-X",
                    "POST",
                    &format!("{base}/{path}"),
                    "-d",
                    &body.to_string(),
                ])
                .output()
                .expect("curl");
            assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
            serde_json::from_slice(&output.stdout).expect("JSON")
        };
        let found = post("range", &json!({"key": "AA==", "limit": "1"}));
        let revision = found["header"]["revision"].as_str().expect("a revision").to_owned();
        post("compaction", &json!({"revision": revision, "physical": true}));
    }
}
