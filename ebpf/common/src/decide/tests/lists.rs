//! What lists and guards leave outside.

use super::*;

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
