//! What a peer sees on 15008: statuses, policies, TLS.

mod memory;
mod pool;
mod tls;
mod work;

use std::{
    collections::HashMap,
    io::{ErrorKind, Read, Write},
    net::SocketAddr,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use testbed::{
    command::run,
    mesh_pod::{MeshPod, read_all, read_line},
    tunnel_mesh::{TunnelMesh, TunnelNode},
    wait::{LIMIT, wait_for},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use ztunnel::{
    config::{Config, H2Config},
    hbone::client,
    identity::{Certificates, Identity},
    memory::{MemoryBudget, MemoryMetrics, SendData},
};

/// A peer of the mesh that can misbehave, with certificates of the mesh's CA.
struct Probe {
    runtime: tokio::runtime::Runtime,
    certificates: Arc<Certificates>,
    h2: H2Config,
    budget: Arc<MemoryBudget>,
    /// Whether replies must carry the baggage of the server.
    expects_baggage: bool,
}

impl Probe {
    fn new(mesh: &TunnelMesh) -> Self {
        Self::of(mesh, &[])
    }

    /// With these variables as a tunnel would have them.
    fn of(mesh: &TunnelMesh, variables: &[(&str, &str)]) -> Self {
        let ca_dir = mesh.ca_dir().display().to_string();
        let all = [&[("DEVELOPMENT_CA_DIR", &*ca_dir)], variables].concat();
        let vars: HashMap<String, String> =
            all.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let config = Config::from_vars(vars).expect("config");
        let certificates = Certificates::new(&config, Arc::default()).expect("CA");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.spawn(Arc::clone(&certificates).run(CancellationToken::new()));
        let budget = MemoryBudget::new(1 << 30, MemoryMetrics::default());
        Self { runtime, certificates, h2: config.h2, budget, expects_baggage: true }
    }

    /// Sends one request from `pod` as `who`: the answer's status and headers, or how it failed.
    fn ask(
        &self,
        pod: &MeshPod,
        who: &str,
        server: &MeshPod,
        method: Method,
        authority: &str,
    ) -> Result<StatusCode, String> {
        let asked = self.over_tunnel(pod, who, server, async |requests| {
            let mut requests = requests.ready().await.map_err(|error| error.to_string())?;
            let request = Request::builder().method(method).uri(authority).body(()).expect("request");
            let (response, _send) =
                requests.send_request(request, false).map_err(|error| error.to_string())?;
            let response = response.await.map_err(|error| error.to_string())?;
            if response.status() == StatusCode::OK && self.expects_baggage {
                let baggage = response.headers()["baggage"].to_str().expect("text");
                assert_eq!(
                    baggage,
                    format!(
                        "k8s.cluster.name=Kubernetes,k8s.namespace.name=demo,k8s.deployment.name={name},\
                         service.name={name},service.version=v1",
                        name = server.name
                    )
                );
            } else {
                let refused = response.status() != StatusCode::OK;
                assert_eq!(response.body().is_end_stream(), refused, "{response:?}");
                assert!(response.headers().is_empty(), "{response:?}");
            }
            Ok(response.status())
        });
        asked?
    }

    /// Runs `talk` over a tunnel from `pod` as `who`, or says why there is none.
    fn over_tunnel<T>(
        &self,
        pod: &MeshPod,
        who: &str,
        server: &MeshPod,
        talk: impl AsyncFnOnce(SendRequest<SendData>) -> T,
    ) -> Result<T, String> {
        let dial = || dial(pod, server.at(15008));
        self.over_tunnels(who, server, 1, dial, async |tunnels| {
            talk(tunnels.into_iter().next().expect("one")).await
        })
    }

    /// The same over `count` tunnels, through the sockets that `dial` makes.
    fn over_tunnels<T, S: AsyncRead + AsyncWrite + Unpin + 'static>(
        &self,
        who: &str,
        server: &MeshPod,
        count: usize,
        dial: impl Fn() -> S,
        talk: impl AsyncFnOnce(Vec<SendRequest<SendData>>) -> T,
    ) -> Result<T, String> {
        let local = tokio::task::LocalSet::new();
        let (peer, expected) = (server.at(15008), identity(&server.name));
        let talking = async {
            let who: Identity = who.parse().expect("identity");
            let _lease =
                self.certificates.lease(Arc::clone(&who.namespace), Arc::clone(&who.service_account));
            let credentials = self.certificates.get(&who).await.expect("certificate");
            let (mut drivers, mut tunnels) = (JoinSet::new(), Vec::new());
            for _ in 0..count {
                let tls = credentials.client(std::slice::from_ref(&expected));
                let tunnel = client::handshake(dial(), peer, tls, &self.h2, &self.budget).await;
                let tunnel = tunnel.map_err(|error| error.to_string())?;
                drivers.spawn_local(tunnel.driver);
                tunnels.push(tunnel.requests);
            }
            Ok(talk(tunnels).await)
        };
        let limited = async { tokio::time::timeout(4 * LIMIT, talking).await.expect("done in time") };
        self.runtime.block_on(local.run_until(limited))
    }

    fn connect(
        &self,
        pod: &MeshPod,
        who: &str,
        server: &MeshPod,
        authority: &str,
    ) -> Result<StatusCode, String> {
        self.ask(pod, who, server, Method::CONNECT, authority)
    }
}

fn identity(name: &str) -> Identity {
    format!("spiffe://cluster.local/ns/demo/sa/{name}").parse().expect("identity")
}

fn dial(pod: &MeshPod, peer: SocketAddr) -> TcpStream {
    let stream = pod.netns.connect(peer);
    stream.set_nonblocking(true).expect("non-blocking");
    TcpStream::from_std(stream).expect("runtime")
}

/// For namespace `demo`, by service account.
fn policy(name: &str, action: &str, accounts: &str) -> String {
    let principals: Vec<_> =
        accounts.split(", ").map(|name| format!("cluster.local/ns/demo/sa/{name}")).collect();
    format!(
        "- name: {name}\n  namespace: demo\n  scope: Namespace\n  action: {action}\n  \
         rules: [[[{{principals: [{}]}}]]]\n",
        principals.join(", ")
    )
}

const CLIENT: &str = "spiffe://cluster.local/ns/demo/sa/client";

/// A mesh with a peer that is not captured, and one served pod with an echo on 8080.
fn served(policies: &str) -> (TunnelMesh, MeshPod, MeshPod, TunnelNode) {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.plain("a", "client"), mesh.enrolled("a", "server"));
    mesh.policies.push_str(policies);
    mesh.services.push_str(
        "- name: web\n  namespace: demo\n  hostname: web.demo.svc.cluster.local\n  vips: [\"/10.96.0.1\"]\n  \
         ports: {80: 8080, 81: 0}\n",
    );
    mesh.add_to_last_workload(
        "  services:\n    demo/web.demo.svc.cluster.local:\n      80: 8080\n      81: 8080\n",
    );
    server.serve_double_echo(8080);
    let node = mesh.node("a", &[&server]);
    (mesh, client, server, node)
}

