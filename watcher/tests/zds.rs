//! What a tunnel receives over ZDS, and how the watcher handles its answers.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt as _,
    path::Path,
    thread,
};

use nix::sys::signal::Signal;
use testbed::{
    fakes::{FakeTunnel, Received},
    lend::{Lent, transparent, tunnel_listener},
    process::Placement,
    wait::wait_for,
    watcher_node::{NodePod, WatcherNode},
};

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_refused_pod_stays_closed_and_is_offered_again() {
    let (node, pod) = WatcherNode::with_pod(true, &[]);
    node.wait_state(pod, "closed", "no_tunnel");
    let inode = node.pods[pod].netns.inode();

    let tunnel = node.tunnel();
    assert_eq!(tunnel.receive(), Received::Add("uid-a".to_owned(), inode));
    node.wait_state(pod, "closed", "not_acknowledged");
    tunnel.answer("no room");
    assert_eq!(tunnel.take(), Received::SnapshotSent);
    // Twice, so that it is not the first retry alone.
    assert_eq!(tunnel.receive(), Received::Add("uid-a".to_owned(), inode));
    node.wait_state(pod, "closed", "tunnel_refused");
    tunnel.answer("still no room");
    assert_eq!(tunnel.receive(), Received::Add("uid-a".to_owned(), inode));
    tunnel.answer("");
    node.wait_state(pod, "open", "");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_label_comes_and_goes_and_leaves_nothing() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    let before: Vec<String> = node.pods.iter().map(NodePod::traces).collect();
    node.write_pods(&[true, false], "");
    node.start(&[]);
    let tunnel = node.tunnel();
    assert_eq!(tunnel.take_snapshot(), ["uid-a"]);
    node.wait_state(a, "open", "");
    node.wait_state(b, "plain", "");
    assert_eq!(node.pods[b].traces(), before[b], "a plain pod is not touched");
    assert_eq!(
        node.status()["pods"][a]["cgroups"].as_object().unwrap().len(),
        2,
        "the pod and its container"
    );

    for _ in 0..3 {
        node.write_pods(&[false, true], "");
        let received = [tunnel.receive(), {
            // The tunnel has not let go yet, so its connections may still need the preparation.
            assert!(node.pods[a].is_prepared());
            tunnel.answer("");
            tunnel.take()
        }];
        assert!(
            matches!(&received, [Received::Del(del), Received::Add(add, _)] if del == "uid-a" && add == "uid-b"),
            "{received:?}"
        );
        node.wait_state(b, "open", "");
        wait_for("the netns to be restored", || node.pods[a].traces() == before[a]);
        node.write_pods(&[true, false], "");
        assert_eq!(tunnel.take(), Received::Del("uid-b".to_owned()));
        assert!(matches!(tunnel.take(), Received::Add(uid, _) if uid == "uid-a"));
        node.wait_state(a, "open", "");
    }
}

/// A connection as a tunnel, which lives in `cgroup`, makes it to the application, from an address
/// that is not the pod's: its two ends.
fn transparent_connection(pod: &NodePod, cgroup: &Path) -> (Lent, TcpStream) {
    let address: SocketAddr = format!("{}:8080", pod.address).parse().unwrap();
    let listener = pod.netns.enter(|| TcpListener::bind(address)).unwrap();
    let near = transparent(cgroup, &pod.netns, "10.99.9.9:0".parse().unwrap(), address, 0x539);
    let (accepted, from) = listener.accept().unwrap();
    assert_eq!(from.ip().to_string(), "10.99.9.9", "the application sees the client's address");
    (near, accepted)
}

