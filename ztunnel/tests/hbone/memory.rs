//! What a pod that does not read costs the tunnel and the others.

use testbed::wait::try_wait;

use super::*;

/// What the downloads of one pod may cost the process.
const LIMIT_BYTES: u64 = 256 << 20;

fn resident_bytes(node: &TunnelNode) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", node.pid())).expect("statm");
    let pages: u64 = statm.split(' ').nth(1).expect("resident").parse().expect("number");
    pages * 4096
}

fn gauge(node: &TunnelNode, name: &str) -> u64 {
    let metrics = node.metrics();
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse().expect("number")
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
    server.serve(8081, move |mut stream, _| {
        // The test is about the tunnel's memory, not the kernel's.
        socket2::SockRef::from(&stream).set_send_buffer_size(16 << 10).expect("buffer");
        while stream.write_all(&[0; 1 << 14]).is_ok() {
            counter.fetch_add(1 << 14, Ordering::Relaxed);
        }
    });
    let quiet = [("RUST_LOG", "warn")];
    let (a, b) = (mesh.node_with("a", &[&client, &other], &quiet), mesh.node_with("b", &[&server], &quiet));
    carries(&client, &server);
    let before = [&a, &b].map(resident_bytes);

    let downloads: Vec<_> = (0..1000).map(|_| client.netns.connect(server.at(8081))).collect();
    let (mut last, mut since) = (0, Instant::now());
    let still = try_wait(Duration::from_mins(4), || {
        let now = sent.load(Ordering::Relaxed);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        (now > 0 && since.elapsed() > Duration::from_secs(3)).then_some(())
    });
    assert!(still.is_some(), "the downloads do not stand still, after {} MiB", last >> 20);

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
