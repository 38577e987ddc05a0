//! The second decision list, rule by rule, and who may be steered to.

use std::net::{SocketAddr, SocketAddrV6};

use adit_ebpf_common::{
    enrolment::{CgroupInfo, PodRecord, flag},
    exclusions::INBOUND as IS_DIALLED,
    listeners::{AppListenerState, ListenerKey, MAX_APP_LISTENERS},
    trace::{Hook, Rule},
};
use adit_ebpf_loader::ExclusionList;

use testbed::wait::wait_for;

use crate::rig::{
    HBONE, INBOUND, OUTBOUND, READY, Rig, add_address,
    agent::{Agent, How},
    at, empty, has_mptcp, interface_index,
};

const OPEN: u32 = flag::FAIL_OPEN;

/// Who accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gets {
    App,
    Plain,
    Hbone,
    Nobody,
}
use Gets::{App, Hbone, Nobody, Plain};

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_first_rule_that_holds_decides() {
    let mut rig = Rig::new();
    let excluded = ExclusionList::default().with_ports(IS_DIALLED, 9090..=9090);
    rig.kernel.add_exclusions(7, &excluded).unwrap();
    let app = [rig.app.listen("[::]:8080"), rig.app.listen("[::]:9090")];
    let plain = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    let hbone = rig.tunnel.listen(&format!("[::]:{HBONE}"));
    rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));

    for (flags, up, port, rule, gets) in [
        (READY, true, 8080, Rule::SteerPlain, Plain),
        // Not everything that listens is known here: the tunnel decides what becomes of it.
        (READY, true, 4444, Rule::SteerPlain, Plain),
        (READY, true, HBONE, Rule::SteerHbone, Hbone),
        (READY, true, OUTBOUND, Rule::DropReserved, Nobody),
        (READY, true, INBOUND, Rule::DropReserved, Nobody),
        (READY, true, 9090, Rule::ExcludedPort, App),
        (READY, false, 9090, Rule::ExcludedPort, App),
        (READY, false, 8080, Rule::FailClosed, Nobody),
        (READY, false, HBONE, Rule::FailClosed, Nobody),
        (flag::IN_MESH, true, 8080, Rule::FailClosed, Nobody),
        (READY | OPEN, true, 8080, Rule::SteerPlain, Plain),
        (READY | OPEN, false, 8080, Rule::FailOpen, App),
        (flag::IN_MESH | OPEN, true, 8080, Rule::FailOpen, App),
        (flag::IN_MESH | OPEN, true, OUTBOUND, Rule::DropReserved, Nobody),
    ] {
        rig.set(flags, up);
        for to in [at("10.99.0.1", port), at("fd99::1", port), at("::ffff:10.99.0.1", port)] {
            rig.rules(port);
            let case = format!("flags {flags} up {up} to {to}");
            let dialled = rig.world.dial(How::Tcp, to);
            // A SYN that is refused at first is answered, so one rule per connection.
            assert_eq!(rig.rules(port), [(Hook::SkLookup, rule)], "{case}");
            let accepted = match gets {
                Nobody => {
                    assert_eq!(dialled.unwrap_err(), libc::ECONNREFUSED, "{case}");
                    continue;
                }
                Plain => rig.tunnel.accept(plain),
                Hbone => rig.tunnel.accept(hbone),
                App => rig.app.accept(app[usize::from(port == 9090)]),
            };
            let dialled = dialled.unwrap();
            assert_eq!(canonical(accepted.local), canonical(to), "getsockname is what was dialled");
            assert_eq!(canonical(accepted.peer), canonical(dialled.local), "and getpeername the client");
            assert_eq!(accepted.original, None, "{case}");
            rig.world.close(dialled.handle);
        }
    }
}