/// A pod that left the mesh while the tunnel has a connection to its application, which the watcher
/// waits for; its traces from before it was in the mesh; the connection's two ends.
fn left_with_a_connection(node: &mut WatcherNode) -> (usize, String, FakeTunnel, (Lent, TcpStream)) {
    let pod = node.pod("a");
    let before = node.pods[pod].traces();
    // No tunnel listens here: only a pod that fails open can be dialled.
    node.write_pods(&[true], "  failMode: open\n");
    node.start(&[]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    node.wait_state(pod, "open", "");
    let ends = transparent_connection(&node.pods[pod], &node.cgroup.join("tunnel"));
    node.write_pods(&[false], "");
    assert_eq!(tunnel.take(), Received::Del("uid-a".to_owned()));
    wait_for("the watcher to see the connection", || {
        let waits_for = node.status()["draining"][0]["waits_for"].clone();
        (waits_for == "1 open connections of the tunnel").then_some(())
    });
    (pod, before, tunnel, ends)
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_netns_stays_prepared_while_a_connection_rests_on_it() {
    let mut node = WatcherNode::new();
    let (pod, before, _tunnel, (mut near, mut far)) = left_with_a_connection(&mut node);
    assert!(node.pods[pod].is_prepared());
    let mut buffer = [0; 4];
    near.socket.write_all(b"ping").unwrap();
    far.read_exact(&mut buffer).unwrap();
    far.write_all(b"pong").unwrap();
    near.socket.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"pong");

    drop((near, far));
    wait_for("the netns to be restored", || node.pods[pod].traces() == before);
}

/// Its connections may be resent into nowhere for minutes.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn nothing_waits_for_the_connections_of_a_deleted_pod() {
    let mut node = WatcherNode::new();
    let (pod, before, _tunnel, _open) = left_with_a_connection(&mut node);
    node.pods[pod].end();
    wait_for("nothing to be waited for", || {
        (node.status()["draining"] == serde_json::json!([])).then_some(())
    });
    assert_eq!(node.pods[pod].traces(), before);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_command_that_nobody_listens_to_ends_without_a_word() {
    let (node, _) = WatcherNode::with_pod(false, &[]);
    let mut command = node.prepared(&["status"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_is_open_as_long_as_one_tunnel_serves_it() {
    let (node, pod) = WatcherNode::with_pod(true, &[]);
    let first = node.tunnel();
    first.take_snapshot();
    node.wait_state(pod, "open", "");
    let second = FakeTunnel::connect(&node.zds(), Some(&node.cgroup.join("other-tunnel")));
    second.take_snapshot();
    drop(first);
    wait_for("the first tunnel to be gone", || {
        (node.status()["tunnels"].as_array().unwrap().len() == 1).then_some(())
    });
    node.wait_state(pod, "open", "");
    drop(second);
    node.wait_state(pod, "closed", "no_tunnel");
    node.write_pods(&[true], "  failMode: open\n");
    node.wait_state(pod, "bypassed", "no_tunnel");
}

/// A label fails no connection of a pod that runs: it goes on in plaintext until a tunnel serves it,
/// and not once more when that tunnel ends and the next one has not answered yet.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_that_was_served_is_closed_until_the_next_tunnel_serves_it() {
    let (node, pod) = WatcherNode::with_pod(false, &[]);
    let first = node.tunnel();
    assert!(first.take_snapshot().is_empty());
    node.write_pods(&[true], "");
    assert!(matches!(first.take(), Received::Add(..)));
    node.wait_state(pod, "open", "");
    let _second = FakeTunnel::connect(&node.zds(), Some(&node.cgroup.join("other-tunnel")));
    drop(first);
    wait_for("the first tunnel to be gone", || {
        (node.status()["tunnels"].as_array().unwrap().len() == 1).then_some(())
    });
    let NodePod { cgroup, netns, .. } = &node.pods[pod];
    let place = Placement::in_cgroup(&cgroup.join("container")).in_netns(netns);
    // Nobody has this address: in plaintext it would take its time.
    let connect = place.command(&["timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/10.88.0.99/80"]).output();
    let said = String::from_utf8_lossy(&connect.expect("bash").stderr).into_owned();
    assert!(said.contains("Operation not permitted"), "{said:?}\n{}", node.log());
}

/// The kernel runs the programs for the sockets that a tunnel still has after its ZDS connection.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_tunnels_programs_stay_until_its_cgroup_is_gone() {
    let (node, pod) = WatcherNode::with_pod(true, &[]);
    let dir = node.cgroup.create("passing-tunnel");
    let id = fs::metadata(&dir).unwrap().ino();
    let of_tunnel = |node: &WatcherNode| {
        let pins = node.pins();
        let own = format!("-{id}-");
        pins.iter()
            .filter(|pin| pin.to_string_lossy().contains("links/tunnel-"))
            .filter(|pin| pin.to_string_lossy().contains(&own))
            .count()
    };
    let tunnel = FakeTunnel::connect(&node.zds(), Some(&dir));
    tunnel.take_snapshot();
    node.wait_state(pod, "open", "");
    let links = of_tunnel(&node);
    assert!(links > 0);
    drop(tunnel);
    node.wait_state(pod, "closed", "no_tunnel");
    // Another tunnel comes and goes, elsewhere.
    drop(FakeTunnel::connect(&node.zds(), Some(&node.cgroup.join("other-tunnel"))));
    wait_for("no tunnel", || node.status()["tunnels"].as_array().unwrap().is_empty().then_some(()));
    assert_eq!(of_tunnel(&node), links);
    testbed::cgroup::remove(&dir);
    wait_for("the tunnel's links to be removed", || of_tunnel(&node) == 0);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_tunnel_in_somebody_elses_cgroup_is_rejected() {
    let (node, _) = WatcherNode::with_pod(true, &[]);
    let places = [
        ("contains the pods", node.cgroup.path().to_owned()),
        ("contains the watcher", node.cgroup.join("watcher")),
        ("is to be enrolled", node.pods[0].cgroup.join("container")),
    ];
    for (why, cgroup) in places {
        let tunnel = FakeTunnel::connect(&node.zds(), Some(&cgroup));
        assert_eq!(tunnel.receive(), Received::Closed);
        let reason = node.status()["rejected_tunnel"].clone();
        assert_eq!(reason["code"], "tunnel_cgroup_shared");
        assert!(reason["text"].as_str().unwrap().contains(why), "{reason}");
    }
    assert!(node.status()["tunnels"].as_array().unwrap().is_empty());
    node.wait_state(0, "closed", "no_tunnel");
}

/// As in a rolling update that starts the next watcher before it ends the last one.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_second_watcher_stands_by_and_takes_over() {
    let (mut node, pod) = WatcherNode::with_pod(true, &[]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    node.wait_state(pod, "open", "");
    let readiness = |address: &str| {
        let url = format!("http://{address}/healthz/ready");
        let output =
            std::process::Command::new("curl").args(["-sf", "--max-time", "2", &url]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let second = node.spawn(&[], &["--metrics-address", &free]);
    wait_for("the second watcher to stand by", || readiness(&free).starts_with("standing by"));
    node.wait_state(pod, "open", "");
    assert_eq!(node.status()["tunnels"].as_array().unwrap().len(), 1, "the first one works");

    node.kill_watcher();
    assert_eq!(tunnel.receive(), Received::Closed);
    wait_for("the second watcher to answer", || node.command(&["status", "-o", "json"]).0);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    node.wait_state(pod, "open", "");
    assert_eq!(readiness(&free), "ready\n");
    drop(second);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_killed_watcher_leaves_traffic_alone_and_its_successor_goes_on() {
    let mut node = WatcherNode::new();
    let nothing = node.pins();
    let pod = node.pod("a");
    node.write_pods(&[true], "");
    node.start(&[]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    let address = "[::]:15001".parse().unwrap();
    let _listener = tunnel_listener(&node.cgroup.join("tunnel"), &node.pods[pod].netns, address);
    node.wait_state(pod, "open", "");
    // A pin that was replaced would have another inode.
    let links = |node: &WatcherNode| {
        let pins = node.pins();
        let links = pins.iter().filter(|pin| pin.parent().is_some_and(|dir| dir.ends_with("links")));
        // Programs of tracepoints cannot be replaced in place.
        let links = links.filter(|pin| !pin.to_string_lossy().contains("links/lifecycle-"));
        links.map(|pin| (pin.clone(), fs::metadata(pin).unwrap().ino())).collect::<Vec<_>>()
    };
    let before = links(&node);
    assert!(before.len() > 8, "{before:?}");

    node.kill_watcher();
    assert_eq!(tunnel.receive(), Received::Closed);
    assert_eq!(links(&node), before);
    assert!(node.pods[pod].is_prepared());

    node.start(&["--detach"]);
    // The tunnel has not come back, but carried on meanwhile; so the pod is not closed.
    node.wait_state(pod, "open", "");
    assert_eq!(links(&node), before, "the same links, not new ones");
    let tunnel = node.tunnel();
    assert_eq!(tunnel.take_snapshot(), ["uid-a"]);
    node.wait_state(pod, "open", "");

    // SIGTERM without --detach: it removes everything, also what its predecessor made.
    let received = thread::spawn(move || tunnel.take());
    let mut watcher = node.watcher.take().unwrap();
    watcher.signal(Signal::SIGTERM);
    assert!(watcher.wait().success(), "{}", node.log());
    assert_eq!(received.join().unwrap(), Received::Del("uid-a".to_owned()));
    assert!(!node.pods[pod].is_prepared());
    assert!(node.pods[pod].traces().contains("tcp_fwmark_accept = 0"));
    assert_eq!(node.pins(), nothing);
    assert!(!node.zds().exists());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn exclusions_are_obeyed_live_and_explained() {
    let (node, pod) = WatcherNode::with_pod(true, &[]);
    let tunnel = node.tunnel();
    tunnel.take_snapshot();
    node.wait_state(pod, "open", "");
    let explained = |node: &WatcherNode, to: &str| {
        let (ok, text) = node.command(&["explain", "a", to, "-o", "json"]);
        assert!(ok, "{text}");
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["outbound"].as_str().unwrap().to_owned()
    };
    // What the programs would do now, not what is wanted: this tunnel has no listener yet.
    assert_eq!(explained(&node, "10.1.1.1:6379"), "refuse: tunnel away, pod fails closed");
    let outbound = "[::]:15001".parse().unwrap();
    let _listener = tunnel_listener(&node.cgroup.join("tunnel"), &node.pods[pod].netns, outbound);
    assert_eq!(explained(&node, "10.1.1.1:6379"), "redirect to the tunnel");
    node.write_pods(
        &[true],
        "  excludeOutboundPorts: [6379, nonsense]\n  excludeOutboundCidrs: [10.2.0.0/16]\n",
    );
    wait_for("the port to be excluded", || {
        (explained(&node, "10.1.1.1:6379") == "leave: port excluded").then_some(())
    });
    assert_eq!(explained(&node, "10.2.1.1:80"), "leave: CIDR excluded");
    assert_eq!(explained(&node, "10.1.1.1:80"), "redirect to the tunnel");
    let notes = node.status()["pods"][pod]["notes"].clone();
    assert!(notes[0].as_str().unwrap().contains("nonsense"), "{notes}");
    // The pod was never taken out of the mesh for it.
    node.wait_state(pod, "open", "");
    assert!(!node.command(&["explain", "nobody", "10.1.1.1:80"]).0);
}
