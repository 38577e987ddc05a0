//! What a tunnel is told, and what the watcher makes of its answers.

mod support;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};
use support::{Bed, FakeTunnel, Pod, Told, fake_tunnel::within, wait_for};
use watcher::observe::netns::run_in;

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_refused_pod_stays_closed_and_is_offered_again() {
    let mut bed = Bed::new();
    let pod = bed.pod("a");
    bed.write_pods(&[true], "");
    bed.start(&[]);
    bed.wait_state(pod, "closed", "no_tunnel");
    let inode = fs::metadata(format!("/run/netns/{}", bed.pods[pod].netns)).unwrap().ino();

    let tunnel = bed.tunnel();
    assert_eq!(tunnel.hear(), Told::Add("uid-a".to_owned(), inode));
    bed.wait_state(pod, "closed", "not_acknowledged");
    tunnel.answer("no room");
    assert_eq!(tunnel.take(), Told::SnapshotSent);
    // Twice, so that it is not the first retry alone.
    assert_eq!(tunnel.hear(), Told::Add("uid-a".to_owned(), inode));
    bed.wait_state(pod, "closed", "tunnel_refused");
    tunnel.answer("still no room");
    assert_eq!(tunnel.hear(), Told::Add("uid-a".to_owned(), inode));
    tunnel.answer("");
    bed.wait_state(pod, "open", "");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_label_comes_and_goes_and_leaves_nothing() {
    let mut bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let before: Vec<String> = bed.pods.iter().map(Pod::traces).collect();
    bed.write_pods(&[true, false], "");
    bed.start(&[]);
    let tunnel = bed.tunnel();
    assert_eq!(tunnel.take_snapshot(), ["uid-a"]);
    bed.wait_state(a, "open", "");
    bed.wait_state(b, "plain", "");
    assert_eq!(bed.pods[b].traces(), before[b], "a plain pod is not touched");
    assert_eq!(bed.status()["pods"][a]["cgroups"].as_object().unwrap().len(), 2, "the pod and its container");

    for _ in 0..3 {
        bed.write_pods(&[false, true], "");
        let told = [tunnel.hear(), {
            // The tunnel has not let go yet, so its connections may still need the preparation.
            assert!(bed.pods[a].is_prepared());
            tunnel.answer("");
            tunnel.take()
        }];
        assert!(
            matches!(&told, [Told::Del(del), Told::Add(add, _)] if del == "uid-a" && add == "uid-b"),
            "{told:?}"
        );
        bed.wait_state(b, "open", "");
        wait_for("the netns to be restored", || (bed.pods[a].traces() == before[a]).then_some(()));
        bed.write_pods(&[true, false], "");
        assert_eq!(tunnel.take(), Told::Del("uid-b".to_owned()));
        assert!(matches!(tunnel.take(), Told::Add(uid, _) if uid == "uid-a"));
        bed.wait_state(a, "open", "");
    }
}

/// A connection as a tunnel, which lives in `cgroup`, makes it to the application, from an address that is not the pod's.
fn transparent_connection(pod: &Pod, cgroup: &Path) -> (TcpStream, TcpStream) {
    let netns = pod.open_netns();
    let address: SocketAddr = format!("{}:8080", pod.address).parse().unwrap();
    let listener = run_in(netns.as_fd(), move || TcpListener::bind(address)).unwrap();
    let near = within(cgroup, || {
        run_in(netns.as_fd(), move || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_ip_transparent_v4(true)?;
            socket.set_mark(0x539)?;
            socket.bind(&"10.99.9.9:0".parse::<SocketAddr>().unwrap().into())?;
            socket.connect_timeout(&address.into(), Duration::from_secs(5))?;
            Ok(socket.into())
        })
    });
    let (accepted, from) = listener.accept().unwrap();
    assert_eq!(from.ip().to_string(), "10.99.9.9", "the application sees the client's address");
    (near.unwrap(), accepted)
}

