//! What peers and pods can make the tunnel do has limits: streams that are reset, clients that
//! leave, handshakes that never end, connections without number.

use h2::{Reason, RecvStream, SendStream, client::SendRequest};
use testbed::wait::wait_at_most;

use super::*;

/// What is sent to `port` of `pod` is lost, as by a full backlog or by a NetworkPolicy.
fn loses(pod: &MeshPod, port: u16) {
    pod.netns.run(&format!(
        "nft add table inet hole; \
         nft add chain inet hole in {{ type filter hook input priority 0 \\; }}; \
         nft add rule inet hole in tcp dport {port} drop"
    ));
}

/// Dials of the tunnel that wait for an answer of the application.
fn dials(pod: &MeshPod, port: u16) -> usize {
    let filter = format!(":{port}");
    pod.netns.output("ss", &["-Htn", "state", "syn-sent", "dport", "=", &filter]).lines().count()
}

/// The number of samples whose line begins with `name` and contains all of `parts`.
fn samples(node: &TunnelNode, name: &str, parts: &[&str]) -> usize {
    let metrics = node.metrics();
    let has_all = |line: &&str| line.starts_with(name) && parts.iter().all(|part| line.contains(part));
    metrics.lines().filter(has_all).count()
}

fn failures(node: &TunnelNode, reason: &str) -> u64 {
    let reason = format!("reason=\"{reason}\"");
    node.metric("ztunnel_connection_failures_total", &[&reason]).unwrap_or(0)
}

/// A stream to a server that sends everything back twice.
struct EchoStream {
    send: SendStream<SendData>,
    recv: RecvStream,
}

impl EchoStream {
    async fn open(requests: &SendRequest<SendData>, to: SocketAddr) -> Self {
        let mut requests = requests.clone().ready().await.expect("a place");
        let (response, send) = requests.send_request(connect_to(to), false).expect("sent");
        let response = response.await.expect("an answer");
        assert_eq!(response.status(), StatusCode::OK);
        let mut stream = Self { send, recv: response.into_body() };
        let greeting = stream.receive_until(|data| data.ends_with(b"\n")).await;
        assert!(!greeting.is_empty());
        stream
    }

    async fn exchange(&mut self) {
        self.send.send_data(Bytes::from_static(b"ab").into(), false).expect("sent");
        assert_eq!(self.receive_until(|data| data.len() == 4).await, b"abab");
    }

    async fn receive_until(&mut self, done: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut all = Vec::new();
        while !done(&all) {
            let data = self.recv.data().await.expect("more").expect("data");
            self.recv.flow_control().release_capacity(data.len()).expect("released");
            all.extend(data);
        }
        all
    }
}

fn connect_to(to: SocketAddr) -> Request<()> {
    Request::builder().method(Method::CONNECT).uri(to.to_string()).body(()).expect("request")
}

/// The other end of `pool::a_tunnel_takes_no_new_streams_after_its_certificates_…`, for clients that
/// do not end their tunnels by themselves.
#[test]
#[ignore = "needs root: make test"]
fn a_server_takes_no_new_streams_after_its_clients_certificate_and_keeps_those_it_has() {
    let (mesh, client, server, _node) = served("");
    let probe = Probe::of(&mesh, &[("SECRET_TTL", "10s")]);
    probe
        .over_tunnel(&client, CLIENT, &server, async |requests| {
            let mut open = EchoStream::open(&requests, server.at(8080)).await;
            // A new stream every moment: what ends the tunnel for them is GOAWAY.
            let mut pause = tokio::time::interval(Duration::from_millis(50));
            let refused = loop {
                pause.tick().await;
                open.exchange().await;
                let mut place = match requests.clone().ready().await {
                    Ok(place) => place,
                    Err(error) => break error,
                };
                let (response, _send) = place.send_request(connect_to(server.at(8080)), false).expect("sent");
                if let Err(error) = response.await {
                    break error;
                }
            };
            assert!(refused.is_go_away(), "{refused}");
            open.exchange().await;
        })
        .expect("a tunnel");
}

