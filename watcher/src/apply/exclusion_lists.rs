//! Exclusion lists as the maps hold them, and back.

use std::{net::IpAddr, ops::RangeInclusive};

use adit_ebpf_common::exclusions::{CidrPrefix, INBOUND, MAPPED_BITS, OUTBOUND};
use adit_ebpf_loader::ExclusionList;
use ipnet::IpNet;

use crate::{model::exclusions::Exclusions, plan::address16};

/// The entries that a list takes in the maps.
pub(crate) fn entries(exclusions: &Exclusions) -> ExclusionList {
    let mut list = ExclusionList::default();
    for (ports, direction) in [(&exclusions.outbound_ports, OUTBOUND), (&exclusions.inbound_ports, INBOUND)] {
        for range in ports {
            list = list.with_ports(direction, range.clone());
        }
    }
    for cidr in &exclusions.outbound_cidrs {
        let (address, length) = mapped_cidr(cidr);
        list = list.with_cidr(address, length);
    }
    list
}

/// The list that takes these entries.
pub(crate) fn of_entries(list: &ExclusionList) -> Exclusions {
    let ports = |direction| {
        let mut merged: Vec<RangeInclusive<u16>> = Vec::new();
        // They are in order.
        for prefix in list.ports.iter().filter(|prefix| prefix.direction == direction) {
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
    let cidrs: Vec<IpNet> = list.cidrs.iter().filter_map(cidr).collect();
    Exclusions {
        outbound_ports: ports(OUTBOUND),
        outbound_cidrs: IpNet::aggregate(&cidrs),
        inbound_ports: ports(INBOUND),
    }
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
    use crate::model::{exclusions, notes::Notes};

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
            };
            assert_eq!(of_entries(&entries(&list)), list);
        }
        assert!(notes.is_empty(), "{notes:?}");
    }
}
