//! Exclusion lists as the maps hold them, and back.

use std::{collections::BTreeSet, net::IpAddr, ops::RangeInclusive};

use adit_ebpf_common::exclusions::{
    CidrPrefix, DEVICE, GROUP, INBOUND, Listed, MAPPED_BITS, OUTBOUND, PortPrefix, USER,
};
use adit_ebpf_loader::ExclusionList;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    model::{
        exclusions::{Exclusions, Included},
        guards::Guards,
    },
    plan::address16,
};

/// The entries that a list takes in the maps.
pub(crate) fn entries(exclusions: &Exclusions) -> ExclusionList {
    let mut list = ExclusionList::default();
    let mut add_ports = |direction, ports: &[RangeInclusive<u16>], listed| {
        for range in ports {
            list.list_ports(direction, range.clone(), listed);
        }
    };
    if let Some(ports) = &exclusions.inbound_included {
        // Every other port: what follows is narrower.
        add_ports(INBOUND, &[0..=u16::MAX], Listed::OUTSIDE);
        add_ports(INBOUND, ports, Listed::INCLUDED);
    }
    if let Some(included) = &exclusions.outbound_included {
        add_ports(OUTBOUND, &included.ports, Listed::INCLUDED);
    }
    add_ports(OUTBOUND, &exclusions.outbound_ports, Listed::EXCLUDED);
    add_ports(INBOUND, &exclusions.inbound_ports, Listed::EXCLUDED);
    let mut add_cidrs = |cidrs: &[IpNet], listed| {
        for cidr in cidrs {
            let (address, length) = mapped_cidr(cidr);
            list.list_cidr(address, length, listed);
        }
    };
    if let Some(included) = &exclusions.outbound_included {
        // Of either family, as far as nothing narrower, or equal, says otherwise.
        add_cidrs(&[Ipv4Net::default().into(), Ipv6Net::default().into()], Listed::OUTSIDE);
        add_cidrs(&included.cidrs, Listed::INCLUDED);
    }
    add_cidrs(&exclusions.by_route, Listed::BY_ROUTE);
    add_cidrs(&exclusions.outbound_cidrs, Listed::EXCLUDED);
    list.ids = ids(exclusions).collect();
    list
}

/// The entries of users and groups, which are the node's by now, and of interfaces.
fn ids(exclusions: &Exclusions) -> impl Iterator<Item = (u32, u32)> {
    let Exclusions { guards, devices, .. } = exclusions;
    let users = guards.users.iter().map(|id| (USER, *id));
    let groups = guards.groups.iter().map(|id| (GROUP, *id));
    users.chain(groups).chain(devices.iter().map(|id| (DEVICE, *id)))
}

/// The list that takes these entries.
pub(crate) fn of_entries(list: &ExclusionList) -> Exclusions {
    let ports = |direction, wanted: Listed| {
        let mut merged: Vec<RangeInclusive<u16>> = Vec::new();
        // They are in order.
        let of =
            |(prefix, listed): &(&PortPrefix, &Listed)| prefix.direction == direction && **listed == wanted;
        for (prefix, _) in list.ports.iter().filter(of) {
            let rest = u16::MAX.checked_shr(prefix.length).unwrap_or(0);
            let end = prefix.first | rest;
            match merged.last_mut() {
                Some(range) if range.end().checked_add(1) == Some(prefix.first) => {
                    *range = *range.start()..=end;
                }
                _ => merged.push(prefix.first..=end),
            }
        }
        merged
    };
    let cidrs = |wanted| {
        let of = list.cidrs.iter().filter(|(_, listed)| **listed == wanted);
        let cidrs: Vec<IpNet> = of.filter_map(|(prefix, _)| cidr(prefix)).collect();
        IpNet::aggregate(&cidrs)
    };
    let included = Included { ports: ports(OUTBOUND, Listed::INCLUDED), cidrs: cidrs(Listed::INCLUDED) };
    let has_outside = list.cidrs.values().any(|listed| *listed == Listed::OUTSIDE);
    let is_inbound = |prefix: &PortPrefix| prefix.direction == INBOUND;
    let has_inbound_outside =
        list.ports.iter().any(|(prefix, listed)| is_inbound(prefix) && *listed == Listed::OUTSIDE);
    Exclusions {
        outbound_ports: ports(OUTBOUND, Listed::EXCLUDED),
        outbound_cidrs: cidrs(Listed::EXCLUDED),
        inbound_ports: ports(INBOUND, Listed::EXCLUDED),
        outbound_included: (has_outside || included != Included::default()).then_some(included),
        inbound_included: has_inbound_outside.then(|| ports(INBOUND, Listed::INCLUDED)),
        interfaces: BTreeSet::new(),
        by_route: cidrs(Listed::BY_ROUTE),
        devices: of_kind(&list.ids, DEVICE),
        guards: {
            let (users, groups) = (of_kind(&list.ids, USER), of_kind(&list.ids, GROUP));
            let of_node = !users.is_empty() || !groups.is_empty();
            Guards { users, groups, of_node, ..Guards::default() }
        },
    }
}