#[test]
#[ignore = "needs root: make test"]
fn a_stream_that_is_reset_stops_its_work_and_the_others_go_on() {
    const FLOOD: usize = 300;
    let (mesh, client, server, _node) = served("");
    loses(&server, 8081);
    let probe = Probe::new(&mesh);
    let most = probe
        .over_tunnel(&client, CLIENT, &server, async |requests| {
            let mut honest = EchoStream::open(&requests, server.at(8080)).await;
            let mut most = 0;
            for n in 1..=FLOOD {
                let mut place = requests.clone().ready().await.expect("a place");
                let (_response, mut send) =
                    place.send_request(connect_to(server.at(8081)), false).expect("sent");
                // What comes back was sent after the request: the tunnel has accepted that by now.
                honest.exchange().await;
                send.send_reset(Reason::CANCEL);
                if n % 100 == 0 {
                    most = most.max(dials(&server, 8081));
                }
            }
            honest.exchange().await;
            most
        })
        .expect("a tunnel");
    assert!(most < 20, "{most} dials under way after {FLOOD} streams that were reset");
}

#[test]
#[ignore = "needs root: make test"]
fn labels_by_a_strangers_word_do_not_grow() {
    let (mesh, client, server, node) = served("");
    let probe = Probe::new(&mesh);
    probe
        .over_tunnel(&client, CLIENT, &server, async |requests| {
            for n in 0..200 {
                let mut request = connect_to(server.at(9));
                let headers = request.headers_mut();
                headers.insert("x-forwarded-network", "z".parse().expect("value"));
                headers.insert("baggage", format!("service.name=stranger-{n}").parse().expect("value"));
                let mut place = requests.clone().ready().await.expect("a place");
                let (response, _send) = place.send_request(request, false).expect("sent");
                assert_eq!(response.await.expect("an answer").status(), StatusCode::SERVICE_UNAVAILABLE);
            }
        })
        .expect("a tunnel");
    let sets = samples(&node, "istio_tcp_connections_failed_total", &["reporter=\"destination\""]);
    assert_eq!(sets, 1, "label sets of one client");
    assert_eq!(samples(&node, "istio", &["stranger"]), 0);
}

/// Requests of one peer that are refused, each with a word of 20,000 characters.
#[test]
#[ignore = "needs root: make test"]
fn a_peers_words_do_not_fill_the_log_and_others_are_still_heard() {
    const REQUESTS: usize = 2000;
    /// What one peer may have written of itself at once, and what follows while the test runs.
    const LINES: usize = 500;
    const LONGEST: usize = 4096;
    let (mesh, client, server, node) = served("");
    let probe = Probe::new(&mesh);
    let word = Method::from_bytes("X".repeat(20_000).as_bytes()).expect("a method");
    probe
        .over_tunnel(&client, CLIENT, &server, async |requests| {
            for _ in 0..REQUESTS {
                let request =
                    Request::builder().method(&word).uri(format!("https://{}/", server.ip)).body(());
                let mut place = requests.clone().ready().await.expect("a place");
                let (response, _send) = place.send_request(request.expect("request"), true).expect("sent");
                assert_eq!(response.await.expect("an answer").status(), StatusCode::BAD_REQUEST);
            }
        })
        .expect("a tunnel");
    node.wait_metric("ztunnel_connection_failures_total", &["reason=\"method\""], REQUESTS as u64);
    mesh.router.connect(server.at(15008)).write_all(b"GET / HTTP/1.0\r\n\r\n").expect("write");
    node.records(1, &["169.254.1.1", "tls handshake error"]);
    let log = node.log();
    let of_peer = log.lines().filter(|line| line.contains("XXXX"));
    let (count, longest) = (of_peer.clone().count(), of_peer.map(str::len).max());
    assert!(count > 0 && count <= LINES, "{count} lines by one peer");
    assert!(longest.is_some_and(|length| length <= LONGEST), "{longest:?}");
    for line in log.lines() {
        serde_json::from_str::<serde_json::Value>(line).expect("JSON");
    }
}

/// Two streams whose destinations do not answer: one client resets, one closes.
#[test]
#[ignore = "needs root: make test"]
fn a_client_that_left_ends_its_attempt_at_both_ends() {
    let (_mesh, client, server, [a, _b]) = pooled(&[]);
    loses(&server, 8081);
    for (reset, limit) in [(true, Duration::from_secs(3)), (false, Duration::from_secs(6))] {
        let stream = client.netns.connect(server.at(8081));
        wait_for("the dial at the other end", || dials(&server, 8081) == 1);
        if reset {
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger");
        }
        drop(stream);
        wait_at_most(limit, "the dial to be given up", || dials(&server, 8081) == 0);
    }
    wait_for("both to be counted", || failures(&a, "client_left") == 2);
}

