//! What excludes and includes connections of a pod, as the kernel's maps have it, and where each entry
//! comes from.
//!
//! The maps know numbers and ranges; who wrote them, the watcher knows. What is in the maps and nobody
//! wrote is shown so, and what somebody wrote and is not in the maps is too.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    ops::RangeInclusive,
};

use adit_ebpf_common::trace::Rule;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::{exclusions::Exclusions, lists::Lists, pod::Level};

/// The lists of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodLists {
    /// Its uid.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// The number of its lists in the maps; 0: it has none there.
    pub exclusion_id: u32,
    /// What they have, the first thousand where no pod is named.
    pub entries: Vec<ListEntry>,
    /// How many entries are left out.
    pub left_out: usize,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListEntry {
    /// The option, such as `excludeOutboundPorts`.
    pub list: String,
    /// What it excludes or includes, such as `7000-7010`.
    pub item: String,
    /// Where it comes from, such as `annotations of namespace demo`; none: nobody here wrote it.
    pub from: Vec<String>,
    /// Whether the maps have it; else the pod is not enrolled, or it is about to be written.
    pub in_maps: bool,
}

/// How many entries of each pod are shown where no pod is named.
pub(crate) const FEW: usize = 1000;

/// What is known of a pod besides its levels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Here<'a> {
    /// What the pod's routes send out of interfaces that it excludes.
    pub routes: &'a [IpNet],
    /// The numbers of those interfaces.
    pub devices: &'a BTreeSet<u32>,
    /// The pod's numbers of users, by the node's.
    pub users: &'a BTreeMap<u32, u32>,
    /// The same of groups.
    pub groups: &'a BTreeMap<u32, u32>,
}

/// The entries of what `maps` have and what is `wanted`, with where they come from: `levels` from the
/// narrowest to the widest.
pub(crate) fn entries(
    maps: &Exclusions,
    wanted: &Exclusions,
    levels: &[Level],
    here: &Here<'_>,
) -> Vec<ListEntry> {
    let (mut all, mut known) = (Vec::new(), BTreeSet::new());
    for (found, in_maps) in [(maps, true), (wanted, false)] {
        for (list, item, from) in rows(found, levels, here) {
            if known.insert((list, item.clone())) {
                all.push(ListEntry { list: list.to_owned(), item, from, in_maps });
            }
        }
    }
    all
}

