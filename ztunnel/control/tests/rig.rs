//! A control plane at a shared API server, and what calls it.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use k8s_openapi::api::{authentication::v1::TokenRequest, core::v1::ServiceAccount};
use kube::{
    Api,
    api::{ListParams, PostParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use serde_json::{Value, json};
use testbed::{api_server::ApiServer, chart, process::KillOnDrop, program::binary, wait::wait_for};
use tokio::{runtime::Runtime, sync::mpsc, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Request, Status, Streaming,
    metadata::MetadataValue,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use ztunnel_api::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};

pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

/// How long anything may take. Long enough for a loaded machine.
pub const LIMIT: Duration = Duration::from_secs(30);

const TUNNEL: &str =
    "apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: ztunnel\n  namespace: adit-system";

/// Istio's resources, as far as tests write them. The real ones have a schema.
const CRDS: &str = include_str!("crds.yaml");

/// The account and the rights of the control plane, from the chart: those for a list of revoked
/// certificates, too.
fn rights() -> &'static str {
    static RENDERED: LazyLock<String> = LazyLock::new(|| {
        chart::template("standalone", "control-rbac.yaml", &["--set", "peerCaCrl.enabled=true"])
    });
    &RENDERED
}

/// A name that no other test uses.
pub fn unique(what: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{what}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A control plane. It ends with this.
pub struct Control {
    pub api: Arc<ApiServer>,
    pub runtime: Runtime,
    pub process: KillOnDrop,
    pub grpc: SocketAddr,
    http: SocketAddr,
    pub root: String,
    log: PathBuf,
    _dir: tempfile::TempDir,
}

impl Control {
    /// With more arguments, at the API server that all tests share. Istio's resources are installed.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_with_istio(ApiServer::shared(), arguments)
    }

    /// The same at an API server of the test's own.
    pub fn start_with_istio(api: Arc<ApiServer>, arguments: &[&str]) -> Self {
        api.apply(CRDS);
        for kind in ["AuthorizationPolicy", "PeerAuthentication"] {
            let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("security.istio.io", "v1", kind));
            let objects: Api<DynamicObject> = Api::all_with(api.client(), &resource);
            api.wait(kind, || async { objects.list(&ListParams::default()).await.ok() });
        }
        Self::start_at(api, arguments)
    }

    /// Returns when it is ready.
    pub fn start_at(api: Arc<ApiServer>, arguments: &[&str]) -> Self {
        Self::start_in(api, &[], arguments)
    }

    /// The same with more variables.
    pub fn start_in(api: Arc<ApiServer>, variables: &[(&str, &str)], arguments: &[&str]) -> Self {
        let kubeconfig = kubeconfig(&api);
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let output = File::create(&log).unwrap();
        let child = Command::new(binary("ztunnel-control"))
            .args(["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--server-name", "localhost"])
            .args(arguments)
            .env("KUBECONFIG", kubeconfig)
            .env("RUST_LOG", "info,ztunnel_control=debug")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stderr(output.try_clone().unwrap())
            .stdout(output)
            .spawn()
            .unwrap();
        let process = KillOnDrop(child);
        let read = || fs::read_to_string(&log).unwrap();
        let address = |key: &str| {
            let log = read();
            let line = log.lines().find(|line| line.contains("listening"))?;
            let text = line.split_whitespace().find_map(|word| word.strip_prefix(key))?;
            text.parse::<SocketAddr>().ok()
        };
        let grpc = wait_for("the control plane to listen", || address("grpc="));
        let http = address("http=").unwrap();
        let runtime = Runtime::new().unwrap();
        let root = String::new();
        let mut control = Self { api, runtime, process, grpc, http, root, log, _dir: dir };
        let ready = testbed::wait::try_wait(LIMIT, || control.get("/healthz/ready").contains("200 OK"));
        assert!(ready.is_some(), "not ready\n{}", control.log());
        let maps: Api<k8s_openapi::api::core::v1::ConfigMap> =
            Api::namespaced(control.api.client(), "adit-system");
        let published = control.api.block_on(maps.get("adit-root-cert")).unwrap();
        control.root = published.data.unwrap().remove("root-cert.pem").unwrap();
        control
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// The answer to a GET of HTTP, with its head.
    pub fn get(&self, path: &str) -> String {
        use std::io::{Read as _, Write as _};
        let Ok(mut stream) = TcpStream::connect(self.http) else { return String::new() };
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let mut answer = String::new();
        let asked = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_string(&mut answer));
        asked.map_or_else(|_| String::new(), |_| answer)
    }

    /// The value of a line of the metrics; 0 if there is none.
    pub fn metric(&self, name: &str) -> f64 {
        let answer = self.get("/metrics");
        let line = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.trim().parse().unwrap())
    }

    /// A token of `account` with `audience`, bound to a new pod of it on `node`.
    pub fn token_of(&self, account: (&str, &str), node: &str, audience: &str) -> String {
        self.bound_token(account, node, audience).1
    }

    /// The same with the name of the pod.
    pub fn bound_token(&self, account: (&str, &str), node: &str, audience: &str) -> (String, String) {
        bound_token(&self.api, account, node, audience)
    }

    /// The token of a tunnel on `node`.
    pub fn token(&self, node: &str) -> String {
        self.token_of(("adit-system", "ztunnel"), node, "istio-ca")
    }

    pub fn channel(&self) -> Channel {
        testbed::cryptography::choose();
        let tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.root)).domain_name("localhost");
        let endpoint = Endpoint::from_shared(format!("https://{}", self.grpc)).unwrap();
        let _inside = self.runtime.enter();
        endpoint.tls_config(tls).unwrap().connect_lazy()
    }

    /// TLS, and nothing after it.
    pub async fn connect(&self) -> TlsStream<tokio::net::TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.root.as_bytes()).unwrap()).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let stream = tokio::net::TcpStream::connect(self.grpc).await.unwrap();
        let name = "localhost".try_into().unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }

    /// A stream that answers nothing by itself.
    pub fn stream(&self, token: &str) -> Result<BareStream<'_>, Status> {
        let (requests, receiver) = mpsc::unbounded_channel();
        let sent = futures_util::stream::unfold(receiver, |mut receiver: mpsc::UnboundedReceiver<_>| async {
            Some((receiver.recv().await?, receiver))
        });
        let call = authorized(sent, token);
        let mut client = AggregatedDiscoveryServiceClient::new(self.channel());
        let call = async { timeout(LIMIT, client.delta_aggregated_resources(call)).await.unwrap() };
        let responses = self.runtime.block_on(call)?.into_inner();
        Ok(BareStream { runtime: &self.runtime, requests, responses })
    }

    /// The variables of a tunnel on `node` that calls this control plane.
    pub fn tunnel_config(&self, node: &str) -> ztunnel::config::Config {
        tunnel_config(self.grpc.port(), &self.root, &self.token(node), node)
    }
}

