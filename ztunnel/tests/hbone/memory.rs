//! What a pod or a peer that does not read costs the tunnel and the others.

use std::{
    cell::Cell,
    pin::Pin,
    rc::Rc,
    sync::Mutex,
    task::{Context, Poll},
};

use testbed::wait::try_wait;
use tokio::io::ReadBuf;

use super::*;

/// What the downloads of one pod may cost the process.
const LIMIT_BYTES: u64 = 256 << 20;

fn resident_bytes(node: &TunnelNode) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", node.pid())).expect("statm");
    let pages: u64 = statm.split(' ').nth(1).expect("resident").parse().expect("number");
    pages * 4096
}

/// Writes for as long as somebody takes it, and counts the bytes.
fn pour(mut stream: std::net::TcpStream, sent: &AtomicU64) {
    // The tests are about the tunnel's memory, not the kernel's.
    socket2::SockRef::from(&stream).set_send_buffer_size(16 << 10).expect("buffer");
    while stream.write_all(&[0; 1 << 14]).is_ok() {
        sent.fetch_add(1 << 14, Ordering::Relaxed);
    }
}

fn gauge(node: &TunnelNode, name: &str) -> u64 {
    let metrics = node.metrics();
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse().expect("number")
}

/// The last value of what grew and grows no more.
fn stands_still(value: impl Fn() -> u64) -> u64 {
    let (mut last, mut since) = (0, Instant::now());
    let still = try_wait(Duration::from_mins(4), || {
        let now = value();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        (now > 0 && since.elapsed() > Duration::from_secs(3)).then_some(())
    });
    assert!(still.is_some(), "it does not stand still, after {} MiB", last >> 20);
    last
}

/// A greeting, and a megabyte there and back.
fn carries(client: &MeshPod, server: &MeshPod) {
    let mut stream = greeted(client, server);
    stream.set_read_timeout(Some(LIMIT)).expect("timeout");
    let mut writer = stream.try_clone().expect("clone");
    let writing = std::thread::spawn(move || {
        writer.write_all(&vec![7; 1 << 20]).expect("write");
        writer.shutdown(std::net::Shutdown::Write).expect("shutdown");
    });
    assert_eq!(read_all(&mut stream).expect("echo").len(), 2 << 20);
    writing.join().expect("written");
}

#[test]
#[ignore = "needs root: make test"]
fn a_thousand_downloads_that_nobody_reads_cost_little_and_slow_nobody() {
    let mut mesh = TunnelMesh::new();
    let (client, other) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "other"));
    let server = mesh.enrolled("b", "server");
    server.serve_double_echo(8080);
    let sent = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&sent);
    server.serve(8081, move |stream, _| {
        pour(stream, &counter);
    });
    let quiet = [("RUST_LOG", "warn")];
    let (a, b) = (mesh.node_with("a", &[&client, &other], &quiet), mesh.node_with("b", &[&server], &quiet));
    carries(&client, &server);
    let before = [&a, &b].map(resident_bytes);

    let downloads: Vec<_> = (0..1000).map(|_| client.netns.connect(server.at(8081))).collect();
    let last = stands_still(|| sent.load(Ordering::Relaxed));

    for (node, before) in [&a, &b].into_iter().zip(before) {
        let cost = resident_bytes(node).saturating_sub(before);
        assert!(cost <= LIMIT_BYTES, "{} MiB for 1,000 downloads in {}", cost >> 20, node.netns);
    }
    let held = gauge(&a, "ztunnel_stream_held_bytes");
    assert!(held > 32 << 20 && held <= gauge(&a, "ztunnel_stream_window_bytes"), "{held}");
    carries(&client, &server);
    carries(&other, &server);
    assert_eq!(sent.load(Ordering::Relaxed), last, "the downloads stood still meanwhile");

    drop(downloads);
    wait_for("the memory to be given back", || (gauge(&a, "ztunnel_stream_held_bytes") == 0).then_some(()));
    wait_for("the windows to be given back", || {
        (gauge(&a, "ztunnel_stream_window_bytes") == 0).then_some(())
    });
}

/// A socket that is not read any more once it is deaf.
struct Deaf {
    socket: TcpStream,
    is_deaf: Rc<Cell<bool>>,
}

impl AsyncRead for Deaf {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.is_deaf.get() { Poll::Pending } else { Pin::new(&mut self.socket).poll_read(cx, into) }
    }
}