/// A pod that left the mesh while the tunnel has a connection to its application, which the watcher waits for; its
/// traces from before it was in the mesh; the connection's two ends.
fn left_with_a_connection(bed: &mut Bed) -> (usize, String, FakeTunnel, (TcpStream, TcpStream)) {
    let pod = bed.pod("a");
    let before = bed.pods[pod].traces();
    // No tunnel listens here: only a pod that fails open can be dialled.
    bed.write_pods(&[true], "  failMode: open\n");
    bed.start(&[]);
    let tunnel = bed.tunnel();
    tunnel.take_snapshot();
    bed.wait_state(pod, "open", "");
    let ends = transparent_connection(&bed.pods[pod], &bed.cgroup.join("tunnel"));
    bed.write_pods(&[false], "");
    assert_eq!(tunnel.take(), Told::Del("uid-a".to_owned()));
    wait_for("the watcher to see the connection", || {
        let waits_for = bed.status()["draining"][0]["waits_for"].clone();
        (waits_for == "1 open connections of the tunnel").then_some(())
    });
    (pod, before, tunnel, ends)
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_netns_stays_prepared_while_a_connection_rests_on_it() {
    let mut bed = Bed::new();
    let (pod, before, _tunnel, (mut near, mut far)) = left_with_a_connection(&mut bed);
    assert!(bed.pods[pod].is_prepared());
    let mut buffer = [0; 4];
    near.write_all(b"ping").unwrap();
    far.read_exact(&mut buffer).unwrap();
    far.write_all(b"pong").unwrap();
    near.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"pong");

    drop((near, far));
    wait_for("the netns to be restored", || (bed.pods[pod].traces() == before).then_some(()));
}