/// A connection to a closed port is refused, as without the mesh, and not accepted by the tunnel.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_port_that_nobody_listens_on_is_refused() {
    let mut rig = Rig::new();
    let plain = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    let hbone = rig.tunnel.listen(&format!("[::]:{HBONE}"));
    let (v4, v6) = ("10.99.0.1", "fd99::1");
    let cookie = rig.cookie;
    rig.kernel.set_app_listener_state(cookie, &AppListenerState::default()).unwrap();
    let earlier = rig.app.listen("[::]:8000");
    rig.world.dial(How::Tcp, at(v4, 4444)).expect("not everything is known");
    rig.tunnel.accept(plain);
    let state = rig.kernel.app_listener_state(cookie).unwrap().unwrap();
    assert_eq!(state.count, 1, "the program counts what it records");
    let complete = AppListenerState { complete: 1, ..state };
    rig.kernel.set_app_listener_state(cookie, &complete).unwrap();

    let _others = [
        rig.app.listen("[::]:8080"),
        rig.app.listen("0.0.0.0:8081"),
        rig.app.listen("127.0.0.1:8082"),
        rig.app.listen("[::1]:8082"),
        rig.app.listen(&format!("{v4}:8083")),
        if has_mptcp() { rig.app.listen_mptcp("[::]:8084") } else { rig.app.listen("[::]:8084") },
    ];
    for (port, on_v4, on_v6) in [
        (8000, true, true),
        (8080, true, true),
        (8081, true, false),
        (8082, false, false),
        (8083, true, false),
        (8084, true, true),
        (4444, false, false),
        (HBONE, true, true),
    ] {
        for (to, listens) in [(v4, on_v4), (v6, on_v6)] {
            rig.rules(port);
            let dialled = rig.world.dial(How::Tcp, at(to, port));
            if listens {
                dialled.unwrap_or_else(|errno| panic!("{to} {port}: {errno}"));
                rig.tunnel.accept(if port == HBONE { hbone } else { plain });
            } else {
                assert_eq!(dialled.unwrap_err(), libc::ECONNREFUSED, "{to} {port}");
                assert_eq!(rig.rules(port), [(Hook::SkLookup, Rule::NotListening)], "{to} {port}");
            }
        }
    }
    // The watcher finds what has ended.
    rig.app.close(earlier);
    rig.kernel.remove_app_listener(&ListenerKey::new(cookie, 8000, false)).unwrap();
    assert_eq!(rig.world.dial(How::Tcp, at(v4, 8000)).unwrap_err(), libc::ECONNREFUSED);
    rig.app.listen("[::]:8000");
    rig.world.dial(How::Tcp, at(v4, 8000)).expect("listens again");
    rig.tunnel.accept(plain);
    // Who listens on more ports than are noted is not refused anything.
    let full = AppListenerState { count: MAX_APP_LISTENERS, complete: 1 };
    rig.kernel.set_app_listener_state(cookie, &full).unwrap();
    rig.app.listen("[::]:8085");
    for port in [8085, 4444] {
        rig.world.dial(How::Tcp, at(v4, port)).expect("not everything is known any more");
        rig.tunnel.accept(plain);
    }
    let of_others = rig.kernel.app_listeners().unwrap();
    assert!(of_others.iter().all(|key| key.netns_cookie == cookie), "who is not enrolled is not noted");
    rig.kernel.unsteer(&[rig.cookie].into()).unwrap();
    rig.app.listen("[::]:8086");
    assert_eq!(rig.kernel.app_listeners().unwrap(), [], "who has left leaves nothing");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_pod_reaches_itself() {
    let mut rig = Rig::new();
    let app = rig.app.listen("[::]:8080");
    rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    for to in ["127.0.0.1", "::1", "10.99.0.1", "fd99::1"] {
        rig.app.dial(How::Tcp, at(to, 8080)).unwrap();
        rig.app.accept(app);
    }
}

/// Link-local, of a second interface, added after the pod was enrolled: every address of the netns
/// is the pod's, also one that no map names.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn whatever_arrives_in_a_pods_netns_is_the_pods_at_any_address() {
    let mut rig = Rig::new();
    let app = rig.app.listen("[::]:8080");
    let plain = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    for address in ["10.99.0.11", "fd99::11", "fe80::11"] {
        add_address(&rig.app, address);
    }
    add_address(&rig.world, "fe80::22");
    let scope = interface_index(&rig.world);
    let link_local = |port| SocketAddrV6::new("fe80::11".parse().unwrap(), port, 0, scope).into();
    rig.kernel.remove_pod(crate::rig::address("10.99.0.1")).unwrap();
    let others = ["10.99.0.1", "10.99.0.11", "fd99::11"].map(|ip| at(ip, 8080));
    for to in others.into_iter().chain([link_local(8080)]) {
        rig.rules(8080);
        rig.world.dial(How::Tcp, to).unwrap_or_else(|errno| panic!("{to}: {errno}"));
        assert_eq!(rig.rules(8080), [(Hook::SkLookup, Rule::SteerPlain)], "{to}");
        rig.tunnel.accept(plain);
    }
    for port in [OUTBOUND, INBOUND] {
        rig.world.dial(How::Tcp, link_local(port)).unwrap_err();
        assert_eq!(rig.rules(port), [(Hook::SkLookup, Rule::DropReserved)]);
    }
    rig.set(flag::IN_MESH, true);
    for to in others.into_iter().chain([link_local(8080)]) {
        assert_eq!(rig.world.dial(How::Tcp, to).unwrap_err(), libc::ECONNREFUSED, "{to}");
        assert_eq!(rig.rules(8080), [(Hook::SkLookup, Rule::FailClosed)], "{to}");
    }
    assert!(rig.app.is_idle(app));
}

