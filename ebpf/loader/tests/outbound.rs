//! The first decision list, rule by rule, and what a redirected connection looks like from both
//! ends.

use std::{
    fs::File,
    net::{SocketAddr, SocketAddrV6},
    os::fd::AsFd as _,
};

use adit_ebpf_common::{
    enrolment::flag,
    exclusions::OUTBOUND as DIALS,
    flows::Destination,
    trace::{Hook, Rule},
};
use adit_ebpf_loader::ExclusionList;

use crate::rig::{
    HBONE, INBOUND, OUTBOUND, READY, Rig, add_address, address, agent::How, at, empty, has_mptcp,
    interface_index, repeated, sys,
};

const OPEN: u32 = flag::FAIL_OPEN;

/// What the dialling process sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// It reaches what it dialled.
    Reaches,
    /// It reaches the tunnel instead.
    Redirected,
    Refused,
}
use Effect::{Reaches, Redirected, Refused};

/// Its scope is no part of an original destination: a redirect would lose it.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_link_local_destination_is_left_alone() {
    let mut rig = Rig::new();
    rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    rig.world.listen("[::]:8080");
    add_address(&rig.world, "fe80::99:2");
    // A link-local source comes by itself, once nobody else on the link has it.
    add_address(&rig.app, "fe80::99:1");
    let scope = interface_index(&rig.app);
    let to = SocketAddrV6::new("fe80::99:2".parse().unwrap(), 8080, 0, scope).into();
    let end = rig.app.dial(How::Tcp, to).unwrap();
    assert_eq!(end.peer, to);
    let destination = Destination::new(address("fe80::99:2"), 8080);
    let explained = rig
        .kernel
        .explain_connect(Some(rig.cgroups.id("pods/mesh")), Some(rig.cookie), [None; 2], destination)
        .unwrap();
    assert_eq!((rig.rules(8080)[0], explained), ((Hook::Connect6, Rule::LinkLocal), Rule::LinkLocal));
    rig.set(flag::IN_MESH, true);
    assert_eq!(rig.app.dial(How::Tcp, to).map(|_| ()), Err(libc::EPERM), "closed is closed");
}

/// The pod's flags, whether a tunnel is connected, the destination: the rule and its effect.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_first_rule_that_holds_decides() {
    let mut rig = Rig::new();
    let own = ExclusionList::default()
        .with_ports(DIALS, 6379..=6379)
        .with_cidr(address("10.99.0.0"), 96 + 24)
        .with_cidr(address("fd99::2"), 128);
    rig.kernel.add_exclusions(7, &own).unwrap();
    // Of other pods: without effect.
    let others = ExclusionList::default()
        .with_ports(DIALS, 80..=80)
        .with_cidr([0; 16], 0)
        .with_cidr(address("0.0.0.0"), 96);
    rig.kernel.add_exclusions(8, &others).unwrap();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    rig.app.listen("[::]:8080");
    rig.world.listen("[::]:8080");
    rig.world.listen("[::]:6379");

    for (flags, up, to, port, rule, effect) in [
        (READY, true, ["127.0.0.1", "::1"], 8080, Rule::Loopback, Reaches),
        (READY, true, ["127.9.9.9", "::1"], 8080, Rule::Loopback, Reaches),
        (READY, true, ["0.0.0.0", "::"], 8080, Rule::Loopback, Reaches),
        (READY, true, ["127.0.0.1", "::1"], OUTBOUND, Rule::DropReserved, Refused),
        (READY, true, ["127.0.0.2", "::"], INBOUND, Rule::DropReserved, Refused),
        (READY, true, ["10.99.0.1", "fd99::1"], 8080, Rule::OwnAddress, Reaches),
        (READY, true, ["10.99.0.1", "fd99::1"], OUTBOUND, Rule::DropReserved, Refused),
        (READY, true, ["10.99.0.1", "fd99::1"], HBONE, Rule::DropReserved, Refused),
        (READY, true, ["10.99.0.2", "fd99::2"], 6379, Rule::ExcludedPort, Reaches),
        (READY, true, ["10.99.0.2", "fd99::2"], 8080, Rule::ExcludedCidr, Reaches),
        (READY, true, ["192.0.2.1", "2001:db8::1"], 80, Rule::Redirect, Redirected),
        (READY, true, ["192.0.2.1", "2001:db8::1"], INBOUND, Rule::Redirect, Redirected),
        // Exclusions come before the fail mode, and loopback before everything.
        (flag::IN_MESH, true, ["10.99.0.2", "fd99::2"], 8080, Rule::ExcludedCidr, Reaches),
        (flag::IN_MESH, true, ["127.0.0.1", "::1"], 8080, Rule::Loopback, Reaches),
        (flag::IN_MESH, true, ["10.99.0.1", "fd99::1"], 8080, Rule::OwnAddress, Reaches),
        (flag::IN_MESH, true, ["192.0.2.1", "2001:db8::1"], 80, Rule::FailClosed, Refused),
        (READY, false, ["192.0.2.1", "2001:db8::1"], 80, Rule::FailClosed, Refused),
        (READY | flag::SIDECAR, true, ["10.99.0.2", "fd99::2"], 8080, Rule::NotEnrolled, Reaches),
        (0, true, ["10.99.0.2", "fd99::2"], 8080, Rule::NotEnrolled, Reaches),
    ] {
        rig.set(flags, up);
        let mapped = format!("::ffff:{}", to[0]);
        for (to, hook) in [(to[0], Hook::Connect4), (to[1], Hook::Connect6), (&mapped, Hook::Connect6)] {
            rig.rules(port);
            let to = at(to, port);
            let case = format!("flags {flags} up {up} to {to}");
            let dialled = rig.app.dial(How::Tcp, to);
            assert_eq!(rig.rules(port)[..1], [(hook, rule)], "{case}");
            let seen = match (&dialled, effect) {
                (Err(errno), _) => {
                    assert_eq!(*errno, libc::EPERM, "{case}");
                    Refused
                }
                (Ok(_), Redirected) => {
                    let accepted = rig.tunnel.accept(tunnel);
                    assert_eq!(accepted.original, Some(canonical(to)), "{case}");
                    rig.tunnel.close(accepted.handle);
                    Redirected
                }
                (Ok(_), _) => Reaches,
            };
            assert_eq!(seen, effect, "{case}");
            if let Ok(end) = dialled {
                rig.app.close(end.handle);
            }
            assert!(effect == Redirected || rig.tunnel.is_idle(tunnel), "{case}");
        }
    }
}