impl AsyncWrite for Deaf {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, data)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// A peer whose windows are open and whose TCP is not: what its streams want waits in the tunnel.
#[test]
#[ignore = "needs root: make test"]
fn a_peer_that_reads_nothing_costs_little_and_slows_nobody() {
    const TUNNELS: usize = 8;
    const STREAMS: usize = 200;
    /// Of what the pod's streams may make the tunnel hold; without a limit it would be 400 MiB.
    const POD_BYTES: u64 = 32 << 20;
    let mut mesh = TunnelMesh::new();
    let (peer, other) = (mesh.plain("a", "client"), mesh.enrolled("a", "other"));
    let server = mesh.enrolled("b", "server");
    server.serve_double_echo(8080);
    let sent = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&sent);
    server.serve(8081, move |mut stream, _| {
        if stream.read_exact(&mut [0]).is_ok() {
            pour(stream, &counter);
        }
    });
    let quiet = ("RUST_LOG", "warn");
    let limited = ("POD_STREAM_MEMORY", &*POD_BYTES.to_string());
    let _a = mesh.node_with("a", &[&other], &[quiet]);
    let b = mesh.node_with("b", &[&server], &[quiet, limited]);
    carries(&other, &server);
    let before = resident_bytes(&b);

    let probe = Probe::new(&mesh);
    let is_deaf = Rc::new(Cell::new(false));
    let dial_deaf = || {
        let socket = dial(&peer, server.at(15008));
        socket2::SockRef::from(&socket).set_recv_buffer_size(16 << 10).expect("buffer");
        Deaf { socket, is_deaf: Rc::clone(&is_deaf) }
    };
    let talk = async |tunnels: Vec<SendRequest<SendData>>| {
        let mut streams = Vec::new();
        for requests in &tunnels {
            for _ in 0..STREAMS {
                streams.push(opened(requests, server.at(8081)).await);
            }
        }
        is_deaf.set(true);
        for (send, _) in &mut streams {
            send.send_data(Bytes::from_static(b"g").into(), false).expect("sent");
        }
        // The looks at the tunnel block; what the streams have to send must be on its way.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let last = stands_still(|| sent.load(Ordering::Relaxed));
        let cost = resident_bytes(&b).saturating_sub(before);
        let held = gauge(&b, "ztunnel_stream_held_bytes");
        carries(&other, &server);
        (last, cost, held)
    };
    let (last, cost, held) = probe.over_tunnels(CLIENT, &server, TUNNELS, dial_deaf, talk).expect("tunnels");
    assert!(
        cost <= 4 * POD_BYTES,
        "{} MiB for what a peer does not read, {} MiB sent",
        cost >> 20,
        last >> 20
    );
    assert!((POD_BYTES / 2..=2 * POD_BYTES).contains(&held), "{held}");
    wait_for("the memory to be given back", || (gauge(&b, "ztunnel_stream_held_bytes") == 0).then_some(()));
    carries(&other, &server);
}

/// Stalled streams, each frame for which is one byte, and between the frames what another stream
/// takes: so each byte was read together with a lot of what is long gone.
#[test]
#[ignore = "needs root: make test"]
fn tiny_frames_that_nobody_reads_cost_little_and_slow_nobody() {
    const STREAMS: usize = 100;
    const ROUNDS: usize = 200;
    /// More than the kernel takes of a stream, and less than its window.
    const FIRST: usize = 120 << 10;
    /// Of that the tunnel holds at least.
    const HELD: usize = 32 << 10;
    /// Between two tiny frames. All of them together are 320 MiB.
    const BETWEEN: usize = 16 << 10;
    let TinyFrames { peer, others: [other, another], server, b, probe, .. } = &TinyFrames::new();
    let before = resident_bytes(b);
    let (cost, held) = probe
        .over_tunnel(peer, CLIENT, server, async |requests| {
            let mut stalled = Vec::new();
            for _ in 0..STREAMS {
                let mut stream = opened(&requests, server.at(8081)).await;
                stream.0.send_data(Bytes::from(vec![7; FIRST]).into(), false).expect("sent");
                stalled.push(stream);
            }
            wait_held(b, (STREAMS * HELD) as u64).await;
            let (mut taken, _body) = opened(&requests, server.at(8082)).await;
            for _ in 0..ROUNDS {
                for (send, _) in &mut stalled {
                    send.send_data(Bytes::from_static(b"x").into(), false).expect("sent");
                    let mut left = BETWEEN;
                    while left > 0 {
                        taken.reserve_capacity(left);
                        let room = std::future::poll_fn(|cx| taken.poll_capacity(cx)).await;
                        let room = room.expect("open").expect("capacity").min(left);
                        taken.send_data(Bytes::from(vec![7; room]).into(), false).expect("sent");
                        left -= room;
                    }
                }
            }
            wait_held(b, (STREAMS * (HELD + ROUNDS)) as u64).await;
            carries(other, another);
            (resident_bytes(b).saturating_sub(before), gauge(b, "ztunnel_stream_held_bytes"))
        })
        .expect("a tunnel");
    assert!(cost <= 64 << 20, "{} MiB for {} KiB that are held", cost >> 20, held >> 10);
    wait_for("the memory to be given back", || (gauge(b, "ztunnel_stream_held_bytes") == 0).then_some(()));
}

