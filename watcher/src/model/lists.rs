//! What pods, namespaces and the mesh say of traffic inside and outside the mesh, and what follows.
//!
//! There are lists of ports and of address ranges, each of which excludes or includes. Who excludes
//! something leaves it outside. Who includes something leaves the rest outside; a connection is in if
//! any inclusion list of its direction has it.
//!
//! The narrower says more: a pod's lists come before those of its namespace, and these before those
//! of the mesh. Of one of them exclusion comes before inclusion. So inclusion lists decide about
//! everything, and what is wider than they are says nothing any more; exclusion lists add up.

use std::{collections::BTreeSet, ops::RangeInclusive};

use ipnet::IpNet;

use super::{
    exclusions::{Exclusions, Included, outside_of, union},
    guards::{GuardList, Guards},
};

/// The lists of one pod, of one namespace or of the mesh. Ranges are in order, and no two of a list
/// overlap or touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Lists {
    /// Connections to other ends.
    pub outbound: OutboundLists,
    /// Own ports, for connections from others.
    pub inbound: InboundLists,
    /// Processes that are left alone.
    pub guards: GuardList,
}

/// Lists of other ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct OutboundLists {
    /// Ports that stay outside.
    pub excluded_ports: Vec<RangeInclusive<u16>>,
    /// Addresses that stay outside.
    pub excluded_cidrs: Vec<IpNet>,
    /// Interfaces, as patterns: what leaves by them stays outside.
    pub excluded_interfaces: BTreeSet<String>,
    /// Ports that are in; `None`: there is no such list.
    pub included_ports: Option<Vec<RangeInclusive<u16>>>,
    /// Addresses that are in; `None`: there is no such list.
    pub included_cidrs: Option<Vec<IpNet>>,
}

/// Lists of own ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct InboundLists {
    /// Ports that stay outside.
    pub excluded_ports: Vec<RangeInclusive<u16>>,
    /// Ports that are in; `None`: there is no such list.
    pub included_ports: Option<Vec<RangeInclusive<u16>>>,
}

/// What holds for a pod: `levels` from the narrowest to the widest.
#[must_use]
pub fn effective(levels: &[&Lists]) -> Exclusions {
    let outbound: Vec<&OutboundLists> = levels.iter().map(|lists| &lists.outbound).collect();
    let decides = |lists: &OutboundLists| lists.included_ports.is_some() || lists.included_cidrs.is_some();
    let outbound = up_to(&outbound, decides);
    let outbound_ports = union(outbound.iter().flat_map(|lists| &lists.excluded_ports));
    let ranges: Vec<IpNet> = outbound.iter().flat_map(|lists| &lists.excluded_cidrs).copied().collect();
    let outbound_cidrs = IpNet::aggregate(&ranges);
    let included = outbound.last().filter(|lists| decides(lists)).map(|lists| Included {
        ports: without(lists.included_ports.as_deref().unwrap_or_default(), &outbound_ports),
        cidrs: outside_of(lists.included_cidrs.as_deref().unwrap_or_default(), &outbound_cidrs),
    });

    let interfaces = outbound.iter().flat_map(|lists| &lists.excluded_interfaces).cloned().collect();
    let inbound: Vec<&InboundLists> = levels.iter().map(|lists| &lists.inbound).collect();
    let decides = |lists: &InboundLists| lists.included_ports.is_some();
    let inbound = up_to(&inbound, decides);
    let inbound_ports = union(inbound.iter().flat_map(|lists| &lists.excluded_ports));
    let inbound_included = inbound
        .last()
        .and_then(|lists| lists.included_ports.as_deref())
        .map(|included| without(included, &inbound_ports));
    Exclusions {
        outbound_ports,
        outbound_cidrs,
        inbound_ports,
        outbound_included: included,
        inbound_included,
        interfaces,
        by_route: Vec::new(),
        devices: BTreeSet::new(),
        guards: Guards::effective(levels.iter().map(|lists| &lists.guards)),
    }
    .in_short()
}

/// `levels` up to the first that says what is in, and so decides about everything.
fn up_to<'a, T>(levels: &[&'a T], decides: impl Fn(&T) -> bool) -> Vec<&'a T> {
    let last = levels.iter().position(|lists| decides(lists)).map_or(levels.len(), |at| at + 1);
    levels[..last].to_vec()
}

/// The ports of `ranges` that `others` does not have. Both are in order and merged.
fn without(ranges: &[RangeInclusive<u16>], others: &[RangeInclusive<u16>]) -> Vec<RangeInclusive<u16>> {
    let mut left = Vec::new();
    for range in ranges {
        let (mut next, end) = (u32::from(*range.start()), u32::from(*range.end()));
        let first = others.partition_point(|other| other.end() < range.start());
        for other in others[first..].iter().take_while(|other| other.start() <= range.end()) {
            left.extend(ports(next, u32::from(*other.start()).checked_sub(1)));
            next = next.max(u32::from(*other.end()) + 1);
        }
        left.extend(ports(next, Some(end)));
    }
    left
}