/// Fail open leaves the route as it is: what is dialled is reached.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn without_a_tunnel_the_fail_mode_holds_at_once() {
    let mut rig = Rig::new();
    rig.world.listen("[::]:8080");
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let to = at("10.99.0.2", 8080);
    rig.set(READY | OPEN, true);
    let redirected = rig.app.dial(How::Tcp, to).unwrap();
    assert_eq!(rig.tunnel.accept(tunnel).original, Some(to));
    for (flags, up) in [(READY | OPEN, false), (flag::IN_MESH | OPEN, true)] {
        rig.set(flags, up);
        rig.rules(8080);
        let direct = rig.app.dial(How::Tcp, to).unwrap();
        assert_eq!(rig.rules(8080), [(Hook::Connect4, Rule::FailOpen)]);
        rig.app.close(direct.handle);
    }
    assert!(rig.tunnel.is_idle(tunnel));
    // The programs get no notice that the tunnel is gone, except that its listener is.
    rig.tunnel.close(tunnel);
    rig.set(READY | OPEN, true);
    let direct = rig.app.dial(How::Tcp, to).unwrap();
    assert_eq!(rig.rules(8080), [(Hook::Connect4, Rule::FailOpen)]);
    rig.app.close(direct.handle);
    rig.set(READY, true);
    assert_eq!(rig.app.dial(How::Tcp, to).unwrap_err(), libc::EPERM);
    rig.set(READY, false);
    assert_eq!(rig.app.dial(How::Tcp, to).unwrap_err(), libc::EPERM);
    rig.app.close(redirected.handle);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn who_calls_is_found_by_cgroup() {
    let mut rig = Rig::new();
    rig.world.listen("[::]:8080");
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let to = at("10.99.0.2", 8080);

    // Attached, but nothing is known of its cgroup.
    rig.plain.dial(How::Tcp, to).unwrap();
    assert_eq!(rig.rules(8080), [(Hook::Connect4, Rule::NotEnrolled)]);

    // The container of the pod has no entry of its own: the pod's is found above it.
    rig.app.dial(How::Tcp, to).unwrap();
    rig.tunnel.accept(tunnel);
    assert_eq!(rig.rules(8080), [(Hook::Connect4, Rule::Redirect)]);

    // The deepest entry wins.
    let container = rig.cgroups.id("pods/mesh/container");
    rig.kernel.set_cgroup(container, &empty()).unwrap();
    rig.app.dial(How::Tcp, to).unwrap();
    assert_eq!(rig.rules(8080), [(Hook::Connect4, Rule::NotEnrolled)]);

    // A tunnel below the pods' cgroup, such as in a DaemonSet: both sets of programs run on its
    // sockets.
    let inner = rig.cgroups.id("pods/plain");
    let dir = rig.cgroups.join("pods/plain");
    rig.kernel.attach_tunnel(&dir).unwrap();
    let info = adit_ebpf_common::enrolment::CgroupInfo { flags: flag::TUNNEL, ..empty() };
    rig.kernel.set_cgroup(inner, &info).unwrap();
    rig.plain.dial(How::Tcp, to).unwrap();
    assert_eq!(rig.rules(8080), [(Hook::Connect4, Rule::Tunnel)]);
    rig.kernel.detach_tunnel(&dir, inner).unwrap();
}

