//! What the routes of a netns send out of certain interfaces.
//!
//! The kernel tells a program of connect(2) nothing of routes. So the main table is read, and becomes
//! ranges of addresses: of two routes the narrower counts, and of two equal ones that with the lower
//! metric. A route that goes out of several interfaces counts if all of them are meant.

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    ops::ControlFlow,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkAttribute, LinkExtentMask, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};

use super::netlink;

/// How many routes of each family are read; of a netns with more nothing is known.
const ROUTES: usize = 4096;
/// How many interfaces are looked at.
const DEVICES: usize = 1024;
/// How many ranges may follow.
const RANGES: usize = 4096;

/// What leaves by certain interfaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outward {
    /// Where to, in order and merged.
    pub ranges: Vec<IpNet>,
    /// The numbers of the interfaces.
    pub devices: BTreeSet<u32>,
}

/// What leaves the calling thread's netns by the interfaces whose names one of `patterns` has, in which
/// `*` stands for anything and `?` for one character.
///
/// # Errors
/// The netns cannot be queried, or has too many routes.
pub(crate) fn outward(patterns: &BTreeSet<String>) -> io::Result<Outward> {
    let socket = netlink::socket(NETLINK_ROUTE)?;
    let devices = devices(&socket, patterns)?;
    if devices.is_empty() {
        return Ok(Outward::default());
    }
    let mut all = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        all.extend(routes(&socket, family, &devices)?);
    }
    let ranges = ranges(all).ok_or_else(|| io::Error::other("its routes make too many ranges"))?;
    Ok(Outward { ranges, devices })
}

fn devices(socket: &Socket, patterns: &BTreeSet<String>) -> io::Result<BTreeSet<u32>> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let (mut found, mut listed) = (BTreeSet::new(), 0);
    netlink::dump(socket, RouteNetlinkMessage::GetLink(request), |answer| {
        if let RouteNetlinkMessage::NewLink(link) = answer {
            listed += 1;
            let name = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            });
            let is_meant = name
                .is_some_and(|name| patterns.iter().any(|pattern| fits(pattern.as_bytes(), name.as_bytes())));
            if link.header.index != netlink::LO && is_meant {
                found.insert(link.header.index);
            }
        }
        if listed < DEVICES { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(found)
}

/// Whether `name` is as `pattern` says. Names have at most 15 bytes.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) if fits(rest, name) => true,
        (Some((b'*', _)), Some((_, name))) => fits(pattern, name),
        (Some((wanted, rest)), Some((found, name))) if *wanted == b'?' || wanted == found => fits(rest, name),
        _ => false,
    }
}

/// A route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Route {
    to: IpNet,
    metric: u32,
    /// Whether it leaves by one of the interfaces that are meant.
    is_out: bool,
}

