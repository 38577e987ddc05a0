//! Both lists, rule by rule, over plain values.
//!
//! * this file: what pods connect to
//! * `arrivals`: what arrives at them
//! * `lists`: what lists and guards leave outside

mod arrivals;
mod lists;

use super::{Arrival, Connect, Inbound, Outbound, inbound, outbound, plain::PlainFacts};
use crate::{
    address::{Address, UNSPECIFIED, mapped},
    enrolment::{
        CgroupInfo, NetnsInfo, PodRecord,
        flag::{
            DNS_CAPTURE, EXCLUDES_DEVICES, FAIL_OPEN, GUARDED, GUARDS_IDS, IN_MESH, READY, SIDECAR, SPREAD,
            TUNNEL,
        },
    },
    exclusions::{
        CidrPrefix, DEVICE as INTERFACE, GROUP, INBOUND, Listed, MAPPED_BITS, OUTBOUND, PortPrefix, USER,
    },
    flows::{Destination, Flow},
    redirect_ports::redirect_port,
    settings::Settings,
    trace::Rule,
};

const COOKIE: u64 = 9;
/// The number of the pod's first interface.
const DEVICE: u32 = 2;
const OWN: Address = mapped([10, 0, 0, 1]);
/// A second address of the same family.
const OWN_TOO: Address = mapped([10, 0, 0, 2]);
const OTHER: Address = mapped([10, 0, 0, 7]);
const OWN_V6: Address = v6(1);
const OTHER_V6: Address = v6(7);
const LINK_LOCAL: Address = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const LINK_LOCAL_TOO: Address = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const LOOPBACK: Address = mapped([127, 0, 0, 2]);
const RESOLVER: Address = mapped([10, 96, 0, 10]);

const fn v6(last: u8) -> Address {
    [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]
}

/// A pod with two IPv4 addresses and one of IPv6, whose tunnel listens everywhere.
fn facts(flags: u32) -> PlainFacts {
    let mut facts = PlainFacts::new(Settings {
        outbound_port: 15001,
        inbound_port: 15006,
        hbone_port: 15008,
        tunnel_up: 1,
        debug: 0,
        debug_port: 0,
        debug_address: UNSPECIFIED,
        resolvers: [RESOLVER, OWN_TOO, UNSPECIFIED],
        dns_port: 15053,
        trace_filter: 0,
    });
    facts.caller = Some(CgroupInfo {
        v4: OWN,
        v6: OWN_V6,
        netns_cookie: COOKIE,
        flags,
        detected: 0,
        exclusion_id: 3,
        redirect_port: 15001,
        pad: 0,
    });
    facts.socket_netns = COOKIE;
    facts.netns = Some(NetnsInfo { cgroup_id: 1, flags, exclusion_id: 3 });
    facts.owners.extend([OWN, OWN_V6].map(|address| (address, owned(COOKIE, DEVICE))));
    facts.owners.insert(OWN_TOO, owned(COOKIE, DEVICE + 1));
    facts.owners.insert(OTHER_V6, owned(COOKIE + 1, DEVICE));
    let port = |direction, first| PortPrefix { direction, first, length: 16 };
    facts.listed_ports.extend([
        (3, port(OUTBOUND, 6379), Listed::EXCLUDED),
        (3, port(INBOUND, 9090), Listed::EXCLUDED),
        (4, port(OUTBOUND, 80), Listed::EXCLUDED),
    ]);
    let private = CidrPrefix { is_v4: true, first: mapped([192, 168, 0, 0]), length: MAPPED_BITS + 16 };
    let all_v6 = CidrPrefix { is_v4: false, first: UNSPECIFIED, length: 0 };
    facts.listed_cidrs.extend([(3, private, Listed::EXCLUDED), (4, all_v6, Listed::EXCLUDED)]);
    for port in [15001, 15006, 15008] {
        facts.tunnel_listeners.insert((COOKIE, port, 6));
    }
    facts.tunnel_listeners.extend([(COOKIE, 15053, 4), (COOKIE, 15053, 6)]);
    facts.app_listeners.extend([(COOKIE, 80, 6), (COOKIE, 81, 4)]);
    facts.complete.insert(COOKIE);
    facts
}

