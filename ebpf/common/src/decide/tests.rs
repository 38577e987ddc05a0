//! Both lists, rule by rule, over plain values.

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

/// Where anything is included, the rest stays outside; what is excluded stays there in any case.
#[test]
fn inclusion_lists_leave_the_rest_outside_and_exclusion_beats_them() {
    let cidr = |first, bits, listed| {
        (3, CidrPrefix { is_v4: true, first: mapped(first), length: MAPPED_BITS + bits }, listed)
    };
    let port = |direction, first, length, listed| (3, PortPrefix { direction, first, length }, listed);
    let mut facts = facts(IN_MESH | READY | DNS_CAPTURE);
    facts.listed_cidrs.extend([
        cidr([0; 4], 0, Listed::OUTSIDE),
        cidr([10, 0, 0, 0], 8, Listed::INCLUDED),
        cidr([10, 9, 0, 0], 16, Listed::EXCLUDED),
    ]);
    facts.listed_ports.extend([
        port(OUTBOUND, 443, 16, Listed::INCLUDED),
        port(INBOUND, 0, 0, Listed::OUTSIDE),
        port(INBOUND, 80, 16, Listed::INCLUDED),
    ]);
    for (to, to_port, rule) in [
        ([10, 1, 1, 1], 80, Rule::Redirect),
        ([10, 9, 1, 1], 80, Rule::ExcludedCidr),
        ([10, 9, 1, 1], 443, Rule::ExcludedCidr),
        ([10, 1, 1, 1], 6379, Rule::ExcludedPort),
        ([8, 8, 8, 8], 80, Rule::NotIncluded),
        ([8, 8, 8, 8], 443, Rule::Redirect),
        ([192, 168, 1, 1], 443, Rule::ExcludedCidr),
        ([8, 8, 8, 8], 53, Rule::NotIncluded),
    ] {
        assert_eq!(verdict(&facts, mapped(to), to_port).rule(), rule, "{to:?}:{to_port}");
    }
    for (to_port, rule) in [
        (80, Rule::SteerPlain),
        (81, Rule::NotIncluded),
        (9090, Rule::ExcludedPort),
        (15006, Rule::DropReserved),
    ] {
        let flow = Flow { local: OTHER, remote: OWN, local_port: 40000, remote_port: to_port };
        assert_eq!(inbound(&facts, &Arrival { flow, is_v4: true }).rule(), rule, "{to_port}");
    }
}

/// A socket that is bound to an interface does not take a route out of another one.
#[test]
fn a_range_by_route_is_excluded_for_sockets_that_take_the_route() {
    let mut facts = facts(IN_MESH | READY | EXCLUDES_DEVICES);
    let net = CidrPrefix { is_v4: true, first: mapped([10, 7, 0, 0]), length: MAPPED_BITS + 16 };
    facts.listed_cidrs.push((3, net, Listed::BY_ROUTE));
    facts.excluded_ids.insert((3, INTERFACE, DEVICE + 1));
    for (device, rule) in
        [(0, Rule::ExcludedCidr), (DEVICE + 1, Rule::ExcludedDevice), (DEVICE, Rule::Redirect)]
    {
        facts.device = device;
        assert_eq!(verdict(&facts, mapped([10, 7, 1, 1]), 80).rule(), rule, "{device}");
    }
    assert_eq!(Listed::of_value(Listed::BY_ROUTE.value()), Listed::BY_ROUTE);
    assert_eq!(Listed::of_value(Listed::BY_ROUTE.value() + 1), Listed::NO);
}