fn routes(socket: &Socket, family: AddressFamily, devices: &BTreeSet<u32>) -> io::Result<Vec<Route>> {
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    let (mut found, mut listed) = (Vec::new(), 0);
    netlink::dump(socket, RouteNetlinkMessage::GetRoute(request), |answer| {
        if let RouteNetlinkMessage::NewRoute(route) = answer {
            listed += 1;
            found.extend(main_route(&route, devices));
        }
        if listed <= ROUTES { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    if listed > ROUTES {
        return Err(io::Error::other(format!("it has more than {ROUTES} routes")));
    }
    Ok(found)
}

/// `None`: it is of another table than the main one.
fn main_route(route: &RouteMessage, devices: &BTreeSet<u32>) -> Option<Route> {
    const MAIN: u32 = 254;
    let (mut table, mut metric, mut out, mut to) = (u32::from(route.header.table), 0, Vec::new(), None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::Oif(device) => out.push(*device),
            RouteAttribute::MultiPath(hops) => out.extend(hops.iter().map(|hop| hop.interface_index)),
            RouteAttribute::Destination(RouteAddress::Inet(address)) => to = Some(IpAddr::V4(*address)),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => to = Some(IpAddr::V6(*address)),
            _ => {}
        }
    }
    let unspecified: IpAddr = match route.header.address_family {
        AddressFamily::Inet => [0; 4].into(),
        AddressFamily::Inet6 => [0; 16].into(),
        _ => return None,
    };
    let to = IpNet::new(to.unwrap_or(unspecified), route.header.destination_prefix_length).ok()?;
    let is_out = route.header.kind == RouteType::Unicast
        && !out.is_empty()
        && out.iter().all(|device| devices.contains(device));
    (table == MAIN).then_some(Route { to: to.trunc(), metric, is_out })
}

/// The addresses for which the route that counts leaves by one of the interfaces. `None`: they are too
/// many ranges.
fn ranges(mut routes: Vec<Route>) -> Option<Vec<IpNet>> {
    // Of equal ones the first counts.
    routes.sort_unstable_by_key(|route| {
        (route.to.network(), route.to.prefix_len(), route.metric, route.is_out)
    });
    routes.dedup_by_key(|route| route.to);
    let v6 = routes.partition_point(|route| matches!(route.to, IpNet::V4(_)));
    let mut found = Vec::new();
    for (first, last) in spans(&routes[..v6]) {
        let (Ok(first), Ok(last)) = (u32::try_from(first), u32::try_from(last)) else { continue };
        let nets = Ipv4Subnets::new(first.into(), last.into(), 0);
        found.extend(nets.map(IpNet::V4).take(RANGES + 1));
        if found.len() > RANGES {
            return None;
        }
    }
    for (first, last) in spans(&routes[v6..]) {
        let nets = Ipv6Subnets::new(first.into(), last.into(), 0);
        found.extend(nets.map(IpNet::V6).take(RANGES + 1));
        if found.len() > RANGES {
            return None;
        }
    }
    Some(found)
}

/// The same of one family, as first and last addresses, from one pass over `routes`. These are in order,
/// a wider one before those within it, and no two are equal.
fn spans(routes: &[Route]) -> Vec<(u128, u128)> {
    let mut found: Vec<(u128, u128)> = Vec::new();
    let mut tell = |first: u128, last: u128, is_out: bool| match found.last_mut() {
        _ if !is_out || first > last => {}
        Some((_, end)) if end.checked_add(1) == Some(first) => *end = last,
        _ => found.push((first, last)),
    };
    // Routes that have the address `next`, the narrowest last: their last addresses.
    let (mut around, mut next): (Vec<(u128, bool)>, u128) = (Vec::new(), 0);
    for Route { to, is_out, .. } in routes {
        let (first, last) = (number(to.network()), number(to.broadcast()));
        while let Some((end, is_out)) = around.pop_if(|(end, _)| *end < first) {
            tell(next, end, is_out);
            next = next.max(end.saturating_add(1));
        }
        if let (Some((_, is_out)), Some(before)) = (around.last(), first.checked_sub(1)) {
            tell(next, before, *is_out);
        }
        next = first;
        around.push((last, *is_out));
    }
    while let Some((end, is_out)) = around.pop() {
        tell(next, end, is_out);
        // Those around the last address of all end there too.
        let Some(after) = end.checked_add(1) else { break };
        next = next.max(after);
    }
    found
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

/// A socket of `netns` that becomes readable when its interfaces or routes change. It keeps the netns
/// alive.
///
/// # Errors
/// The netns cannot be entered, or the socket not be made.
pub(crate) fn events(netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `RTMGRP_LINK`, `RTMGRP_IPV4_ROUTE`, `RTMGRP_IPV6_ROUTE`.
    const GROUPS: u32 = 0x1 | 0x40 | 0x400;
    super::netns::run_in(netns, || {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, GROUPS))?;
        socket.set_non_blocking(true)?;
        socket.as_fd().try_clone_to_owned()
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs::File, os::fd::AsFd as _, thread};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_fit_their_patterns() {
        for (pattern, name, expected) in [
            ("net1", "net1", true),
            ("net1", "net10", false),
            ("net*", "net10", true),
            ("*", "eth0", true),
            ("*1", "net1", true),
            ("n?t1", "net1", true),
            ("net?", "net", false),
            ("", "net1", false),
            ("*a*b", "xaab", true),
        ] {
            assert_eq!(fits(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    fn route(to: &str, metric: u32, is_out: bool) -> Route {
        Route { to: to.parse().unwrap(), metric, is_out }
    }

    fn told(routes: &[Route]) -> Vec<String> {
        ranges(routes.to_vec()).unwrap().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_narrower_route_counts_and_the_lower_metric() {
        let own = route("10.88.0.0/24", 0, false);
        assert_eq!(
            told(&[route("10.99.0.0/24", 0, true), own, route("0.0.0.0/0", 0, false)]),
            ["10.99.0.0/24"]
        );
        let but_own = told(&[route("10.0.0.0/8", 0, true), own]);
        assert_eq!((but_own.len(), but_own.contains(&"10.128.0.0/9".to_owned())), (16, true), "{but_own:?}");
        assert_eq!(told(&[route("::/0", 100, true), route("::/0", 50, false)]), Vec::<String>::new());
        assert_eq!(told(&[route("::/0", 50, true), route("::/0", 100, false)]), ["::/0"]);
        assert_eq!(told(&[own, route("0.0.0.0/0", 0, true)]).len(), 24);
    }

    /// A pod may have as many routes as are read, each of them within a wide one.
    #[test]
    fn the_most_routes_take_little_time() {
        let mut routes = vec![route("fd00::/16", 0, true)];
        for number in 0..4000u16 {
            let to = std::net::Ipv6Addr::new(0xfd00, number, 0, 0, 0, 0, 0, 1);
            routes.push(Route { to: IpAddr::from(to).into(), metric: 0, is_out: false });
        }
        let began = std::time::Instant::now();
        assert_eq!(ranges(routes), None);
        let mut routes = vec![route("0.0.0.0/0", 0, true)];
        for number in 0..4000u32 {
            let to = std::net::Ipv4Addr::from(number * 2);
            routes.push(Route { to: IpAddr::from(to).into(), metric: 0, is_out: false });
        }
        assert_eq!(ranges(routes).unwrap().len(), 4021);
        assert!(began.elapsed() < std::time::Duration::from_millis(100), "{:?}", began.elapsed());
    }

    proptest! {
        #[test]
        fn an_address_leaves_as_its_route_says(
            given in prop::collection::vec((0..16u8, 24..=32u8, any::<bool>()), 0..8), last in 0..=255u8
        ) {
            // One route for each destination.
            let routes: BTreeMap<IpNet, bool> = given
                .into_iter()
                .map(|(part, length, is_out)| {
                    (IpNet::new([10, 0, 0, part * 16].into(), length).unwrap().trunc(), is_out)
                })
                .collect();
            let address: IpAddr = [10, 0, 0, last].into();
            let narrowest = routes.iter().filter(|(to, _)| to.contains(&address)).max_by_key(|(to, _)| to.prefix_len());
            let expected = narrowest.is_some_and(|(_, is_out)| *is_out);
            let all = routes.iter().map(|(to, is_out)| Route { to: *to, metric: 0, is_out: *is_out }).collect();
            let found = ranges(all).unwrap().iter().any(|range| range.contains(&address));
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    #[ignore = "makes a netns, needs root: make test"]
    fn routes_are_read_and_their_changes_told() {
        fn ip(line: &str) {
            let done = std::process::Command::new("ip").args(line.split(' ')).status().unwrap();
            assert!(done.success(), "{line}");
        }
        let netns = thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            for line in [
                "link add eth0 type veth peer name net1",
                "addr add 10.1.0.2/24 dev eth0",
                "addr add 10.2.0.2/24 dev net1",
                "addr add fd02::2/64 dev net1 nodad",
                "link set eth0 up",
                "link set net1 up",
                "route add default via 10.1.0.1",
                "route add 10.3.0.0/16 via 10.2.0.1",
                "route add 10.4.0.0/16 via 10.2.0.1 table 100",
                "route add blackhole 10.3.9.0/24",
            ] {
                ip(line);
            }
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let netns = netns.join().unwrap();
        let read = |pattern: &str| {
            let patterns = [pattern.to_owned()].into();
            super::super::netns::run_in(netns.as_fd(), || outward(&patterns)).unwrap()
        };
        let found = read("net*");
        assert_eq!(found.devices.len(), 1);
        let has = |to: &str| found.ranges.iter().any(|range| range.contains(&to.parse::<IpAddr>().unwrap()));
        for (to, expected) in [
            ("10.2.0.9", true),
            ("10.3.1.1", true),
            ("10.3.9.1", false),
            ("10.4.1.1", false),
            ("10.1.0.9", false),
            ("192.0.2.1", false),
            ("fd02::9", true),
            ("fd03::9", false),
        ] {
            assert_eq!(has(to), expected, "{to}: {:?}", found.ranges);
        }
        assert_eq!(read("none"), Outward::default());
        let events = events(netns.as_fd()).unwrap();
        let is_told = || nix::unistd::read(&events, &mut [0; 4096]).is_ok();
        assert!(!is_told());
        super::super::netns::run_in(netns.as_fd(), || {
            ip("route add 10.5.0.0/16 via 10.2.0.1");
            Ok(())
        })
        .unwrap();
        assert!(is_told());
    }
}