#[test]
#[ignore = "needs root: make test"]
fn a_plaintext_client_that_left_ends_its_attempt() {
    let (_mesh, client, server, node) = served("");
    loses(&server, 8081);
    let stream = client.netns.connect(server.at(8081));
    wait_for("the dial", || dials(&server, 8081) == 1);
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger");
    drop(stream);
    wait_at_most(Duration::from_secs(3), "the dial to be given up", || dials(&server, 8081) == 0);
    wait_for("it to be counted", || failures(&node, "client_left") == 1);
}

/// A client that has said everything and closed its half waits for the answer.
#[test]
#[ignore = "needs root: make test"]
fn a_client_that_closed_its_half_still_gets_its_answer() {
    let (_mesh, client, server, _nodes) = pooled(&[]);
    server.serve(8082, |mut stream, _| {
        let heard = read_all(&mut stream).unwrap_or_default();
        let _ = stream.write_all(&heard);
    });
    for _ in 0..20 {
        let mut stream = client.netns.connect(server.at(8082));
        stream.write_all(b"all").expect("write");
        stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
        assert_eq!(read_all(&mut stream).expect("the answer"), b"all");
    }
}

#[test]
#[ignore = "needs root: make test"]
fn a_connect_that_is_not_answered_ends_at_its_limit() {
    let (_mesh, client, server, [a, _b]) = pooled(&[("CONNECT_ANSWER_LIMIT", "1s")]);
    loses(&server, 8081);
    let begun = Instant::now();
    assert_eq!(client.netns.refusal(server.at(8081)), ErrorKind::ConnectionReset);
    assert!(begun.elapsed() < Duration::from_secs(8), "after {:?}", begun.elapsed());
    wait_for("it to be counted", || failures(&a, "no_answer") == 1);
    // The peer was told, and stops.
    wait_at_most(Duration::from_secs(3), "the dial to be given up", || dials(&server, 8081) == 0);
}

#[test]
#[ignore = "needs root: make test"]
fn handshakes_that_never_end_keep_nobody_out() {
    const FLOOD: usize = 1000;
    let (mesh, client, server, node) = served("");
    let stranger = &mesh.router;
    // They say nothing; each could keep the tunnel busy for ten seconds.
    let silent: Vec<_> = (0..FLOOD).filter_map(|_| stranger.try_connect(server.at(15008)).ok()).collect();
    let open = || {
        let found = stranger.output("ss", &["-Htn", "state", "established", "dport", "=", ":15008"]);
        found.lines().count()
    };
    wait_at_most(Duration::from_secs(5), "the tunnel to refuse most of them", || open() <= 700);
    let probe = Probe::new(&mesh);
    assert_eq!(probe.connect(&client, CLIENT, &server, &server.at(8080).to_string()), Ok(StatusCode::OK));
    assert!(open() > 0, "some are still under way");
    wait_for("all to be counted", || failures(&node, "too_many_handshakes") >= 300);
    drop(silent);
}

/// How many descriptors the tunnel may have in these tests, beside those in reserve.
const DESCRIPTORS: u64 = 300;

#[test]
#[ignore = "needs root: make test"]
fn a_pod_with_many_connections_leaves_room_for_its_neighbours() {
    let mut mesh = TunnelMesh::new();
    let (greedy, modest) = (mesh.enrolled("a", "greedy"), mesh.enrolled("a", "modest"));
    let outside = mesh.plain("b", "outside");
    outside.serve(8080, |mut stream, _| {
        let _ = stream.write_all(b"\n");
        let _ = stream.read(&mut [0]);
    });
    let (_, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).expect("limit");
    let reserve = (hard - DESCRIPTORS).to_string();
    let a = mesh.node_with("a", &[&greedy, &modest], &[("RESERVED_DESCRIPTORS", &reserve)]);
    let open = |pod: &MeshPod, count: usize| -> Vec<_> {
        let greeted = |_| {
            let mut stream = pod.netns.try_connect(outside.at(8080)).ok()?;
            read_line(&mut stream).ok().map(|_| stream)
        };
        (0..count).filter_map(greeted).collect()
    };
    // Two descriptors for each connection, and half of all at most.
    let many = open(&greedy, 200);
    assert!((50..=75).contains(&many.len()), "{} connections of the greedy pod", many.len());
    let refused = 200 - many.len() as u64;
    wait_for("the others to be counted", || failures(&a, "too_many_connections") == refused);
    let few = open(&modest, 20);
    assert_eq!(few.len(), 20, "of its neighbour");
    drop(many);
    wait_for("room again", || !open(&greedy, 1).is_empty());
}

