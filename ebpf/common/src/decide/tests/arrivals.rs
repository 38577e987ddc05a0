//! What arrives at a pod.

use super::*;

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
