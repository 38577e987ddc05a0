//! Connections that share tunnels.

use super::*;

/// Tunnels that are open from the client's netns.
fn tunnels(client: &MeshPod) -> usize {
    let open = client.netns.output("ss", &["-Htn", "state", "established", "dport", "=", ":15008"]);
    open.lines().count()
}

/// One for each worker, and there are two.
#[test]
#[ignore = "needs root: make test"]
fn connections_share_a_tunnel_and_the_first_ones_its_handshake() {
    let (_mesh, client, server, _nodes) = pooled(&[]);
    let streams: Vec<_> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..16).map(|_| scope.spawn(|| greeted(&client, &server))).collect();
        all.into_iter().map(|one| one.join().expect("greeted")).collect()
    });
    assert!((1..=2).contains(&tunnels(&client)), "{} tunnels", tunnels(&client));
    drop(streams);
}

#[test]
#[ignore = "needs root: make test"]
fn a_full_tunnel_is_joined_by_another_one() {
    let (_mesh, client, server, _nodes) = pooled(&[("POOL_MAX_STREAMS_PER_CONNECTION", "4")]);
    let streams: Vec<_> = (0..20).map(|_| greeted(&client, &server)).collect();
    assert!((5..=6).contains(&tunnels(&client)), "{} tunnels", tunnels(&client));
    drop(streams);
}

#[test]
#[ignore = "needs root: make test"]
fn an_unused_tunnel_is_closed_and_one_in_use_is_kept() {
    let (_mesh, client, server, _nodes) =
        pooled(&[("POOL_UNUSED_RELEASE_TIMEOUT", "500ms"), ("POOL_MAX_STREAMS_PER_CONNECTION", "1")]);
    let mut long = greeted(&client, &server);
    let short: Vec<_> = (0..3).map(|_| greeted(&client, &server)).collect();
    assert_eq!(tunnels(&client), 4);
    drop(short);
    wait_for("the unused ones to be closed", || tunnels(&client) == 1);
    long.write_all(b"on").expect("write");
    long.read_exact(&mut [0; 4]).expect("echo");
    drop(long);
    wait_for("the last one to be closed", || tunnels(&client) == 0);
    // And a new one is opened when it is needed.
    drop(greeted(&client, &server));
}

/// Twelve streams that are not read fill their windows of 256 KiB.
#[test]
#[ignore = "needs root: make test"]
fn streams_that_nobody_reads_do_not_touch_another_one_of_their_tunnel() {
    let (_mesh, client, server, _nodes) = pooled(&[("ZTUNNEL_WORKER_THREADS", "1")]);
    let sent = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&sent);
    server.serve(8081, move |mut stream, _| {
        while stream.write_all(&[0; 1 << 14]).is_ok() {
            counter.fetch_add(1 << 14, Ordering::Relaxed);
        }
    });
    let slow: Vec<_> = (0..12).map(|_| client.netns.connect(server.at(8081))).collect();
    let (mut before, mut since) = (0, Instant::now());
    wait_for("the unread streams to stand still", || {
        let now = sent.load(Ordering::Relaxed);
        if now != before {
            (before, since) = (now, Instant::now());
        }
        (now >= 3 << 20 && since.elapsed() > Duration::from_millis(300)).then_some(())
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
    // The quick one may have let the tunnel's windows grow.
    let more = sent.load(Ordering::Relaxed) - before;
    assert!(more <= 16 << 20, "the others took {more} bytes more than their tunnel may hold");
    drop(slow);
}

/// A peer proves who it is as long as its certificate is valid. What is open ends by itself.
#[test]
#[ignore = "needs root: make test"]
fn a_tunnel_takes_no_new_streams_after_its_certificates_and_keeps_those_it_has() {
    let (_mesh, client, server, [a, _b]) = pooled(&[("SECRET_TTL", "10s"), ("ZTUNNEL_WORKER_THREADS", "1")]);
    let mut long = greeted(&client, &server);
    let handshakes = || a.metric("ztunnel_tls_handshake_duration_seconds_count", &["direction=\"outbound\""]);
    wait_for("the first", || handshakes() == Some(1));
    wait_for("another handshake", || {
        drop(greeted(&client, &server));
        handshakes() == Some(2)
    });
    long.write_all(b"on").expect("write");
    long.read_exact(&mut [0; 4]).expect("echo");
}
