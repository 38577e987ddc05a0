//! Source ports are the application's own affair: a redirect costs a pod none of them.

use adit_ebpf_common::{
    enrolment::{PodRecord, flag},
    flows::Destination,
    redirect_ports::{FIRST, redirect_port},
    trace::{Hook, Rule},
};

use testbed::wait::wait_for;

use crate::{
    outbound::canonical,
    rig::{INBOUND, OUTBOUND, READY, Rig, add_address, address, agent::How, at, interface_index},
};

/// The first two parts of destinations that nobody has, and the pod's own address.
const FAMILIES: [(&str, &str); 2] = [("192.0.2.", "10.99.0.1"), ("2001:db8::", "fd99::1")];

/// Without a mesh, ports are used up per destination.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_narrow_range_of_source_ports_suffices_for_many_destinations() {
    let mut rig = Rig::new();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    rig.app.sysctl("ipv4/ip_local_port_range", "40000\t40003");
    for (net, _) in FAMILIES {
        let mut open = Vec::new();
        // Two of each, of four that there are: by chance two destinations share a port.
        for number in (1..=40).flat_map(|last| [last, last]) {
            let to = at(&format!("{net}{number}"), 80);
            let dialled = rig.app.dial(How::Tcp, to);
            let end =
                dialled.unwrap_or_else(|errno| panic!("connection {} to {to}: {errno}", open.len() + 1));
            let accepted = rig.tunnel.accept(tunnel);
            assert_eq!((accepted.original, end.peer), (Some(to), to));
            open.push((end.handle, accepted.handle));
        }
        for (dialled, accepted) in open {
            rig.app.close(dialled);
            rig.tunnel.close(accepted);
        }
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn sockets_of_one_source_port_dial_different_destinations() {
    let mut rig = Rig::new();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    for (net, own) in FAMILIES {
        for number in 1..=30 {
            let to = at(&format!("{net}{number}"), 7000);
            let dialled = rig.app.dial_from_shared(at(own, 41_000), to);
            let end = dialled.unwrap_or_else(|errno| panic!("socket {number} to {to}: {errno}"));
            assert_eq!((end.local, end.peer), (at(own, 41_000), to));
            assert_eq!(rig.tunnel.accept(tunnel).original, Some(to));
        }
    }
}

/// A socket whose own port is the one that it is redirected to would be connected to itself.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn no_socket_is_connected_to_itself() {
    let mut rig = Rig::new();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    for (net, own) in FAMILIES {
        let to = format!("{net}9");
        let port = redirect_port(&Destination::new(address(&to), 80), 1);
        let end = rig.app.dial_from(at(own, port), at(&to, 80)).unwrap();
        assert_eq!((end.local.port(), end.peer), (port, at(&to, 80)));
        assert_eq!(rig.tunnel.accept(tunnel).original, Some(at(&to, 80)));
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_socket_that_is_bound_to_a_device_reaches_the_tunnel() {
    let mut rig = Rig::new();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    for (net, own) in FAMILIES {
        let to = at(&format!("{net}5"), 443);
        let end = rig.app.dial_by("eth0", to).unwrap();
        assert_eq!((end.local.ip(), end.peer), (at(own, 0).ip(), to));
        assert_eq!(rig.tunnel.accept(tunnel).original, Some(to));
    }
}

/// Its connection would leave by that interface, in clear, to whoever answers there.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_socket_that_is_bound_to_an_interface_without_the_address_is_refused() {
    let mut rig = Rig::new();
    rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    for (net, own) in FAMILIES {
        let device = interface_index(&rig.app) + 1;
        let record = PodRecord { netns_cookie: rig.cookie, flags: READY, device };
        rig.kernel.set_pod(address(own), &record).unwrap();
        let to = at(&format!("{net}5"), 443);
        assert_eq!(rig.app.dial_by("eth0", to).unwrap_err(), libc::EPERM);
    }
}

/// Such as one of a second interface, for which there are routes by source.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_socket_that_is_bound_to_another_address_of_the_pod_keeps_it() {
    let mut rig = Rig::new();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    for ((net, _), second) in FAMILIES.into_iter().zip(["10.99.0.9", "fd99::9"]) {
        add_address(&rig.app, second);
        let to = at(&format!("{net}6"), 443);
        rig.rules(443);
        assert_eq!(rig.app.dial_from(at(second, 0), to).unwrap_err(), libc::EPERM, "not known as the pod's");
        let hook = if to.is_ipv4() { Hook::Connect4 } else { Hook::Connect6 };
        assert_eq!(rig.rules(443), [(hook, Rule::NoAddress)]);

        let device = interface_index(&rig.app);
        let record = PodRecord { netns_cookie: rig.cookie, flags: READY, device };
        rig.kernel.set_pod(address(second), &record).unwrap();
        for port in [0, 40_123] {
            let end = rig.app.dial_from(at(second, port), to).unwrap();
            assert_eq!((end.local.ip(), end.peer), (at(second, 0).ip(), to));
            let accepted = rig.tunnel.accept(tunnel);
            assert_eq!((accepted.original, canonical(accepted.peer)), (Some(to), end.local));
        }
    }
}