const fn owned(netns_cookie: u64, device: u32) -> PodRecord {
    PodRecord { netns_cookie, flags: 0, device }
}

fn tcp(address: Address, port: u16) -> Connect {
    Connect { is_tcp: true, is_udp: false, destination: Destination::new(address, port) }
}

fn verdict(facts: &PlainFacts, address: Address, port: u16) -> Outbound {
    outbound(facts, &tcp(address, port))
}

#[test]
fn the_first_outbound_rule_that_applies_wins() {
    let ready = IN_MESH | READY;
    for (flags, address, port, expected) in [
        (ready, LOOPBACK, 80, Outbound::Leave(Rule::Loopback)),
        (ready, UNSPECIFIED, 80, Outbound::Leave(Rule::Loopback)),
        (ready, mapped([0; 4]), 80, Outbound::Leave(Rule::Loopback)),
        (ready, LOOPBACK, 15001, Outbound::Refuse(Rule::DropReserved)),
        (IN_MESH, LOOPBACK, 15001, Outbound::Leave(Rule::Loopback)),
        (TUNNEL, OTHER, 80, Outbound::Leave(Rule::Tunnel)),
        (READY, OTHER, 80, Outbound::Leave(Rule::NotEnrolled)),
        (ready | SIDECAR, OTHER, 80, Outbound::Leave(Rule::NotEnrolled)),
        (ready, OWN, 80, Outbound::Leave(Rule::OwnAddress)),
        (ready, OWN_TOO, 80, Outbound::Leave(Rule::OwnAddress)),
        (ready, OWN_V6, 80, Outbound::Leave(Rule::OwnAddress)),
        (ready, OWN_TOO, 15008, Outbound::Refuse(Rule::DropReserved)),
        (IN_MESH, OWN_TOO, 15008, Outbound::Leave(Rule::OwnAddress)),
        (ready, OTHER, 6379, Outbound::Leave(Rule::ExcludedPort)),
        (ready, mapped([192, 168, 9, 9]), 80, Outbound::Leave(Rule::ExcludedCidr)),
        (IN_MESH, mapped([192, 168, 9, 9]), 80, Outbound::Leave(Rule::ExcludedCidr)),
        (IN_MESH, OTHER, 80, Outbound::Refuse(Rule::FailClosed)),
        (IN_MESH | FAIL_OPEN, OTHER, 80, Outbound::Leave(Rule::FailOpen)),
        (ready, OTHER, 80, Outbound::Redirect(Rule::Redirect, Destination::new(OWN, 15001))),
        (ready, OTHER, 15001, Outbound::Redirect(Rule::Redirect, Destination::new(OWN, 15001))),
        (ready, LINK_LOCAL, 80, Outbound::Leave(Rule::LinkLocal)),
        (IN_MESH, LINK_LOCAL, 80, Outbound::Refuse(Rule::FailClosed)),
        (ready, LINK_LOCAL, 6379, Outbound::Leave(Rule::ExcludedPort)),
        (ready, OTHER_V6, 80, Outbound::Redirect(Rule::Redirect, Destination::new(OWN_V6, 15001))),
    ] {
        assert_eq!(verdict(&facts(flags), address, port), expected, "{flags} {address:?} {port}");
    }
}