/// The program is there and the map says nothing: nobody knows what the pod's policy is.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_netns_that_no_pod_is_known_to_have_is_closed_while_it_is_steered() {
    let mut rig = Rig::new();
    let app = rig.app.listen("[::]:8080");
    rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    rig.kernel.remove_netns(rig.cookie).unwrap();
    for to in [at("10.99.0.1", 8080), at("fd99::1", 8080), at("10.99.0.1", HBONE)] {
        assert_eq!(rig.world.dial(How::Tcp, to).unwrap_err(), libc::ECONNREFUSED, "{to}");
        assert_eq!(rig.rules(to.port()), [(Hook::SkLookup, Rule::UnknownNetns)], "{to}");
    }
    rig.app.dial(How::Tcp, at("10.99.0.1", 8080)).unwrap();
    rig.app.accept(app);
    rig.rules(8080);
    rig.kernel.unsteer(&[rig.cookie].into()).unwrap();
    rig.world.dial(How::Tcp, at("fd99::1", 8080)).unwrap();
    rig.app.accept(app);
    assert_eq!(rig.rules(8080), [], "nothing decides any more");
}

/// Two netns with the same address: each copy of the program knows its own, whoever claims it.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_neighbour_that_takes_the_pods_addresses_gets_nothing() {
    let mut rig = Rig::new();
    let plain = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    let mut neighbour = Agent::start();
    neighbour.enter_cgroup(&rig.cgroups.join("pods/plain"));
    neighbour.new_netns();
    let cookie = neighbour.cookie();
    let mut other_tunnel = Agent::start();
    other_tunnel.enter_cgroup(&rig.cgroups.join("tunnel"));
    other_tunnel.enter_netns_of(&neighbour);
    let steal = other_tunnel.listen(&format!("[::]:{INBOUND}"));
    let record = PodRecord { netns_cookie: cookie, flags: READY, device: 2 };
    for ip in ["10.99.0.1", "fd99::1"] {
        rig.kernel.set_pod(crate::rig::address(ip), &record).unwrap();
        rig.world.dial(How::Tcp, at(ip, 8080)).unwrap();
        rig.tunnel.accept(plain);
    }
    assert!(other_tunnel.is_idle(steal));
}

/// The tunnel dials the application from the pod's netns as the client, so neither address nor
/// netns tell.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_tunnel_reaches_the_application_and_only_from_the_pods_own_netns() {
    let mut rig = Rig::new();
    let app = rig.app.listen("[::]:8080");
    let plain = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    for (client, to) in [("127.0.0.1", "10.99.0.1"), ("::1", "fd99::1")] {
        // From the pod's own address it would pass anyway.
        let dialled = rig.tunnel.dial_from(at(client, 0), at(to, 8080)).unwrap();
        rig.app.accept(app);
        rig.tunnel.close(dialled.handle);
    }
    // A tunnel's socket of another netns: the pod's inbound policy must see it.
    let mut other = Agent::start();
    other.enter_cgroup(&rig.cgroups.join("tunnel"));
    other.enter_netns_of(&rig.world);
    rig.rules(8080);
    other.dial(How::Tcp, at("10.99.0.1", 8080)).unwrap();
    rig.tunnel.accept(plain);
    assert_eq!(rig.rules(8080), [(Hook::SkLookup, Rule::SteerPlain)]);
}

/// With SYN cookies the kernel remembers nothing of the SYN, and looks the listener up once more
/// for the ACK.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn syn_cookies_change_nothing() {
    let mut rig = Rig::new();
    rig.app.sysctl("ipv4/tcp_syncookies", "2");
    let app = rig.app.listen("[::]:8080");
    let plain = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    let outbound = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    for (own, other) in [("10.99.0.1", "192.0.2.1"), ("fd99::1", "2001:db8::1")] {
        let dialled = rig.world.dial(How::Tcp, at(own, 8080)).unwrap();
        let accepted = rig.tunnel.accept(plain);
        assert_eq!(canonical(accepted.local), at(own, 8080));
        assert_eq!(canonical(accepted.peer), dialled.local);
        // The tunnel's own flow passes twice.
        let loopback = if own.contains(':') { "::1" } else { "127.0.0.1" };
        rig.tunnel.dial_from(at(loopback, 0), at(own, 8080)).unwrap();
        rig.app.accept(app);
        // And what is redirected is still known when it is accepted.
        rig.app.dial(How::Tcp, at(other, 80)).unwrap();
        assert_eq!(rig.tunnel.accept(outbound).original, Some(at(other, 80)));
    }
}