#[test]
fn the_first_inbound_rule_that_applies_wins() {
    let ready = IN_MESH | READY;
    for (flags, from, to, port, expected) in [
        (ready, LOOPBACK, OWN, 80, Inbound::Pass(Rule::SameHost)),
        (ready, OWN, OWN, 15001, Inbound::Pass(Rule::SameHost)),
        (ready, OTHER, RESOLVER, 80, Inbound::Pass(Rule::SteerPlain)),
        (ready, LINK_LOCAL, LINK_LOCAL_TOO, 80, Inbound::Pass(Rule::SteerPlain)),
        (ready, LINK_LOCAL, LINK_LOCAL_TOO, 15006, Inbound::Drop(Rule::DropReserved)),
        (IN_MESH, OTHER, RESOLVER, 80, Inbound::Drop(Rule::FailClosed)),
        (ready, OTHER, OWN, 15001, Inbound::Drop(Rule::DropReserved)),
        (ready, OTHER, OWN, 15006, Inbound::Drop(Rule::DropReserved)),
        (IN_MESH, OTHER, OWN, 9090, Inbound::Pass(Rule::ExcludedPort)),
        (IN_MESH, OTHER, OWN, 80, Inbound::Drop(Rule::FailClosed)),
        (IN_MESH | FAIL_OPEN, OTHER, OWN, 80, Inbound::Pass(Rule::FailOpen)),
        (ready, OTHER, OWN, 15008, Inbound::Pass(Rule::SteerHbone)),
        (ready, OTHER, OWN_TOO, 80, Inbound::Pass(Rule::SteerPlain)),
        (ready, OTHER, OWN, 81, Inbound::Pass(Rule::SteerPlain)),
        (ready, OTHER_V6, OWN_V6, 80, Inbound::Pass(Rule::SteerPlain)),
        (ready, OTHER_V6, OWN_V6, 81, Inbound::Drop(Rule::NotListening)),
        (ready, OTHER, OWN, 82, Inbound::Drop(Rule::NotListening)),
    ] {
        assert_eq!(arrives(&facts(flags), from, to, port), expected, "{flags} {from:?} {to:?} {port}");
    }
}

#[test]
fn what_arrives_in_a_netns_of_no_pod_is_dropped_unless_it_comes_from_there() {
    let mut facts = facts(IN_MESH | READY);
    facts.netns = None;
    for port in [80, 9090, 15008] {
        assert_eq!(arrives(&facts, OTHER, OWN, port), Inbound::Drop(Rule::UnknownNetns));
    }
    assert_eq!(arrives(&facts, LOOPBACK, OWN, 80), Inbound::Pass(Rule::SameHost));
}

#[test]
fn what_connect_redirected_goes_to_the_outbound_listener_or_nowhere() {
    let mut facts = facts(IN_MESH | READY | FAIL_OPEN);
    for port in [600, 15001] {
        facts.redirected = [flow(OWN, OWN, port), flow(OTHER, OWN, port)].into();
        assert_eq!(arrives(&facts, OWN, OWN, port), Inbound::Pass(Rule::SteerOutbound));
        assert_eq!(arrives(&facts, OWN_TOO, OWN_TOO, port), Inbound::Pass(Rule::SameHost));
        assert_ne!(arrives(&facts, OTHER, OWN, port).rule(), Rule::SteerOutbound, "from outside");
    }
    facts.tunnel_listeners.clear();
    assert_eq!(arrives(&facts, OWN, OWN, 15001), Inbound::Drop(Rule::ListenerGone));
}

#[test]
fn an_arrival_that_is_not_steered_follows_the_fail_mode() {
    let mut facts = facts(IN_MESH | READY);
    facts.complete.clear();
    assert_eq!(arrives(&facts, OTHER, OWN, 82).rule(), Rule::SteerPlain, "not every listener is known");
    facts.tunnel_listeners.remove(&(COOKIE, 15006, 6));
    assert_eq!(arrives(&facts, OTHER, OWN, 80).rule(), Rule::FailClosed);
    assert_eq!(arrives(&facts, OTHER, OWN, 15008).rule(), Rule::SteerHbone);
    let flow = flow(OTHER, OWN, 80);
    facts.tunnel_flows.push((flow, COOKIE));
    assert_eq!(arrives(&facts, OTHER, OWN, 80).rule(), Rule::NotedFlow);
    facts.tunnel_flows[0].1 = COOKIE + 1;
    assert_eq!(arrives(&facts, OTHER, OWN, 80).rule(), Rule::FailClosed, "opened from another netns");
}