/// A browser's renderer, docker in docker: in the pod's cgroup, in a netns of its own.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_socket_of_another_netns_than_the_pods_is_left_alone() {
    let mut rig = Rig::new();
    rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let listener = rig.world.listen("[::]:8080");
    let mut nested = crate::rig::agent::Agent::start();
    nested.enter_cgroup(&rig.cgroups.join("pods/mesh/container"));
    nested.enter_netns_of(&rig.world);
    for (flags, to) in [(READY, at("10.99.0.2", 8080)), (flag::IN_MESH, at("fd99::2", 8080))] {
        rig.set(flags, true);
        let dialled = nested.dial(How::Tcp, to).unwrap();
        assert_eq!(rig.rules(8080)[0].1, Rule::OtherNetns);
        rig.world.accept(listener);
        nested.close(dialled.handle);
    }
}

/// Outside the pod's cgroup and in its netns: a container in the wrong place, a worker of io_uring
/// before Linux 5.12, which is in no cgroup.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_socket_of_a_pods_netns_is_the_pods_whatever_the_cgroup() {
    let mut rig = Rig::new();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    rig.plain.enter_netns_of(&rig.app);
    let to = at("192.0.2.1", 80);
    rig.plain.dial(How::Tcp, to).unwrap();
    assert_eq!(rig.tunnel.accept(tunnel).original, Some(to));
    assert_eq!(rig.rules(80), [(Hook::Connect4, Rule::Redirect)]);
    rig.set(flag::IN_MESH, true);
    assert_eq!(rig.plain.dial(How::Tcp, to).unwrap_err(), libc::EPERM);
    rig.kernel.remove_netns(rig.cookie).unwrap();
    rig.plain.begin(at("10.99.0.2", 80)).unwrap();
    assert_eq!(rig.rules(80).last(), Some(&(Hook::Connect4, Rule::NotEnrolled)));
}