/// A pod that listens on the tunnel's port itself is not taken for the tunnel.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_listener_of_another_cgroup_is_not_steered_to() {
    let mut rig = Rig::new();
    let impostor = rig.app.listen(&format!("[::]:{INBOUND}"));
    assert_eq!(rig.world.dial(How::Tcp, at("10.99.0.1", 8080)).unwrap_err(), libc::ECONNREFUSED);
    assert_eq!(rig.rules(8080), [(Hook::SkLookup, Rule::FailClosed)]);
    assert!(rig.app.is_idle(impostor));
}

/// One listener for both families, or one for each; the latest serves, and none is not a hang.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn listeners_come_and_go() {
    let mut rig = Rig::new();
    let app = rig.app.listen("[::]:8080");
    let (v4, v6) = (at("10.99.0.1", 8080), at("fd99::1", 8080));
    let first = rig.tunnel.listen(&format!("0.0.0.0:{INBOUND}"));
    rig.world.dial(How::Tcp, v4).unwrap();
    rig.tunnel.accept(first);
    assert_eq!(rig.world.dial(How::Tcp, v6).unwrap_err(), libc::ECONNREFUSED, "no listener of this family");

    let second = rig.tunnel.listen(&format!("[fd99::1]:{INBOUND}"));
    rig.world.dial(How::Tcp, v6).unwrap();
    rig.tunnel.accept(second);
    rig.world.dial(How::Tcp, v4).unwrap();
    rig.tunnel.accept(first);

    rig.tunnel.close(first);
    rig.tunnel.close(second);
    wait_for("closed listeners are forgotten", || {
        rig.world.dial(How::Tcp, v4).is_err_and(|errno| errno == libc::ECONNREFUSED)
    });
    rig.set(READY | OPEN, true);
    rig.world.dial(How::Tcp, v4).unwrap();
    rig.app.accept(app);

    let third = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    rig.world.dial(How::Tcp, v4).unwrap();
    rig.tunnel.accept(third);
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Its netns is known to nobody, so no program is attached there; its cgroup is closed since it was
/// made.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn what_arrives_for_a_closed_pod_of_no_known_netns_waits() {
    let mut rig = Rig::new();
    let pods = rig.cgroups.join("pods");
    rig.kernel.unsteer(&[rig.cookie].into()).unwrap();
    let id = rig.cgroups.id("pods/mesh");
    let closed = CgroupInfo { flags: flag::IN_MESH, ..empty() };
    rig.kernel.set_cgroup(id, &closed).unwrap();
    let listener = rig.app.listen("[::]:8080");
    rig.kernel.drop_unknown_arrivals(&pods, true).unwrap();
    for (own, loopback) in [("10.99.0.1", "127.0.0.1"), ("fd99::1", "::1")] {
        rig.kernel.set_cgroup(id, &closed).unwrap();
        // Somebody else in the netns, since a closed pod does not know its own address yet.
        for itself in [own, loopback] {
            let end = rig.tunnel.dial(How::Tcp, at(itself, 8080)).unwrap();
            rig.app.accept(listener);
            rig.tunnel.close(end.handle);
        }
        let waiting = rig.world.begin(at(own, 8080)).unwrap();
        assert!(rig.app.is_idle(listener), "reached at {own}");
        // What may be reached is: an open pod, one whose netns is known, one of no entry.
        let open = CgroupInfo { flags: flag::IN_MESH | flag::FAIL_OPEN, ..empty() };
        let known = CgroupInfo { netns_cookie: rig.cookie, ..closed };
        for info in [Some(open), Some(known), None] {
            match &info {
                Some(info) => rig.kernel.set_cgroup(id, info).unwrap(),
                None => rig.kernel.remove_cgroup(id).unwrap(),
            }
            let end = rig.world.dial(How::Tcp, at(own, 8080)).unwrap();
            rig.world.close(end.handle);
            rig.app.accept(listener);
        }
        // The one that waited repeats itself.
        rig.app.accept(listener);
        rig.world.close(waiting);
    }
    rig.kernel.set_cgroup(id, &closed).unwrap();
    rig.kernel.drop_unknown_arrivals(&pods, false).unwrap();
    rig.world.dial(How::Tcp, at("10.99.0.1", 8080)).unwrap();
}