/// Applications may listen on any of the ports; neither they nor the tunnel gets what is not
/// theirs.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn only_what_connect_redirected_is_outbound() {
    let mut rig = Rig::new();
    let outbound = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let inbound = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    for (net, own) in FAMILIES {
        let other = format!("{net}7");
        let port = redirect_port(&Destination::new(address(&other), 80), 0);
        let listener = rig.app.listen(&format!("[::]:{port}"));

        rig.app.dial(How::Tcp, at(&other, 80)).unwrap();
        assert_eq!(rig.tunnel.accept(outbound).original, Some(at(&other, 80)));
        assert!(rig.app.is_idle(listener), "the application has what was meant for {other}");

        let own_dial = rig.app.dial(How::Tcp, at(own, port)).unwrap();
        assert_eq!(canonical(rig.app.accept(listener).peer), own_dial.local, "the pod to itself");

        rig.rules(port);
        rig.world.dial(How::Tcp, at(own, port)).unwrap();
        assert_eq!(rig.rules(port), [(Hook::SkLookup, Rule::SteerPlain)]);
        assert_eq!(canonical(rig.tunnel.accept(inbound).local), at(own, port), "from outside");
        assert!(rig.tunnel.is_idle(outbound) && rig.app.is_idle(listener));
        rig.app.close(listener);
    }
}

/// The listener goes between the redirect and the SYN.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn what_was_redirected_never_reaches_the_pods_own_listener() {
    let mut rig = Rig::new();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let to = at("192.0.2.7", 80);
    let port = redirect_port(&Destination::new(address("192.0.2.7"), 80), 0);
    assert!(port >= FIRST);
    let listener = rig.app.listen(&format!("0.0.0.0:{port}"));
    // Whoever listens with a full queue drops the SYN, and it is repeated after a second.
    rig.app.sysctl("ipv4/tcp_syncookies", "0");
    let waiting: Vec<u32> = (0..400).map(|_| rig.app.begin(to).unwrap()).collect();
    rig.tunnel.close(tunnel);
    // The last of them were not taken: their repeated SYNs meet no listener of the tunnel.
    wait_for("a refusal", || rig.rules(port).contains(&(Hook::SkLookup, Rule::ListenerGone)));
    assert!(rig.app.is_idle(listener), "the application has what was meant for {to}");
    drop(waiting);
}

/// A watcher of before knows one port, and so do its programs in the netns and on the tunnel.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn without_the_flag_everything_goes_to_one_port() {
    let mut rig = Rig::new();
    rig.set(READY & !flag::SPREAD, true);
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    for (net, own) in FAMILIES {
        let to = at(&format!("{net}3"), 80);
        rig.app.dial(How::Tcp, to).unwrap();
        let accepted = rig.tunnel.accept(tunnel);
        assert_eq!((accepted.original, canonical(accepted.local)), (Some(to), at(own, OUTBOUND)));
    }
}