#[test]
fn each_missing_fact_has_its_rule() {
    let changed = |change: fn(&mut PlainFacts), address| {
        let mut facts = facts(IN_MESH | READY);
        change(&mut facts);
        verdict(&facts, address, 80).rule()
    };
    assert_eq!(changed(|facts| facts.caller = None, OTHER), Rule::NoEntry);
    assert_eq!(changed(|facts| facts.caller = None, LOOPBACK), Rule::Loopback);
    let unknown = |facts: &mut PlainFacts| (facts.caller, facts.netns) = (None, None);
    assert_eq!(changed(unknown, OTHER), Rule::NotEnrolled);
    for (flags, rule) in [
        (FAIL_OPEN, Rule::NotEnrolled),
        (IN_MESH | FAIL_OPEN, Rule::FailOpen),
        (IN_MESH | READY | SIDECAR, Rule::NotEnrolled),
    ] {
        let mut facts = facts(IN_MESH | READY);
        facts.caller = None;
        facts.netns.as_mut().unwrap().flags = flags;
        assert_eq!(verdict(&facts, OTHER, 80).rule(), rule, "{flags}");
    }
    assert_eq!(changed(|facts| facts.settings.tunnel_up = 0, OTHER), Rule::FailClosed);
    assert_eq!(changed(|facts| facts.tunnel_listeners.clear(), OTHER), Rule::FailClosed);
    assert_eq!(changed(|facts| facts.can_record = false, OTHER), Rule::NotRecorded);
    assert_eq!(
        changed(|facts| facts.owners.clear(), OWN),
        Rule::OwnAddress,
        "its record comes a moment later"
    );
    let without_v6 = |facts: &mut PlainFacts| facts.caller.as_mut().unwrap().v6 = UNSPECIFIED;
    assert_eq!(changed(without_v6, OTHER_V6), Rule::NoAddress);
    assert_eq!(changed(without_v6, OTHER), Rule::Redirect);
    let udp = Connect { is_tcp: false, is_udp: true, destination: Destination::new(OTHER, 80) };
    assert_eq!(outbound(&facts(IN_MESH | READY), &udp), Outbound::Leave(Rule::NotTcp));
}

#[test]
fn redirects_are_spread_where_all_programs_know_it() {
    let mut facts = facts(IN_MESH | READY | SPREAD);
    for (to, own) in [(OTHER, OWN), (OTHER_V6, OWN_V6)] {
        for source_port in [0, 40000] {
            facts.source_port = source_port;
            let port = redirect_port(&Destination::new(to, 80), source_port);
            let expected = Outbound::Redirect(Rule::Redirect, Destination::new(own, port));
            assert_eq!(verdict(&facts, to, 80), expected);
        }
    }
    facts.tunnel_listeners.remove(&(COOKIE, 15001, 6));
    assert_eq!(verdict(&facts, OTHER, 80).rule(), Rule::FailClosed);
}

#[test]
fn a_socket_that_is_bound_to_an_address_of_the_pod_is_redirected_to_that_one() {
    let mut facts = facts(IN_MESH | READY);
    let redirected = |to| Outbound::Redirect(Rule::Redirect, Destination::new(to, 15001));
    for (source, expected) in [
        (UNSPECIFIED, redirected(OWN)),
        (mapped([0; 4]), redirected(OWN)),
        (OWN, redirected(OWN)),
        (OWN_TOO, redirected(OWN_TOO)),
        (RESOLVER, Outbound::Refuse(Rule::NoAddress)),
        (LOOPBACK, Outbound::Refuse(Rule::NoAddress)),
    ] {
        facts.source = source;
        assert_eq!(verdict(&facts, OTHER, 80), expected, "{source:?}");
    }
    facts.owners.insert(RESOLVER, owned(COOKIE + 1, DEVICE));
    facts.source = RESOLVER;
    assert_eq!(verdict(&facts, OTHER, 80), Outbound::Refuse(Rule::NoAddress), "another pod's");
    facts.owners.clear();
    facts.source = OWN;
    assert_eq!(verdict(&facts, OTHER, 80), redirected(OWN), "its record comes a moment later");
}

#[test]
fn a_socket_that_is_bound_to_an_interface_is_redirected_to_an_address_of_that() {
    let mut facts = facts(IN_MESH | READY);
    let redirected = |to| Outbound::Redirect(Rule::Redirect, Destination::new(to, 15001));
    let refused = Outbound::Refuse(Rule::NoAddress);
    for (device, source, expected) in [
        (DEVICE, UNSPECIFIED, redirected(OWN)),
        (DEVICE, OWN, redirected(OWN)),
        (DEVICE, OWN_TOO, refused),
        (DEVICE + 1, UNSPECIFIED, refused),
        (DEVICE + 1, OWN, refused),
        (DEVICE + 1, OWN_TOO, redirected(OWN_TOO)),
        (DEVICE + 2, UNSPECIFIED, refused),
    ] {
        (facts.device, facts.source) = (device, source);
        assert_eq!(verdict(&facts, OTHER, 80), expected, "{device} {source:?}");
    }
}