/// A client on node a whose tunnel has these variables, and a server on node b.
fn pooled(variables: &[(&str, &str)]) -> (TunnelMesh, MeshPod, MeshPod, [TunnelNode; 2]) {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let mut a = TunnelNode::start_with(&mesh, "a", mesh.netns("a"), variables);
    assert_eq!((a.agent().add(&client), a.agent().snapshot()), (String::new(), String::new()));
    a.wait_ready();
    let b = mesh.node("b", &[&server]);
    (mesh, client, server, [a, b])
}

fn greeted(client: &MeshPod, server: &MeshPod) -> std::net::TcpStream {
    let mut stream = client.netns.connect(server.at(8080));
    read_line(&mut stream).expect("greeting");
    stream
}

#[test]
#[ignore = "needs root: make test"]
fn connect_is_answered_by_what_it_asks_for() {
    let (mesh, client, server, node) = served("");
    let probe = Probe::new(&mesh);
    let ip = server.ip;
    for (authority, status) in [
        (format!("{ip}:8080"), StatusCode::OK),
        ("web.demo.svc.cluster.local:80".to_owned(), StatusCode::OK),
        // A port that the service names, and each workload maps by itself.
        ("web.demo.svc.cluster.local:81".to_owned(), StatusCode::OK),
        ("10.77.0.99:8080".to_owned(), StatusCode::BAD_REQUEST),
        (format!("{ip}:9"), StatusCode::SERVICE_UNAVAILABLE),
        (format!("{ip}:15001"), StatusCode::SERVICE_UNAVAILABLE),
        (format!("{ip}:15006"), StatusCode::SERVICE_UNAVAILABLE),
        (format!("{ip}:15008"), StatusCode::SERVICE_UNAVAILABLE),
        ("unknown.demo.svc.cluster.local:80".to_owned(), StatusCode::SERVICE_UNAVAILABLE),
        ("web.demo.svc.cluster.local:82".to_owned(), StatusCode::SERVICE_UNAVAILABLE),
        (format!("{ip}"), StatusCode::BAD_REQUEST),
    ] {
        assert_eq!(probe.connect(&client, CLIENT, &server, &authority), Ok(status), "{authority}");
    }
    let get = probe.ask(&client, CLIENT, &server, Method::GET, &format!("https://{ip}:8080/"));
    assert_eq!(get, Ok(StatusCode::BAD_REQUEST));
    for text in [
        "ip mismatch: 10.77.0.2 != 10.77.0.99",
        "attempted recursive call to ourselves",
        "expected method CONNECT, got GET",
        "no valid authority pseudo header",
        "no service or workload for hostname",
        "cannot resolve port",
        "connection failed: Connection refused",
    ] {
        node.records(1, &[text]);
    }
}