#[test]
fn what_the_kubelet_opens_passes_without_a_tunnel_too_but_not_as_hbone_and_not_to_reserved_ports() {
    for flags in [IN_MESH, IN_MESH | READY] {
        let mut facts = facts(flags);
        facts.kubelet_flows = [80, 82, 15001, 15006, 15008].map(|port| flow(OTHER, OWN, port)).into();
        // Also where nobody listens: the kernel refuses it as without a mesh.
        for port in [80, 82] {
            assert_eq!(arrives(&facts, OTHER, OWN, port), Inbound::Pass(Rule::Kubelet));
        }
        for port in [15001, 15006] {
            assert_eq!(arrives(&facts, OTHER, OWN, port), Inbound::Drop(Rule::DropReserved));
        }
        assert_ne!(arrives(&facts, OTHER, OWN, 15008).rule(), Rule::Kubelet);
        assert_ne!(arrives(&facts, OTHER, OWN_TOO, 80).rule(), Rule::Kubelet, "another flow");
        facts.netns = None;
        assert_eq!(arrives(&facts, OTHER, OWN, 80), Inbound::Drop(Rule::UnknownNetns));
    }
}

fn arrives(facts: &PlainFacts, from: Address, to: Address, port: u16) -> Inbound {
    inbound(facts, &Arrival { flow: flow(from, to, port), is_v4: crate::address::is_v4(&to) })
}

const fn flow(from: Address, to: Address, port: u16) -> Flow {
    Flow { local: from, remote: to, local_port: 40000, remote_port: port }
}

#[test]
fn a_guarded_process_is_left_alone_but_for_the_tunnels_ports() {
    let ready = IN_MESH | READY | DNS_CAPTURE;
    let to = |flags, caller_ids, address, port| {
        let mut facts = facts(flags);
        facts.excluded_ids.extend([(3, USER, 1337), (3, GROUP, 2102), (4, USER, 7)]);
        facts.caller_ids = caller_ids;
        verdict(&facts, address, port).rule()
    };
    for (flags, caller_ids, rule) in [
        (ready, (1337, 2102), Rule::Redirect),
        (ready | GUARDS_IDS, (0, 0), Rule::Redirect),
        (ready | GUARDS_IDS, (1337, 0), Rule::Guarded),
        (ready | GUARDS_IDS, (0, 2102), Rule::Guarded),
        // A user's number is no group's, and another list is another pod's.
        (ready | GUARDS_IDS, (2102, 1337), Rule::Redirect),
        (ready | GUARDS_IDS, (7, 0), Rule::Redirect),
        (ready | GUARDED, (0, 0), Rule::Guarded),
        // The tunnel need not be there.
        (IN_MESH | GUARDED, (0, 0), Rule::Guarded),
        (GUARDED, (0, 0), Rule::NotEnrolled),
    ] {
        assert_eq!(to(flags, caller_ids, OTHER, 80), rule, "{flags:b} {caller_ids:?}");
    }
    for (address, port, rule) in [
        (OWN, 15008, Rule::DropReserved),
        (LOOPBACK, 15001, Rule::DropReserved),
        (LOOPBACK, 80, Rule::Loopback),
        (RESOLVER, 53, Rule::Guarded),
    ] {
        assert_eq!(to(ready | GUARDED, (0, 0), address, port), rule, "{port}");
    }
    assert_eq!(to(ready, (0, 0), RESOLVER, 53), Rule::DnsRedirect);
}

#[test]
fn a_socket_that_is_bound_to_an_excluded_interface_is_left_alone() {
    const DEVICE_TOO: u32 = DEVICE + 7;
    let to = |flags, device, list| {
        let mut facts = facts(flags);
        facts.excluded_ids.extend([(list, INTERFACE, DEVICE_TOO), (3, USER, DEVICE)]);
        facts.device = device;
        verdict(&facts, OTHER, 80).rule()
    };
    let flags = IN_MESH | READY | EXCLUDES_DEVICES;
    assert_eq!(to(flags, DEVICE_TOO, 3), Rule::ExcludedDevice);
    assert_eq!(to(flags, 0, 3), Rule::Redirect);
    assert_eq!(to(flags, DEVICE, 3), Rule::Redirect);
    assert_eq!(
        to(flags, DEVICE_TOO, 4),
        Rule::NoAddress,
        "another list, and no address of this family there"
    );
    assert_eq!(to(IN_MESH | READY, DEVICE_TOO, 3), Rule::NoAddress);
}