#[test]
fn the_sockets_netns_says_whose_a_connection_is() {
    let ready = IN_MESH | READY;
    let entry = |flags| facts(flags).caller;
    let asked = |caller: Option<CgroupInfo>, netns_pod, elsewhere: bool| {
        let mut facts = facts(ready);
        (facts.caller, facts.netns_pod) = (caller, netns_pod);
        facts.socket_netns += u64::from(elsewhere);
        verdict(&facts, OTHER, 80).rule()
    };
    assert_eq!(asked(entry(ready), None, true), Rule::OtherNetns, "a netns of its own");
    assert_eq!(asked(None, entry(ready), false), Rule::Redirect, "in the netns, in no pod's cgroup");
    assert_eq!(asked(None, entry(IN_MESH), false), Rule::FailClosed);
    let of_neighbour = entry(ready).map(|info| CgroupInfo { netns_cookie: COOKIE + 1, ..info });
    assert_eq!(asked(of_neighbour, entry(IN_MESH), false), Rule::FailClosed, "in the neighbour's netns");
    assert_eq!(asked(entry(TUNNEL), entry(ready), false), Rule::Tunnel);
    let of_no_netns = entry(IN_MESH).map(|info| CgroupInfo { netns_cookie: 0, ..info });
    assert_eq!(asked(of_no_netns, None, true), Rule::FailClosed, "closed before its netns is known");
    let query = |elsewhere: bool| {
        let mut facts = facts(ready | DNS_CAPTURE);
        facts.socket_netns += u64::from(elsewhere);
        verdict(&facts, RESOLVER, 53).rule()
    };
    assert_eq!((query(false), query(true)), (Rule::DnsRedirect, Rule::OtherNetns));
}

#[test]
fn a_query_is_captured_only_where_the_tunnel_answers_for_that_resolver() {
    let captured = Outbound::Redirect(Rule::DnsRedirect, Destination::new(super::LOOPBACK_V4, 15053));
    let query = |facts: &PlainFacts, address| {
        let udp = Connect { is_tcp: false, is_udp: true, destination: Destination::new(address, 53) };
        (verdict(facts, address, 53), outbound(facts, &udp))
    };
    let capturing = facts(IN_MESH | READY | DNS_CAPTURE);
    assert_eq!(query(&capturing, RESOLVER), (captured, captured));
    assert_eq!(verdict(&capturing, RESOLVER, 54).rule(), Rule::Redirect);
    for (address, why, rule) in [
        (mapped([10, 96, 0, 11]), "another resolver", Rule::Redirect),
        (OWN_TOO, "named, but the pod's own", Rule::OwnAddress),
        (OWN, "the pod's own", Rule::OwnAddress),
        (LOOPBACK, "on the loopback", Rule::Loopback),
        (mapped([192, 168, 0, 10]), "excluded", Rule::ExcludedCidr),
    ] {
        let (tcp, udp) = query(&capturing, address);
        assert_eq!((tcp.rule(), udp.rule()), (rule, Rule::NotTcp), "{why}");
    }
    let changed = |change: fn(&mut PlainFacts)| {
        let mut facts = capturing.clone();
        change(&mut facts);
        verdict(&facts, RESOLVER, 53).rule()
    };
    assert_eq!(changed(|facts| facts.settings.resolvers[0] = UNSPECIFIED), Rule::DnsRedirect);
    assert_eq!(changed(|facts| facts.device = DEVICE), Rule::Redirect);
    assert_eq!(changed(|facts| facts.settings.tunnel_up = 0), Rule::FailClosed);
    assert_eq!(changed(|facts| facts.caller = None), Rule::NoEntry);
    assert_eq!(changed(|facts| facts.can_record = false), Rule::NotRecorded);
    let no_dns = |facts: &mut PlainFacts| facts.tunnel_listeners.retain(|(_, port, _)| *port != 15053);
    assert_eq!(changed(no_dns), Rule::Redirect, "the tunnel has no DNS listener yet");
}