#[test]
#[ignore = "needs root: make test"]
fn policies_decide_by_identity() {
    let allow = policy("allow", "Allow", "client, evil");
    let deny = policy("deny", "Deny", "evil");
    let (mesh, client, server, node) = served(&format!("{allow}{deny}"));
    let probe = Probe::new(&mesh);
    let authority = server.at(8080).to_string();
    let ask = |who: &str| {
        probe.connect(&client, &format!("spiffe://cluster.local/ns/demo/sa/{who}"), &server, &authority)
    };
    assert_eq!(ask("client"), Ok(StatusCode::OK));
    assert_eq!(ask("stranger"), Ok(StatusCode::UNAUTHORIZED));
    node.records(1, &["allow policies exist, but none allowed"]);
    assert_eq!(ask("evil"), Ok(StatusCode::UNAUTHORIZED));
    node.records(1, &["explicitly denied by: demo/deny"]);
    // Plaintext has no identity, so no policy allows it.
    assert_eq!(client.netns.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    assert_eq!(node.records(2, &["none allowed"]).len(), 2);
}

#[test]
#[ignore = "needs root: make test"]
fn change_of_policy_cuts_what_it_forbids() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let (_a, b) = (mesh.node("a", &[&client]), mesh.node("b", &[&server]));
    let mut stream = client.netns.connect(server.at(8080));
    read_line(&mut stream).expect("greeting");
    mesh.policies.push_str(&policy("deny", "Deny", "client"));
    mesh.publish();
    assert!(stream.read_exact(&mut [0]).is_err(), "the connection is cut");
    b.records(1, &["connection closed due to policy change"]);
    assert_eq!(client.netns.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    mesh.policies.clear();
    mesh.publish();
    wait_for("the policy to go", || {
        client.netns.try_connect(server.at(8080)).and_then(|mut stream| read_line(&mut stream)).ok()
    });
}

#[test]
#[ignore = "needs root: make test"]
fn where_baggage_is_switched_off_replies_tell_nothing() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.plain("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let mut node =
        TunnelNode::start_with(&mesh, "a", mesh.netns("a"), &[("ENABLE_RESPONSE_BAGGAGE", "false")]);
    assert_eq!((node.agent().add(&server), node.agent().snapshot()), (String::new(), String::new()));
    node.wait_ready();
    let mut probe = Probe::new(&mesh);
    probe.expects_baggage = false;
    assert_eq!(probe.connect(&client, CLIENT, &server, &server.at(8080).to_string()), Ok(StatusCode::OK));
}