/// The entry found no room, or somebody removed it. The pod must not go on in clear.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_without_an_entry_follows_its_fail_mode() {
    let mut rig = Rig::new();
    rig.world.listen("[::]:8080");
    let pod = rig.cgroups.id("pods/mesh");
    rig.kernel.remove_cgroup(pod).unwrap();
    for to in [at("10.99.0.2", 8080), at("fd99::2", 8080)] {
        for (flags, rule) in [
            (READY, Rule::NoEntry),
            (flag::IN_MESH, Rule::NoEntry),
            (flag::IN_MESH | OPEN, Rule::FailOpen),
            (OPEN, Rule::NotEnrolled),
        ] {
            rig.set_netns(flags, 0);
            rig.rules(8080);
            let dialled = rig.app.dial(How::Tcp, to);
            let destination = Destination::new(address(&to.ip().to_string()), 8080);
            let explained =
                rig.kernel.explain_connect(Some(pod), Some(rig.cookie), [None; 2], destination).unwrap();
            assert_eq!((rig.rules(8080)[0].1, explained), (rule, rule), "{flags} {to}");
            match rule {
                Rule::NoEntry => assert_eq!(dialled.map(|_| ()), Err(libc::EPERM), "{flags} {to}"),
                _ => assert_eq!(dialled.unwrap().peer, to, "{flags} {to}"),
            }
        }
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_without_an_address_of_the_family_is_refused_there() {
    let mut rig = Rig::new();
    let id = rig.cgroups.id("pods/mesh");
    let (_, mut info) = rig.kernel.cgroups().unwrap().into_iter().find(|(found, _)| *found == id).unwrap();
    info.v6 = [0; 16];
    rig.kernel.set_cgroup(id, &info).unwrap();
    assert_eq!(rig.app.dial(How::Tcp, at("2001:db8::1", 80)).unwrap_err(), libc::EPERM);
    assert_eq!(rig.rules(80), [(Hook::Connect6, Rule::NoAddress)]);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_redirected_connection_is_none_the_wiser() {
    let mut rig = Rig::new();
    // Fast Open for client and server, of every listener and without cookies: the SYN carries data.
    rig.app.sysctl("ipv4/tcp_fastopen", "1543");
    for (tunnel_at, to, own) in [
        ("0.0.0.0", "192.0.2.9", "10.99.0.1"),
        ("[::]", "2001:db8::9", "fd99::1"),
        ("[::]", "::ffff:192.0.2.9", "::ffff:10.99.0.1"),
        ("[::]", "192.0.2.9", "10.99.0.1"),
    ] {
        let listener = rig.tunnel.listen(&format!("{tunnel_at}:{OUTBOUND}"));
        for how in [How::Tcp, How::NonBlocking, How::Mptcp, How::FastOpen, How::FastOpenLater] {
            if how == How::Mptcp && !has_mptcp() {
                continue;
            }
            let to = at(to, 80);
            let dialled = rig.app.dial(how, to).unwrap_or_else(|errno| panic!("{how:?} {to}: {errno}"));
            let accepted = rig.tunnel.accept(listener);
            // An MPTCP socket is not the one that was redirected, but the one above it.
            if how != How::Mptcp {
                assert_eq!(dialled.peer, to, "the application sees whom it dialled");
            }
            assert_eq!(dialled.local.ip(), at(own, 0).ip(), "and its own address");
            assert_eq!(dialled.original, None, "SO_ORIGINAL_DST is the tunnel's");
            assert_eq!(accepted.original, Some(canonical(to)), "{how:?}");
            assert_eq!(accepted.peer.port(), dialled.local.port());
            rig.app.close(dialled.handle);
            rig.tunnel.close(accepted.handle);
        }
        rig.tunnel.close(listener);
    }
}

/// The socket stays the same, so does its cookie: what is recorded must follow each call.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn one_socket_may_connect_again_elsewhere() {
    let mut rig = Rig::new();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    rig.app.listen("0.0.0.0:8080");
    let first = rig.app.dial(How::Tcp, at("192.0.2.1", 80)).unwrap();
    assert_eq!(rig.tunnel.accept(tunnel).original, Some(at("192.0.2.1", 80)));

    let second = rig.app.redial(first.handle, at("192.0.2.2", 443)).unwrap();
    assert_eq!(second.peer, at("192.0.2.2", 443));
    assert_eq!(rig.tunnel.accept(tunnel).original, Some(at("192.0.2.2", 443)));

    let third = rig.app.redial(second.handle, at("127.0.0.1", 8080)).unwrap();
    assert_eq!(third.peer, at("127.0.0.1", 8080), "left alone, so nothing may be remembered");
    assert!(rig.tunnel.is_idle(tunnel));

    let fourth = rig.app.redial(third.handle, at("192.0.2.4", 80)).unwrap();
    assert_eq!(fourth.peer, at("192.0.2.4", 80));
    assert_eq!(rig.tunnel.accept(tunnel).original, Some(at("192.0.2.4", 80)));
}

/// Many destinations from many ports: no connection gets another's destination.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn no_connection_gets_the_destination_of_another() {
    let mut rig = Rig::new();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    for round in 0..repeated(500) {
        let to = at(&format!("192.0.2.{}", round % 250), 1000 + round);
        let dialled = rig.app.dial(How::Tcp, to).unwrap();
        let accepted = rig.tunnel.accept(tunnel);
        assert_eq!((accepted.original, dialled.peer), (Some(to), to));
        rig.app.close(dialled.handle);
        rig.tunnel.close(accepted.handle);
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn udp_is_left_alone() {
    let mut rig = Rig::new();
    for to in [at("10.99.0.2", 53), at("fd99::2", 53)] {
        assert_eq!(rig.app.dial(How::Udp, to).unwrap().peer, to);
    }
    rig.set(flag::IN_MESH, false);
    rig.app.dial(How::Udp, at("10.99.0.2", 53)).unwrap();
    assert_eq!(rig.rules(53), []);
}

/// A connection to the tunnel's port that was not redirected has no original destination.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn nobody_gets_an_original_destination_without_a_redirect() {
    let mut rig = Rig::new();
    rig.set(0, true);
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    rig.app.dial(How::Tcp, at("10.99.0.1", OUTBOUND)).unwrap();
    assert_eq!(rig.tunnel.accept(tunnel).original, None);
}

pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Such programs are hooked at the root of the cgroups, and ours, below it, run first (K11).
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_load_balancer_above_hides_no_service_address() {
    let mut rig = Rig::new();
    rig.world.listen("[::]:8080");
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let service = at("192.0.2.77", 8080);
    let root = File::open(rig.cgroups.path()).unwrap();
    let links = sys::attach_balancer(root.as_fd(), [192, 0, 2, 77].into(), [10, 99, 0, 2].into()).unwrap();

    let dialled = rig.app.dial(How::Tcp, service).unwrap();
    assert_eq!(rig.tunnel.accept(tunnel).original, Some(service));
    assert_eq!(dialled.peer, service);
    // Whoever is not enrolled is balanced as before.
    rig.rules(8080);
    rig.set(0, true);
    let balanced = rig.app.dial(How::Tcp, service).unwrap();
    assert_eq!(rig.rules(8080), [(Hook::Connect4, Rule::NotEnrolled)]);
    assert!(rig.tunnel.is_idle(tunnel));
    rig.app.close(balanced.handle);
    drop(links);
}