/// A control plane's access to `api`, with the chart's rights. Its token is bound to a pod, as a real
/// one's.
pub fn kubeconfig(api: &ApiServer) -> PathBuf {
    api.apply(rights());
    api.apply(TUNNEL);
    let own = unique("control");
    let spec = json!({"spec": {"serviceAccountName": "ztunnel-control"}});
    let uid = api.pod("adit-system", &own, "control", &spec);
    api.kubeconfig_of_pod("adit-system", "ztunnel-control", Some((&own, &uid)))
}

/// A token of `account` with `audience`, bound to a new pod of it on `node`, and the pod's name.
pub fn bound_token(
    api: &ApiServer,
    (namespace, account): (&str, &str),
    node: &str,
    audience: &str,
) -> (String, String) {
    let name = unique("bound");
    let spec = json!({"spec": {"serviceAccountName": account}});
    let uid = api.pod(namespace, &name, node, &spec);
    let request = json!({"spec": {"audiences": [audience],
        "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": name, "uid": uid}}});
    let request: TokenRequest = serde_json::from_value(request).unwrap();
    let accounts: Api<ServiceAccount> = Api::namespaced(api.client(), namespace);
    let made = api.block_on(accounts.create_token_request(account, &PostParams::default(), &request));
    (name, made.unwrap().status.unwrap().token)
}

/// The variables of a tunnel on `node` that calls a control plane at `port` of this machine. `root`:
/// its root in PEM, or the file with it.
pub fn tunnel_config(port: u16, root: &str, token: &str, node: &str) -> ztunnel::config::Config {
    let address = format!("https://localhost:{port}");
    let variables = [
        ("XDS_ADDRESS", &*address),
        ("CA_ADDRESS", &*address),
        ("XDS_ROOT_CA", root),
        ("CA_ROOT_CA", root),
        ("AUTH_TOKEN", token),
        ("NODE_NAME", node),
    ];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    ztunnel::config::Config::from_vars(variables).unwrap()
}

/// A call with a token.
pub fn authorized<T>(message: T, token: &str) -> Request<T> {
    let mut call = Request::new(message);
    let value: MetadataValue<_> = format!("Bearer {token}").parse().unwrap();
    call.metadata_mut().insert("authorization", value);
    call
}

/// A discovery stream without a tunnel.
pub struct BareStream<'a> {
    runtime: &'a Runtime,
    pub requests: mpsc::UnboundedSender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl BareStream<'_> {
    pub fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).unwrap();
    }

    /// Subscribes to everything of a kind.
    pub fn subscribe(&self, type_url: &str) {
        self.send(DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            ..DeltaDiscoveryRequest::default()
        });
    }

    pub fn acknowledge(&self, response: &DeltaDiscoveryResponse) {
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        });
    }

    /// The next response, which is not acknowledged.
    pub fn receive(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let message = async { timeout(LIMIT, self.responses.message()).await.expect("a response in time") };
        self.runtime.block_on(message).and_then(|message| message.ok_or_else(|| Status::cancelled("closed")))
    }

    /// Whether nothing comes for `time`.
    pub fn is_silent_for(&mut self, time: Duration) -> bool {
        self.runtime.block_on(async { timeout(time, self.responses.message()).await.is_err() })
    }

    /// Acknowledges responses up to the one that names `resource` as changed or removed.
    pub fn receive_about(&mut self, resource: &str) -> DeltaDiscoveryResponse {
        loop {
            let response = self.receive().unwrap();
            self.acknowledge(&response);
            let changed = response.resources.iter().map(|changed| &changed.name);
            if changed.chain(&response.removed_resources).any(|name| name == resource) {
                return response;
            }
        }
    }
}

/// What a kubelet says of a pod that is ready.
pub fn ready_at(address: &str) -> Value {
    json!({"phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}]})
}
