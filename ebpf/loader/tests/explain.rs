//! What the loader says about a connection, against what the programs do: both read the same maps.

use adit_ebpf_common::{
    enrolment::{PodRecord, flag},
    flows::Destination,
    trace::{Hook, Rule},
};

use crate::rig::{DNS, INBOUND, OUTBOUND, READY, Rig, add_address, address, agent::How, at};

const CAPTURED: u32 = READY | flag::DNS_CAPTURE;

/// Dials, and returns the rule that the program applied and the one that the loader names.
fn both(rig: &mut Rig, to: &str, port: u16) -> (Rule, Rule) {
    rig.rules(port);
    if let Ok(end) = rig.app.dial(How::Tcp, at(to, port)) {
        rig.app.close(end.handle);
    }
    let rules = rig.rules(port);
    let connect = rules.iter().find(|(hook, _)| *hook != Hook::SkLookup).expect("a rule");
    let explained = rig
        .kernel
        .explain_connect(
            Some(rig.cgroups.id("pods/mesh")),
            None,
            [None; 2],
            Destination::new(address(to), port),
        )
        .unwrap();
    (connect.1, explained)
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_second_address_of_a_family_is_the_pods_own() {
    let mut rig = Rig::new();
    rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    rig.app.listen("[::]:8080");
    for second in ["10.99.0.11", "fd99::11"] {
        add_address(&rig.app, second);
        assert_eq!(both(&mut rig, second, 8080), (Rule::Redirect, Rule::Redirect), "no record yet");
        let record = PodRecord { netns_cookie: rig.cookie, flags: READY, device: 2 };
        rig.kernel.set_pod(address(second), &record).unwrap();
        assert_eq!(both(&mut rig, second, 8080), (Rule::OwnAddress, Rule::OwnAddress));
        assert_eq!(both(&mut rig, second, INBOUND), (Rule::DropReserved, Rule::DropReserved));
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_resolver_on_the_pods_own_address_is_left_alone() {
    let mut rig = Rig::new();
    rig.set(CAPTURED, true);
    rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    rig.tunnel.listen(&format!("127.0.0.1:{DNS}"));
    let resolver = rig.app.bind_udp("10.99.0.1:53");
    rig.app.listen("10.99.0.1:53");
    assert_eq!(both(&mut rig, "10.99.0.1", 53), (Rule::OwnAddress, Rule::OwnAddress));
    assert_eq!(both(&mut rig, "10.99.0.2", 53), (Rule::DnsRedirect, Rule::DnsRedirect));
    let socket = rig.app.bind_udp("0.0.0.0:0");
    rig.app.send(socket, Some(at("10.99.0.1", 53)), "own");
    assert_eq!(rig.app.receive(resolver).1, "own");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn without_a_dns_listener_a_query_goes_as_any_connection() {
    let mut rig = Rig::new();
    rig.set(CAPTURED, true);
    assert_eq!(both(&mut rig, "10.99.0.2", 53), (Rule::FailClosed, Rule::FailClosed));
    rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    assert_eq!(both(&mut rig, "10.99.0.2", 53), (Rule::Redirect, Rule::Redirect));
    rig.tunnel.listen(&format!("127.0.0.1:{DNS}"));
    assert_eq!(both(&mut rig, "10.99.0.2", 53), (Rule::DnsRedirect, Rule::DnsRedirect));
    assert_eq!(both(&mut rig, "fd99::2", 53), (Rule::Redirect, Rule::Redirect), "it listens on IPv4 only");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn an_arrival_is_explained_from_the_maps() {
    let mut rig = Rig::new();
    let explained = |rig: &Rig, to: &str, port: u16| {
        rig.kernel
            .explain_arrival(rig.cookie, address("10.99.0.2"), Destination::new(address(to), port))
            .unwrap()
    };
    assert_eq!(explained(&rig, "10.99.0.1", 80), Rule::FailClosed, "the tunnel does not listen");
    rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    for (to, port) in [("10.99.0.1", 80), ("10.99.0.1", INBOUND)] {
        rig.rules(port);
        let _ = rig.world.dial(How::Tcp, at(to, port));
        assert_eq!(rig.rules(port)[0].1, explained(&rig, to, port), "{to} {port}");
    }
    for any in ["10.99.0.9", "fe80::1"] {
        assert_eq!(explained(&rig, any, 80), Rule::SteerPlain, "whatever address is added to the netns");
    }
    let to = Destination::new(address("10.99.0.1"), 80);
    let unknown = rig.kernel.explain_arrival(1, address("10.99.0.2"), to).unwrap();
    assert_eq!(unknown, Rule::UnknownNetns);
}
