//! What a peer sees on 15008: statuses, policies, TLS.

mod bed;

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

use bed::{Bed, LIMIT, Pod, Tunnel, read_all, read_line};
use http::{Method, Request, StatusCode};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use ztunnel::{
    config::{Config, H2},
    hbone::client,
    identity::{Certificates, Identity},
};

/// A peer of the mesh that can be told to misbehave, with certificates of the bed's CA.
struct Probe {
    runtime: tokio::runtime::Runtime,
    certificates: Arc<Certificates>,
    h2: H2,
    /// Whether replies are expected to tell about the server.
    told: bool,
}

impl Probe {
    fn new(bed: &Bed) -> Self {
        let vars = HashMap::from([("DEVELOPMENT_CA_DIR".to_owned(), bed.ca_dir().display().to_string())]);
        let config = Config::from_vars(vars).expect("config");
        let certificates = Certificates::new(&config).expect("CA");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.spawn(Arc::clone(&certificates).run(CancellationToken::new()));
        Self { runtime, certificates, h2: config.h2, told: true }
    }

    /// Sends one request from `pod` as `who`: the answer's status and headers, or how it failed.
    fn ask(
        &self,
        pod: &Pod,
        who: &str,
        server: &Pod,
        method: Method,
        authority: &str,
    ) -> Result<StatusCode, String> {
        let local = tokio::task::LocalSet::new();
        let peer = server.at(15008);
        let expected = identity(&server.name);
        let asking = async {
            let credentials =
                self.certificates.get(&who.parse().expect("identity")).await.expect("certificate");
            let socket = dial(pod, peer);
            let tunnel = client::handshake(socket, peer, credentials.client(&[expected]), &self.h2).await;
            let tunnel = tunnel.map_err(|error| error.to_string())?;
            let driver = tokio::task::spawn_local(tunnel.driver);
            let mut requests = tunnel.requests.ready().await.map_err(|error| error.to_string())?;
            let request = Request::builder().method(method).uri(authority).body(()).expect("request");
            let (response, _send) =
                requests.send_request(request, false).map_err(|error| error.to_string())?;
            let response = response.await.map_err(|error| error.to_string())?;
            if response.status() == StatusCode::OK && self.told {
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
            driver.abort();
            Ok(response.status())
        };
        let limited = async { tokio::time::timeout(LIMIT, asking).await.expect("an answer in time") };
        self.runtime.block_on(local.run_until(limited))
    }

    fn connect(&self, pod: &Pod, who: &str, server: &Pod, authority: &str) -> Result<StatusCode, String> {
        self.ask(pod, who, server, Method::CONNECT, authority)
    }
}

fn identity(name: &str) -> Identity {
    format!("spiffe://cluster.local/ns/demo/sa/{name}").parse().expect("identity")
}

fn dial(pod: &Pod, peer: SocketAddr) -> TcpStream {
    let stream = pod.space.connect(peer);
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

/// A bed with a peer that nobody captures, and one served pod with an echo on 8080.
fn served(policies: &str) -> (Bed, Pod, Pod, Tunnel) {
    let mut bed = Bed::new();
    let (client, server) = (bed.plain("a", "client"), bed.enrolled("a", "server"));
    bed.policies.push_str(policies);
    bed.services.push_str(
        "- name: web\n  namespace: demo\n  hostname: web.demo.svc.cluster.local\n  vips: [\"/10.96.0.1\"]\n  \
         ports: {80: 8080, 81: 0}\n",
    );
    bed.add_to_last_workload(
        "  services:\n    demo/web.demo.svc.cluster.local:\n      80: 8080\n      81: 8080\n",
    );
    server.serve_double_echo(8080);
    let node = bed.node("a", &[&server]);
    (bed, client, server, node)
}

#[test]
#[ignore = "needs root: make test"]
fn connect_is_answered_by_what_it_asks_for() {
    let (bed, client, server, node) = served("");
    let probe = Probe::new(&bed);
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
    let (bed, client, server, node) = served(&format!("{allow}{deny}"));
    let probe = Probe::new(&bed);
    let authority = server.at(8080).to_string();
    let ask = |who: &str| {
        probe.connect(&client, &format!("spiffe://cluster.local/ns/demo/sa/{who}"), &server, &authority)
    };
    assert_eq!(ask("client"), Ok(StatusCode::OK));
    assert_eq!(ask("stranger"), Ok(StatusCode::UNAUTHORIZED));
    node.records(1, &["allow policies exist, but none allowed"]);
    assert_eq!(ask("evil"), Ok(StatusCode::UNAUTHORIZED));
    node.records(1, &["explicitly denied by: demo/deny"]);
    // Plaintext is nobody, so nobody allows it.
    assert_eq!(client.space.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    assert_eq!(node.records(2, &["none allowed"]).len(), 2);
}

#[test]
#[ignore = "needs root: make test"]
fn change_of_policy_cuts_what_it_forbids() {
    let mut bed = Bed::new();
    let (client, server) = (bed.enrolled("a", "client"), bed.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let (_a, b) = (bed.node("a", &[&client]), bed.node("b", &[&server]));
    let mut stream = client.space.connect(server.at(8080));
    read_line(&mut stream).expect("greeting");
    bed.policies.push_str(&policy("deny", "Deny", "client"));
    bed.publish();
    assert!(stream.read_exact(&mut [0]).is_err(), "the connection is cut");
    b.records(1, &["connection closed due to policy change"]);
    assert_eq!(client.space.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    bed.policies.clear();
    bed.publish();
    bed::wait_for("the policy to go", || {
        client.space.try_connect(server.at(8080)).and_then(|mut stream| read_line(&mut stream)).ok()
    });
}

#[test]
#[ignore = "needs root: make test"]
fn peers_without_the_right_certificate_get_nowhere() {
    let (bed, client, server, node) = served("");
    let probe = Probe::new(&bed);
    let authority = server.at(8080).to_string();
    // Another trust domain, by the same CA.
    let refused = probe.connect(&client, "spiffe://elsewhere.local/ns/demo/sa/client", &server, &authority);
    assert!(refused.is_err(), "{refused:?}");
    node.records(1, &["tls handshake error"]);
    // Plaintext: an alert at most.
    let mut plain = client.space.connect(server.at(15008));
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("write");
    let answer = read_all(&mut plain).unwrap_or_default();
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    node.records(2, &["tls handshake error"]);
    // Still serving.
    assert_eq!(probe.connect(&client, CLIENT, &server, &authority), Ok(StatusCode::OK));
}

/// A certificate from the bed's CA, or one of nobody's, made by openssl: the file with key and certificate.
fn foreign_certificate(bed: &Bed, name: &str, identity: &str, by_our_ca: bool) -> std::path::PathBuf {
    let (folder, ca) = (bed.dir.path(), bed.ca_dir());
    let (file, ca) = (folder.join(format!("{name}.pem")), ca.join("root.pem"));
    let (folder, out, ca) = (folder.display(), file.display(), ca.display());
    let signer = if by_our_ca { format!("-CA {ca} -CAkey {ca}") } else { "-signkey $1.key".to_owned() };
    bed::run(&format!(
        "set -- {folder}/{name}; openssl ecparam -name prime256v1 -genkey -noout -out $1.key; \
         openssl req -new -key $1.key -subj / -out $1.csr; echo subjectAltName=critical,URI:{identity} > $1.ext; \
         openssl x509 -req -in $1.csr {signer} -set_serial 7 -days 1 -extfile $1.ext -out $1.crt; \
         cat $1.key $1.crt > {out}"
    ));
    file
}

/// What openssl's client gets on 15008 with these options: the head of the first HTTP/2 frame, or what it says.
fn s_client(client: &Pod, server: &Pod, options: &[&str]) -> Result<[u8; 9], String> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let mut child = Command::new("nsenter")
        .arg(format!("--net=/run/netns/{}", client.space.name))
        .args(["openssl", "s_client", "-quiet", "-connect", &server.at(15008).to_string()])
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl");
    let mut input = child.stdin.take().expect("piped");
    // Who is refused is gone before.
    let _ = input.write_all(PREFACE);
    let mut head = [0; 9];
    let got = child.stdout.take().expect("piped").read_exact(&mut head);
    let _ = child.kill();
    let said = child.wait_with_output().expect("openssl").stderr;
    got.map(|()| head).map_err(|_| String::from_utf8_lossy(&said).into_owned())
}

#[test]
#[ignore = "needs root: make test"]
fn foreign_tls_clients_are_answered_by_what_they_offer() {
    const SETTINGS: u8 = 4;
    let (bed, client, server, node) = served("");
    let ours = foreign_certificate(&bed, "ours", CLIENT, true);
    let elsewhere =
        foreign_certificate(&bed, "elsewhere", "spiffe://elsewhere.local/ns/demo/sa/client", true);
    let nobody = foreign_certificate(&bed, "nobody", CLIENT, false);
    let with = |certificate: &std::path::Path, more: &[&str]| {
        let mut options = vec!["-cert", certificate.to_str().expect("path")];
        options.extend(more);
        s_client(&client, &server, &options)
    };
    for alpn in [&[][..], &["-alpn", "h2"]] {
        let head = with(&ours, alpn).unwrap_or_else(|said| panic!("{alpn:?}: {said}"));
        assert_eq!(head[3], SETTINGS, "{alpn:?}");
    }
    for (refused, why) in [
        (with(&ours, &["-alpn", "http/1.1"]), "no application protocol"),
        (with(&ours, &["-tls1_2"]), "protocol version"),
        (s_client(&client, &server, &["-alpn", "h2"]), "certificate required"),
        (with(&elsewhere, &["-alpn", "h2"]), "alert"),
        (with(&nobody, &["-alpn", "h2"]), "alert"),
    ] {
        let said = refused.expect_err(why);
        assert!(said.contains(why), "{why}: {said}");
    }
    assert_eq!(node.records(5, &["tls handshake error", "\"reason\":\"tls\""]).len(), 5);
}

/// What openssl's client gets from a tunnel with this variable, by these options.
fn foreign_client(variable: (&str, &str), options: &[&str]) -> Result<[u8; 9], String> {
    let mut bed = Bed::new();
    let (client, server) = (bed.plain("a", "client"), bed.enrolled("a", "server"));
    let mut node = Tunnel::start_with(&bed, "a", bed.space("a"), &[variable]);
    assert_eq!((node.agent().add(&server), node.agent().snapshot()), (String::new(), String::new()));
    node.wait_ready();
    let certificate = foreign_certificate(&bed, "ours", CLIENT, true).display().to_string();
    let options: Vec<&str> = ["-cert", &certificate, "-alpn", "h2"].iter().chain(options).copied().collect();
    s_client(&client, &server, &options)
}

#[test]
#[ignore = "needs root: make test"]
fn tls_1_2_is_spoken_where_it_is_asked_for() {
    let asked = ("TLS12_ENABLED", "true");
    for version in ["-tls1_2", "-tls1_3"] {
        foreign_client(asked, &[version]).unwrap_or_else(|said| panic!("{version}: {said}"));
    }
    let said = foreign_client(asked, &["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"]).unwrap_err();
    assert!(said.contains("handshake failure"), "{said}");
}

/// This openssl knows nothing that holds against a quantum computer; our tunnels prefer it anyway.
#[test]
#[ignore = "needs root: make test"]
fn only_post_quantum_key_exchange_where_that_is_asked_for() {
    let said = foreign_client(("COMPLIANCE_POLICY", "pqc"), &["-groups", "X25519:P-256"]).unwrap_err();
    assert!(said.contains("handshake failure"), "{said}");
    let (_bed, client, server, _nodes) = pooled(&[("COMPLIANCE_POLICY", "pqc")]);
    drop(greeted(&client, &server));
}

#[test]
#[ignore = "needs root: make test"]
fn an_application_whose_node_is_of_another_trust_domain_sees_a_reset() {
    let mut bed = Bed::new();
    let (client, server) = (bed.enrolled("a", "client"), bed.enrolled("b", "server"));
    bed.add_to_last_workload("  trustDomain: cluster.local\n");
    server.serve_double_echo(8080);
    let mut a = Tunnel::start_with(&bed, "a", bed.space("a"), &[("TRUST_DOMAIN", "elsewhere.local")]);
    assert_eq!((a.agent().add(&client), a.agent().snapshot()), (String::new(), String::new()));
    a.wait_ready();
    let b = bed.node("b", &[&server]);
    assert_eq!(client.space.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    b.records(1, &["tls handshake error", "elsewhere.local"]);
}

#[test]
#[ignore = "needs root: make test"]
fn where_baggage_is_switched_off_replies_tell_nothing() {
    let mut bed = Bed::new();
    let (client, server) = (bed.plain("a", "client"), bed.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let mut node = Tunnel::start_with(&bed, "a", bed.space("a"), &[("ENABLE_RESPONSE_BAGGAGE", "false")]);
    assert_eq!((node.agent().add(&server), node.agent().snapshot()), (String::new(), String::new()));
    node.wait_ready();
    let mut probe = Probe::new(&bed);
    probe.told = false;
    assert_eq!(probe.connect(&client, CLIENT, &server, &server.at(8080).to_string()), Ok(StatusCode::OK));
}

#[test]
#[ignore = "needs root: make test"]
fn server_that_is_somebody_else_is_refused_and_named() {
    let mut bed = Bed::new();
    let (client, server) = (bed.enrolled("a", "client"), bed.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let a = bed.node("a", &[&client]);
    // The node of the server serves it under another name, so with another certificate.
    let mut b = bed.node_without_pods("b");
    assert_eq!(b.agent().add_as("server", "impostor", &[server.space.fd()]), "");
    assert_eq!(b.agent().snapshot(), "");
    b.wait_ready();
    assert_eq!(client.space.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    a.records(
        1,
        &[
            "spiffe://cluster.local/ns/demo/sa/impostor",
            "spiffe://cluster.local/ns/demo/sa/server",
            "tls handshake",
        ],
    );
}

/// A client on node a whose tunnel has these variables, and a server on node b.
fn pooled(variables: &[(&str, &str)]) -> (Bed, Pod, Pod, [Tunnel; 2]) {
    let mut bed = Bed::new();
    let (client, server) = (bed.enrolled("a", "client"), bed.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let mut a = Tunnel::start_with(&bed, "a", bed.space("a"), variables);
    assert_eq!((a.agent().add(&client), a.agent().snapshot()), (String::new(), String::new()));
    a.wait_ready();
    let b = bed.node("b", &[&server]);
    (bed, client, server, [a, b])
}

fn greeted(client: &Pod, server: &Pod) -> std::net::TcpStream {
    let mut stream = client.space.connect(server.at(8080));
    read_line(&mut stream).expect("greeting");
    stream
}

/// Tunnels that are open from the client's netns.
fn tunnels(client: &Pod) -> usize {
    let open = client.space.output("ss", &["-Htn", "state", "established", "dport", "=", ":15008"]);
    open.lines().count()
}

/// One for each worker, and there are two.
#[test]
#[ignore = "needs root: make test"]
fn connections_share_a_tunnel_and_the_first_ones_its_handshake() {
    let (_bed, client, server, _nodes) = pooled(&[]);
    let streams: Vec<_> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..40).map(|_| scope.spawn(|| greeted(&client, &server))).collect();
        all.into_iter().map(|one| one.join().expect("greeted")).collect()
    });
    assert!((1..=2).contains(&tunnels(&client)), "{} tunnels", tunnels(&client));
    drop(streams);
}

#[test]
#[ignore = "needs root: make test"]
fn a_full_tunnel_is_joined_by_another_one() {
    let (_bed, client, server, _nodes) = pooled(&[("POOL_MAX_STREAMS_PER_CONNECTION", "4")]);
    let streams: Vec<_> = (0..20).map(|_| greeted(&client, &server)).collect();
    assert!((5..=6).contains(&tunnels(&client)), "{} tunnels", tunnels(&client));
    drop(streams);
}

#[test]
#[ignore = "needs root: make test"]
fn an_unused_tunnel_is_closed_and_one_in_use_is_kept() {
    let (_bed, client, server, _nodes) =
        pooled(&[("POOL_UNUSED_RELEASE_TIMEOUT", "500ms"), ("POOL_MAX_STREAMS_PER_CONNECTION", "1")]);
    let mut long = greeted(&client, &server);
    let short: Vec<_> = (0..3).map(|_| greeted(&client, &server)).collect();
    assert_eq!(tunnels(&client), 4);
    drop(short);
    bed::wait_for("the unused ones to be closed", || (tunnels(&client) == 1).then_some(()));
    long.write_all(b"on").expect("write");
    long.read_exact(&mut [0; 4]).expect("echo");
    drop(long);
    bed::wait_for("the last one to be closed", || (tunnels(&client) == 0).then_some(()));
    // And a new one is opened when it is needed.
    drop(greeted(&client, &server));
}

/// Twelve streams that nobody reads fill their windows, 4 MiB each: three times what a tunnel's window is in Istio's.
#[test]
#[ignore = "needs root: make test"]
fn streams_that_nobody_reads_do_not_touch_another_one_of_their_tunnel() {
    let (_bed, client, server, _nodes) = pooled(&[("ZTUNNEL_WORKER_THREADS", "1")]);
    let sent = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&sent);
    server.serve(8081, move |mut stream, _| {
        while stream.write_all(&[0; 1 << 14]).is_ok() {
            counter.fetch_add(1 << 14, Ordering::Relaxed);
        }
    });
    let slow: Vec<_> = (0..12).map(|_| client.space.connect(server.at(8081))).collect();
    let (mut before, mut since) = (0, Instant::now());
    bed::wait_for("the unread streams to stand still", || {
        let now = sent.load(Ordering::Relaxed);
        if now != before {
            (before, since) = (now, Instant::now());
        }
        (now >= 48 << 20 && since.elapsed() > Duration::from_millis(300)).then_some(())
    });
    let mut quick = greeted(&client, &server);
    assert_eq!(tunnels(&client), 1);
    let mut writer = quick.try_clone().expect("clone");
    let writing = std::thread::spawn(move || {
        writer.write_all(&vec![7; 16 << 20]).expect("write");
        writer.shutdown(std::net::Shutdown::Write).expect("shutdown");
    });
    assert_eq!(read_all(&mut quick).expect("echo").len(), 32 << 20);
    writing.join().expect("written");
    assert_eq!(sent.load(Ordering::Relaxed), before, "the others stood still meanwhile");
    drop(slow);
}