/// As many frames as there can be at once. What the tunnel does not take in time ends the peer's own
/// tunnel, and nothing else.
#[test]
#[ignore = "needs root: make test"]
fn a_million_tiny_frames_at_once_cost_little_and_slow_nobody() {
    const STREAMS: usize = 100;
    const FRAMES: usize = 10_000;
    let TinyFrames { peer, others: [other, another], server, b, probe, .. } = &TinyFrames::new();
    let before = resident_bytes(b);
    let most = probe
        .over_tunnel(peer, CLIENT, server, async |requests| {
            let mut streams = Vec::new();
            for _ in 0..STREAMS {
                streams.push(opened(&requests, server.at(8081)).await);
            }
            let mut most = 0;
            'flood: for round in 0..FRAMES {
                for (send, _) in &mut streams {
                    if send.send_data(Bytes::from_static(b"x").into(), false).is_err() {
                        break 'flood;
                    }
                }
                if round % 100 == 0 {
                    tokio::task::yield_now().await;
                    most = most.max(resident_bytes(b));
                }
            }
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_millis(100)).await;
                most = most.max(resident_bytes(b));
            }
            carries(other, another);
            most
        })
        .expect("a tunnel");
    let cost = most.saturating_sub(before);
    assert!(cost <= 64 << 20, "{} MiB for a million frames", cost >> 20);
    wait_for("the memory to be given back", || (gauge(b, "ztunnel_stream_held_bytes") == 0).then_some(()));
    carries(other, another);
}

/// A peer; a pod whose application at 8081 takes nothing, and at 8082 everything; two other pods.
struct TinyFrames {
    probe: Probe,
    peer: MeshPod,
    others: [MeshPod; 2],
    server: MeshPod,
    _a: TunnelNode,
    b: TunnelNode,
    _mesh: TunnelMesh,
}

impl TinyFrames {
    fn new() -> Self {
        let mut mesh = TunnelMesh::new();
        let (peer, other) = (mesh.plain("a", "client"), mesh.enrolled("a", "other"));
        let (server, another) = (mesh.enrolled("b", "server"), mesh.enrolled("b", "another"));
        another.serve_double_echo(8080);
        let quiet = ("RUST_LOG", "warn");
        let a = mesh.node_with("a", &[&other], &[quiet]);
        let b = mesh.node_with("b", &[&server, &another], &[quiet]);
        // The tests are about the tunnel's memory, not the kernel's. The tunnel's listeners are there
        // already, and what a socket receives may still grow.
        let small = r#"sysctl -qw net.ipv4.tcp_wmem="4096 4096 4096" net.ipv4.tcp_rmem="4096 4096 6291456""#;
        server.netns.run(small);
        let kept = Arc::new(Mutex::new(Vec::new()));
        server.serve(8081, move |stream, _| kept.lock().expect("no panic").push(stream));
        server.serve(8082, |mut stream, _| drop(std::io::copy(&mut stream, &mut std::io::sink())));
        carries(&other, &another);
        Self { probe: Probe::new(&mesh), peer, others: [other, another], server, _a: a, b, _mesh: mesh }
    }
}

/// A stream that was answered with 200.
async fn opened(
    requests: &SendRequest<SendData>,
    to: SocketAddr,
) -> (h2::SendStream<SendData>, h2::RecvStream) {
    let mut requests = requests.clone().ready().await.expect("a place");
    let connect = Request::builder().method(Method::CONNECT).uri(to.to_string()).body(());
    let (response, send) = requests.send_request(connect.expect("request"), false).expect("sent");
    let response = response.await.expect("an answer");
    assert_eq!(response.status(), StatusCode::OK);
    (send, response.into_body())
}

/// Waits until the tunnel says that it holds so much.
async fn wait_held(node: &TunnelNode, bytes: u64) {
    let held = async {
        while gauge(node, "ztunnel_stream_held_bytes") < bytes {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let held = tokio::time::timeout(LIMIT, held).await;
    assert!(held.is_ok(), "{} of {bytes} bytes are held", gauge(node, "ztunnel_stream_held_bytes"));
}

/// Connections that once had something to say.
#[test]
#[ignore = "needs root: make test"]
fn idle_connections_keep_no_buffers() {
    const CONNECTIONS: usize = 1000;
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let quiet = [("RUST_LOG", "warn")];
    let (a, b) = (mesh.node_with("a", &[&client], &quiet), mesh.node_with("b", &[&server], &quiet));
    carries(&client, &server);
    let before = [&a, &b].map(resident_bytes);
    let talk = |_| {
        let mut stream = greeted(&client, &server);
        stream.write_all(&[7; 12 << 10]).expect("write");
        stream.read_exact(&mut vec![0; 24 << 10]).expect("echo");
        stream
    };
    let open: Vec<_> = (0..CONNECTIONS).map(talk).collect();
    for (node, before) in [&a, &b].into_iter().zip(before) {
        let each = resident_bytes(node).saturating_sub(before) / CONNECTIONS as u64;
        assert!(each <= 20 << 10, "{each} bytes for each idle connection in {}", node.netns);
    }
    drop(open);
}