fn two_endpoints(mesh: &mut TunnelMesh, of: impl Fn(&mut TunnelMesh, &str) -> MeshPod) -> [MeshPod; 2] {
    mesh.services.push_str(
        "- name: web\n  namespace: demo\n  hostname: web.demo.svc.cluster.local\n  vips: [\"/10.96.0.1\"]\n  \
         ports: {80: 8080}\n",
    );
    ["web-0", "web-1"].map(|name| {
        let pod = of(mesh, name);
        mesh.add_to_last_workload("  services:\n    demo/web.demo.svc.cluster.local: {}\n");
        pod
    })
}

/// One of the two does not listen.
#[test]
#[ignore = "needs root: make test"]
fn a_refused_connection_is_tried_at_another_endpoint() {
    for meshed in [true, false] {
        let mut mesh = TunnelMesh::new();
        let client = mesh.enrolled("a", "client");
        let [broken, sound] =
            two_endpoints(
                &mut mesh,
                |mesh, name| {
                    if meshed { mesh.enrolled("b", name) } else { mesh.plain("b", name) }
                },
            );
        sound.serve_double_echo(8080);
        let a = mesh.node("a", &[&client]);
        let served: &[_] = if meshed { &[&broken, &sound] } else { &[] };
        let _b = mesh.node("b", served);
        for n in 0..30 {
            let mut stream = client.netns.connect(([10, 96, 0, 1], 80));
            let greeting = read_line(&mut stream);
            assert!(greeting.is_ok(), "connection {n}, meshed: {meshed}: {greeting:?}");
        }
        let retried = a.metric("ztunnel_connect_retries_total", &["reason"]).unwrap_or(0);
        // What failed is avoided for a moment: not half of all.
        assert!((1..10).contains(&retried), "{retried} of 30 were tried again, meshed: {meshed}");
        let records = a.records(30, &["\"direction\":\"outbound\""]);
        assert!(records.iter().all(|record| record["dst.workload"] == "web-1"), "{records:?}");
    }
}

/// Both refuse: each is tried once, and the client hears of it.
#[test]
#[ignore = "needs root: make test"]
fn a_connection_that_all_endpoints_refuse_is_refused() {
    let mut mesh = TunnelMesh::new();
    let client = mesh.enrolled("a", "client");
    let pods = two_endpoints(&mut mesh, |mesh, name| mesh.enrolled("b", name));
    let a = mesh.node("a", &[&client]);
    let _b = mesh.node("b", &[&pods[0], &pods[1]]);
    assert_eq!(client.netns.refusal(([10, 96, 0, 1], 80)), ErrorKind::ConnectionReset);
    a.wait_metric("ztunnel_connect_retries_total", &["reason"], 1);
    assert_eq!(a.records(1, &["\"direction\":\"outbound\""]).len(), 1, "one record for one connection");
}

/// Neither answers, and the first one takes most of the time that a connect may take.
#[test]
#[ignore = "needs root: make test"]
fn a_connection_is_tried_at_other_endpoints_within_the_time_of_one_connect() {
    let mut mesh = TunnelMesh::new();
    let client = mesh.enrolled("a", "client");
    let pods = two_endpoints(&mut mesh, |mesh, name| mesh.enrolled("b", name));
    for pod in &pods {
        loses(pod, 8080);
    }
    let a = mesh.node_with("a", &[&client], &[("CONNECT_ANSWER_LIMIT", "7s")]);
    let _b = mesh.node("b", &[&pods[0], &pods[1]]);
    let began = Instant::now();
    assert_eq!(client.netns.refusal(([10, 96, 0, 1], 80)), ErrorKind::ConnectionReset);
    let took = began.elapsed();
    assert!((Duration::from_secs(9)..Duration::from_secs(12)).contains(&took), "{took:?}");
    a.wait_metric("ztunnel_connect_retries_total", &["reason"], 1);
    let record = &a.records(1, &["\"direction\":\"outbound\""])[0];
    assert_eq!(record["reason"], "connect", "{record}");
}