/// From `first` to `last`, if there is something in between.
fn ports(first: u32, last: Option<u32>) -> Option<RangeInclusive<u16>> {
    let (first, last) = (u16::try_from(first).ok()?, u16::try_from(last?).ok()?);
    (first <= last).then_some(first..=last)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::model::{exclusions, notes::Notes};

    fn ports(text: &str) -> Vec<RangeInclusive<u16>> {
        exclusions::ports("", &text.into(), &mut Notes::default())
    }

    fn cidrs(text: &str) -> Vec<IpNet> {
        exclusions::cidrs("", &text.into(), &mut Notes::default())
    }

    fn outbound(excluded: [&str; 2], included: [Option<&str>; 2]) -> Lists {
        Lists {
            outbound: OutboundLists {
                excluded_ports: ports(excluded[0]),
                excluded_cidrs: cidrs(excluded[1]),
                excluded_interfaces: BTreeSet::new(),
                included_ports: included[0].map(ports),
                included_cidrs: included[1].map(cidrs),
            },
            ..Lists::default()
        }
    }

    #[test]
    fn exclusion_lists_add_up_and_inclusion_lists_end_what_is_wider() {
        let mesh = outbound(["25", "10.0.0.0/8"], [None; 2]);
        let namespace = outbound(["6379", ""], [None; 2]);
        let pod = outbound(["", "192.0.2.0/24"], [None; 2]);
        let all = effective(&[&pod, &namespace, &mesh]);
        assert_eq!((all.outbound_ports, all.outbound_included), (ports("25,6379"), None));
        assert_eq!(all.outbound_cidrs, cidrs("10.0.0.0/8,192.0.2.0/24"));

        let pod = outbound(["", "10.9.0.0/16"], [None, Some("10.0.0.0/9")]);
        let narrow = effective(&[&pod, &namespace, &mesh]);
        assert_eq!((narrow.outbound_ports.len(), &narrow.outbound_cidrs), (0, &cidrs("10.9.0.0/16")));
        let included = narrow.outbound_included.unwrap();
        assert_eq!((included.ports.len(), included.cidrs), (0, cidrs("10.0.0.0/9")));
    }

    #[test]
    fn what_is_excluded_is_not_included() {
        let lists = outbound(["80-90", "10.0.0.0/8"], [Some("1-100"), Some("10.1.0.0/16,192.0.2.0/24")]);
        let included = effective(&[&lists]).outbound_included.unwrap();
        assert_eq!((included.ports, included.cidrs), (ports("1-79,91-100"), cidrs("192.0.2.0/24")));
    }

    #[test]
    fn lists_that_decide_nothing_are_none() {
        for included in [[None, Some("0.0.0.0/0,::/0")], [Some("1-65535"), None]] {
            assert!(effective(&[&outbound(["", ""], included)]).is_empty(), "{included:?}");
        }
        assert!(!effective(&[&outbound(["", ""], [Some(""), None])]).is_empty(), "nothing is in");
        let all = effective(&[&outbound(["", "0.0.0.0/0,::/0"], [Some("80"), None])]);
        assert_eq!(all.outbound_included, None, "everything is excluded");
    }

    /// The rule, from the widest to the narrowest, for a single connection.
    fn is_outside(levels: &[Lists], to: SocketAddr) -> bool {
        for Lists { outbound, .. } in levels {
            let has_port =
                |ports: &[RangeInclusive<u16>]| ports.iter().any(|range| range.contains(&to.port()));
            let has_address = |cidrs: &[IpNet]| cidrs.iter().any(|cidr| cidr.contains(&to.ip()));
            if has_port(&outbound.excluded_ports) || has_address(&outbound.excluded_cidrs) {
                return true;
            }
            let (ports, cidrs) = (&outbound.included_ports, &outbound.included_cidrs);
            if ports.is_some() || cidrs.is_some() {
                let is_in =
                    ports.as_deref().is_some_and(has_port) || cidrs.as_deref().is_some_and(has_address);
                return !is_in;
            }
        }
        false
    }

    fn some_lists() -> impl Strategy<Value = Lists> {
        let ports = || prop::sample::select(vec!["", "80", "79-81", "1-65535", "443,80"]);
        let cidrs = || {
            prop::sample::select(vec![
                "",
                "10.0.0.0/8",
                "10.1.0.0/16",
                "0.0.0.0/0",
                "::/0",
                "10.1.2.3,fd00::/8",
            ])
        };
        let rare = |list| prop::option::weighted(0.3, list);
        (ports(), cidrs(), rare(ports().boxed()), rare(cidrs().boxed())).prop_map(
            |(excluded_ports, excluded_cidrs, included_ports, included_cidrs)| {
                outbound([excluded_ports, excluded_cidrs], [included_ports, included_cidrs])
            },
        )
    }

    proptest! {
        #[test]
        fn the_lists_together_decide_as_one_after_the_other(levels in prop::collection::vec(some_lists(), 1..4)) {
            let together = effective(&levels.iter().collect::<Vec<_>>());
            for to in ["10.1.2.3:80", "10.1.2.4:443", "10.2.0.1:81", "8.8.8.8:80", "8.8.8.8:443", "[fd00::1]:80", "[2001:db8::1]:79"] {
                let to: SocketAddr = to.parse().unwrap();
                prop_assert_eq!(together.leaves_outside(to, false), is_outside(&levels, to), "{} of {:?}", to, levels);
            }
        }
    }
}