type Row = (&'static str, String, Vec<String>);
type PortsOf = fn(&Lists) -> &[RangeInclusive<u16>];

fn rows(found: &Exclusions, levels: &[Level], here: &Here<'_>) -> Vec<Row> {
    let mut rows = Vec::new();
    let from = |has: &dyn Fn(&Lists) -> bool| -> Vec<String> {
        levels.iter().filter(|level| has(&level.lists)).map(|level| level.origin.clone()).collect()
    };
    let mut ports = |list, ranges: &[RangeInclusive<u16>], of: PortsOf| {
        for range in ranges {
            let has = |lists: &Lists| of(lists).iter().any(|other| overlap(range, other));
            rows.push((list, shown(range), from(&has)));
        }
    };
    ports("excludeOutboundPorts", &found.outbound_ports, |lists| &lists.outbound.excluded_ports);
    ports("excludeInboundPorts", &found.inbound_ports, |lists| &lists.inbound.excluded_ports);
    let included = found.outbound_included.as_ref().map(|included| included.ports.as_slice());
    ports("includeOutboundPorts", included.unwrap_or_default(), |lists| {
        lists.outbound.included_ports.as_deref().unwrap_or_default()
    });
    ports("includeInboundPorts", found.inbound_included.as_deref().unwrap_or_default(), |lists| {
        lists.inbound.included_ports.as_deref().unwrap_or_default()
    });
    for range in found.outbound_cidrs.iter().chain(&found.by_route) {
        let mut origins = from(&|lists| meet(range, &lists.outbound.excluded_cidrs));
        if meet(range, here.routes) {
            origins.extend(
                from(&|lists| !lists.outbound.excluded_interfaces.is_empty())
                    .into_iter()
                    .map(|origin| format!("routes of interfaces, {origin}")),
            );
        }
        rows.push(("excludeOutboundCidrs", range.to_string(), origins));
    }
    for range in found.outbound_included.iter().flat_map(|included| &included.cidrs) {
        let has = |lists: &Lists| meet(range, lists.outbound.included_cidrs.as_deref().unwrap_or_default());
        rows.push(("includeOutboundCidrs", range.to_string(), from(&has)));
    }
    for device in &found.devices {
        let is_known = here.devices.contains(device);
        let has = |lists: &Lists| is_known && !lists.outbound.excluded_interfaces.is_empty();
        rows.push(("excludeInterfaces", format!("number {device}"), from(&has)));
    }
    for user in &found.guards.users {
        let own = here.users.get(user).copied();
        let has = |lists: &Lists| own.is_some_and(|own| lists.guards.guards.users.contains(&own));
        rows.push(("guards", numbered("uid", *user, own), from(&has)));
    }
    for group in &found.guards.groups {
        let own = here.groups.get(group).copied();
        let has = |lists: &Lists| own.is_some_and(|own| lists.guards.guards.groups.contains(&own));
        rows.push(("guards", numbered("gid", *group, own), from(&has)));
    }
    rows
}

fn numbered(kind: &str, of_node: u32, of_pod: Option<u32>) -> String {
    match of_pod {
        Some(own) if own != of_node => format!("{kind}:{own} ({of_node} on the node)"),
        _ => format!("{kind}:{of_node}"),
    }
}

/// Whether `range` has, or is within, one of `others`, which are in order and apart.
fn meet(range: &IpNet, others: &[IpNet]) -> bool {
    let begin = |range: &IpNet| (matches!(range, IpNet::V6(_)), range.network());
    let after = others.partition_point(|other| begin(other) <= begin(range));
    let before =
        after.checked_sub(1).is_some_and(|at| others[at].contains(range) || range.contains(&others[at]));
    before || others.get(after).is_some_and(|other| range.contains(other))
}

fn overlap(one: &RangeInclusive<u16>, other: &RangeInclusive<u16>) -> bool {
    one.start() <= other.end() && other.start() <= one.end()
}

fn shown(range: &RangeInclusive<u16>) -> String {
    match (range.start(), range.end()) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    }
}