/// Its connections may be resent into nowhere for minutes.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn nothing_waits_for_the_connections_of_a_deleted_pod() {
    let mut bed = Bed::new();
    let (pod, before, _tunnel, _open) = left_with_a_connection(&mut bed);
    bed.pods[pod].end();
    wait_for("nothing to be waited for", || {
        (bed.status()["draining"] == serde_json::json!([])).then_some(())
    });
    assert_eq!(bed.pods[pod].traces(), before);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_command_that_nobody_listens_to_ends_without_a_word() {
    let mut bed = Bed::new();
    bed.pod("a");
    bed.write_pods(&[false], "");
    bed.start(&[]);
    let mut command = bed.prepared(&["status"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_is_open_as_long_as_one_tunnel_serves_it() {
    let mut bed = Bed::new();
    let pod = bed.pod("a");
    bed.write_pods(&[true], "");
    bed.start(&[]);
    let first = bed.tunnel();
    first.take_snapshot();
    bed.wait_state(pod, "open", "");
    let second = FakeTunnel::connect(&bed.zds(), Some(&bed.cgroup.join("other-tunnel")));
    second.take_snapshot();
    drop(first);
    wait_for("the first tunnel to be gone", || {
        (bed.status()["tunnels"].as_array().unwrap().len() == 1).then_some(())
    });
    bed.wait_state(pod, "open", "");
    let of_tunnel =
        |bed: &Bed| bed.pins().iter().filter(|pin| pin.to_string_lossy().contains("links/tunnel-")).count();
    let links = of_tunnel(&bed);
    drop(second);
    bed.wait_state(pod, "closed", "no_tunnel");
    wait_for("the tunnel's links to be removed", || (links > 0 && of_tunnel(&bed) == 0).then_some(()));
    bed.write_pods(&[true], "  failMode: open\n");
    bed.wait_state(pod, "bypassed", "no_tunnel");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_tunnel_in_somebody_elses_cgroup_is_rejected() {
    let mut bed = Bed::new();
    bed.pod("a");
    bed.write_pods(&[true], "");
    bed.start(&[]);
    let places = [
        ("contains the pods", bed.cgroup.clone()),
        ("contains the watcher", bed.cgroup.join("watcher")),
        ("is pod a's", bed.pods[0].cgroup.join("container")),
    ];
    for (why, cgroup) in places {
        let tunnel = FakeTunnel::connect(&bed.zds(), Some(&cgroup));
        assert_eq!(tunnel.hear(), Told::Closed);
        let reason = bed.status()["rejected_tunnel"].clone();
        assert_eq!(reason["code"], "tunnel_cgroup_shared");
        assert!(reason["text"].as_str().unwrap().contains(why), "{reason}");
    }
    assert!(bed.status()["tunnels"].as_array().unwrap().is_empty());
    bed.wait_state(0, "closed", "no_tunnel");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_killed_watcher_leaves_traffic_alone_and_its_successor_goes_on() {
    let mut bed = Bed::new();
    let nothing = bed.pins();
    let pod = bed.pod("a");
    bed.write_pods(&[true], "");
    bed.start(&[]);
    let tunnel = bed.tunnel();
    tunnel.take_snapshot();
    bed.wait_state(pod, "open", "");
    // A pin that was replaced would have another inode.
    let links = |bed: &Bed| {
        let pins = bed.pins();
        let links = pins.iter().filter(|pin| pin.parent().is_some_and(|dir| dir.ends_with("links")));
        links.map(|pin| (pin.clone(), fs::metadata(pin).unwrap().ino())).collect::<Vec<_>>()
    };
    let before = links(&bed);
    assert!(before.len() > 8, "{before:?}");

    bed.watcher.take();
    assert_eq!(tunnel.hear(), Told::Closed);
    assert_eq!(links(&bed), before);
    assert!(bed.pods[pod].is_prepared());

    bed.start(&["--detach"]);
    // The tunnel has not come back, but carried on meanwhile; so the pod is not closed.
    bed.wait_state(pod, "open", "");
    assert_eq!(links(&bed), before, "the same links, not new ones");
    let tunnel = bed.tunnel();
    assert_eq!(tunnel.take_snapshot(), ["uid-a"]);
    bed.wait_state(pod, "open", "");

    // And now it is asked to leave nothing, with what its predecessor made too.
    let told = thread::spawn(move || tunnel.take());
    let mut watcher = bed.watcher.take().unwrap();
    watcher.signal(Signal::SIGTERM);
    assert!(watcher.wait(), "{}", bed.log());
    assert_eq!(told.join().unwrap(), Told::Del("uid-a".to_owned()));
    assert!(!bed.pods[pod].is_prepared());
    assert!(bed.pods[pod].traces().contains("tcp_fwmark_accept = 0"));
    assert_eq!(bed.pins(), nothing);
    assert!(!bed.zds().exists());
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn exclusions_are_obeyed_live_and_explained() {
    let mut bed = Bed::new();
    let pod = bed.pod("a");
    bed.write_pods(&[true], "");
    bed.start(&[]);
    let tunnel = bed.tunnel();
    tunnel.take_snapshot();
    bed.wait_state(pod, "open", "");
    let explained = |bed: &Bed, to: &str| {
        let (ok, text) = bed.command(&["explain", "a", to, "-o", "json"]);
        assert!(ok, "{text}");
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["outbound"].as_str().unwrap().to_owned()
    };
    assert_eq!(explained(&bed, "10.1.1.1:6379"), "redirect to the tunnel");
    bed.write_pods(
        &[true],
        "  excludeOutboundPorts: [6379, nonsense]\n  excludeOutboundCidrs: [10.2.0.0/16]\n",
    );
    wait_for("the port to be excluded", || {
        (explained(&bed, "10.1.1.1:6379") == "leave: port excluded").then_some(())
    });
    assert_eq!(explained(&bed, "10.2.1.1:80"), "leave: CIDR excluded");
    assert_eq!(explained(&bed, "10.1.1.1:80"), "redirect to the tunnel");
    let notes = bed.status()["pods"][pod]["notes"].clone();
    assert!(notes[0].as_str().unwrap().contains("nonsense"), "{notes}");
    // The pod was never taken out of the mesh for it.
    bed.wait_state(pod, "open", "");
    assert!(!bed.command(&["explain", "nobody", "10.1.1.1:80"]).0);
}