fn of_kind(ids: &BTreeSet<(u32, u32)>, wanted: u32) -> BTreeSet<u32> {
    ids.iter().filter(|(kind, _)| *kind == wanted).map(|(_, id)| *id).collect()
}

/// `cidr` with its prefix length in IPv6 form: an IPv4 range is 96 bits longer.
fn mapped_cidr(cidr: &IpNet) -> ([u8; 16], u32) {
    let extra = if matches!(cidr.addr(), IpAddr::V4(_)) { MAPPED_BITS } else { 0 };
    (address16(cidr.network()), u32::from(cidr.prefix_len()) + extra)
}

/// The reverse; `None`: it is no range.
fn cidr(prefix: &CidrPrefix) -> Option<IpNet> {
    let first = IpAddr::from(prefix.first);
    let (address, length) = if prefix.is_v4 {
        (first.to_canonical(), prefix.length.checked_sub(MAPPED_BITS)?)
    } else {
        (first, prefix.length)
    };
    IpNet::new(address, u8::try_from(length).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        exclusions,
        lists::{InboundLists, Lists, OutboundLists, effective},
        notes::Notes,
    };

    #[test]
    fn inclusion_lists_are_read_back_as_they_were() {
        let mut notes = Notes::default();
        for (ports, cidrs, excluded) in [
            ("", "", ""),
            ("80,443", "", ""),
            ("", "10.0.0.0/8,fd00::/8", "10.9.0.0/16"),
            ("1-1023", "0.0.0.0/0", "10.0.0.0/8,::/0"),
        ] {
            let lists = Lists {
                outbound: OutboundLists {
                    excluded_cidrs: exclusions::cidrs("", &excluded.into(), &mut notes),
                    included_ports: Some(exclusions::ports("", &ports.into(), &mut notes)),
                    included_cidrs: Some(exclusions::cidrs("", &cidrs.into(), &mut notes)),
                    ..OutboundLists::default()
                },
                inbound: InboundLists {
                    excluded_ports: exclusions::ports("", &"81".into(), &mut notes),
                    included_ports: Some(exclusions::ports("", &ports.into(), &mut notes)),
                },
                ..Lists::default()
            };
            let wanted = effective(&[&lists]);
            assert!(wanted.outbound_included.is_some() && wanted.inbound_included.is_some());
            assert_eq!(of_entries(&entries(&wanted)), wanted);
        }
        assert!(notes.is_empty(), "{notes:?}");
    }

    #[test]
    fn ipv4_ranges_are_96_bits_longer() {
        for (cidr, length) in [("10.0.0.0/8", 104), ("0.0.0.0/0", 96), ("::/0", 0), ("fd00::1/128", 128)] {
            assert_eq!(mapped_cidr(&cidr.parse().unwrap()).1, length, "{cidr}");
        }
    }

    #[test]
    fn a_list_is_read_back_as_it_was() {
        let mut notes = Notes::default();
        for (ports, cidrs) in [
            ("", ""),
            ("1-65535", "0.0.0.0/0,::/0"),
            ("6379,7000-7010,65535", "10.0.0.0/9,192.168.7.7,fd00::/8,2001:db8::1"),
            ("1,3,5-6,8-4095", "::ffff:10.0.0.0/104,::/1,::/80"),
        ] {
            let list = Exclusions {
                outbound_ports: exclusions::ports("", &ports.into(), &mut notes),
                outbound_cidrs: exclusions::cidrs("", &cidrs.into(), &mut notes),
                inbound_ports: exclusions::ports("", &"15-20".into(), &mut notes),
                by_route: exclusions::cidrs("", &"172.16.0.0/12,fe00::/9".into(), &mut notes),
                devices: [7].into(),
                guards: Guards {
                    users: [0, 1337].into(),
                    groups: [1337].into(),
                    of_node: true,
                    ..Guards::default()
                },
                ..Exclusions::default()
            };
            assert_eq!(of_entries(&entries(&list)), list);
        }
        assert!(notes.is_empty(), "{notes:?}");
    }
}