/// What made `rule` decide about a connection to `to`, as a phrase; `None`: no list did.
pub(crate) fn because(rule: Rule, to: SocketAddr, levels: &[Level], routes: &[IpNet]) -> Option<String> {
    let first = |list: &str, has: &dyn Fn(&Lists) -> Option<String>| {
        levels.iter().find_map(|level| Some(format!("{list} {}, {}", has(&level.lists)?, level.origin)))
    };
    match rule {
        Rule::ExcludedPort => first("excludeOutboundPorts", &|lists| {
            lists.outbound.excluded_ports.iter().find(|range| range.contains(&to.port())).map(shown)
        }),
        Rule::ExcludedCidr => first("excludeOutboundCidrs", &|lists| {
            let has = |cidr: &&IpNet| cidr.contains(&to.ip());
            lists.outbound.excluded_cidrs.iter().find(has).map(ToString::to_string)
        })
        .or_else(|| {
            let route = routes.iter().find(|route| route.contains(&to.ip()))?;
            let has = |lists: &Lists| {
                let names: Vec<&str> =
                    lists.outbound.excluded_interfaces.iter().map(String::as_str).collect();
                (!names.is_empty()).then(|| format!("{} (routes: {route})", names.join(",")))
            };
            first("excludeInterfaces", &has)
        }),
        Rule::NotIncluded => levels.iter().find_map(|level| {
            let lists = &level.lists.outbound;
            let names = [
                lists.included_ports.as_ref().map(|_| "includeOutboundPorts"),
                lists.included_cidrs.as_ref().map(|_| "includeOutboundCidrs"),
            ];
            let names: Vec<&str> = names.into_iter().flatten().collect();
            (!names.is_empty()).then(|| format!("{}, {}", names.join(" and "), level.origin))
        }),
        Rule::Guarded => {
            let with = levels.iter().filter(|level| !level.lists.guards.guards.is_empty());
            let origins: Vec<&str> = with.map(|level| level.origin.as_str()).collect();
            (!origins.is_empty()).then(|| format!("guards, {}", origins.join(" and ")))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{exclusions, guards::GuardList, lists::effective, notes::Notes};

    fn level(origin: &str, ports: &str, cidrs: &str, users: &[u32]) -> Level {
        let (mut lists, mut notes) = (Lists::default(), Notes::default());
        lists.outbound.excluded_ports = exclusions::ports("", &ports.into(), &mut notes);
        lists.outbound.excluded_cidrs = exclusions::cidrs("", &cidrs.into(), &mut notes);
        lists.guards = GuardList::default();
        lists.guards.guards.users = users.iter().copied().collect();
        Level { origin: origin.to_owned(), lists: Arc::new(lists) }
    }

    #[test]
    fn each_entry_tells_who_wrote_it() {
        let levels = [
            level("pod", "80-81", "10.1.0.0/16", &[1337]),
            level("namespace", "82", "", &[]),
            level("mesh", "25", "10.0.0.0/8", &[]),
        ];
        let wanted = effective(&[&levels[0].lists, &levels[1].lists, &levels[2].lists]);
        let (none, users) = (BTreeMap::new(), BTreeMap::from([(101_337, 1337)]));
        let here = Here { routes: &[], devices: &BTreeSet::new(), users: &users, groups: &none };
        let mut maps = wanted.clone();
        maps.guards.users = [101_337].into();
        maps.outbound_ports.push(9999..=9999);
        let wanted = Exclusions { guards: maps.guards.clone(), ..wanted };
        let found: Vec<String> = entries(&maps, &wanted, &levels, &here)
            .iter()
            .map(|entry| format!("{} {} {:?} {}", entry.list, entry.item, entry.from, entry.in_maps))
            .collect();
        assert_eq!(
            found,
            [
                "excludeOutboundPorts 25 [\"mesh\"] true",
                "excludeOutboundPorts 80-82 [\"pod\", \"namespace\"] true",
                "excludeOutboundPorts 9999 [] true",
                "excludeOutboundCidrs 10.0.0.0/8 [\"pod\", \"mesh\"] true",
                "guards uid:1337 (101337 on the node) [\"pod\"] true",
            ]
        );
        let found = entries(&Exclusions::default(), &wanted, &levels, &here);
        assert!(!found.is_empty() && found.iter().all(|entry| !entry.in_maps));
    }

    #[test]
    fn the_list_that_decides_is_named() {
        let levels = [level("pod", "80", "", &[]), level("mesh", "80-90", "10.0.0.0/8", &[7])];
        let of = |rule, to: &str| because(rule, to.parse().unwrap(), &levels, &[]);
        assert_eq!(of(Rule::ExcludedPort, "10.0.0.1:80").unwrap(), "excludeOutboundPorts 80, pod");
        assert_eq!(of(Rule::ExcludedPort, "10.0.0.1:85").unwrap(), "excludeOutboundPorts 80-90, mesh");
        assert_eq!(of(Rule::ExcludedCidr, "10.0.0.1:85").unwrap(), "excludeOutboundCidrs 10.0.0.0/8, mesh");
        assert_eq!(of(Rule::Guarded, "10.0.0.1:85").unwrap(), "guards, mesh");
        assert_eq!((of(Rule::Redirect, "10.0.0.1:85"), of(Rule::ExcludedCidr, "8.8.8.8:1")), (None, None));
    }
}
