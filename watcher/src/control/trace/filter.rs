//! Which verdicts a client of `watcher trace` gets, and what of that the programs can do themselves.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
};

use adit_ebpf_common::{
    address::Address,
    trace::{TraceRecord, watched_cgroup, watched_netns},
};
use ipnet::IpNet;

use crate::{
    apply::settings::KernelFilter,
    plan::{PodView, address16},
};

/// What one client wants to see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TraceFilter {
    /// Only verdicts about the pod of this uid.
    pub pod: Option<String>,
    /// Only verdicts about this port, at either end.
    pub port: Option<u16>,
    /// Only verdicts about this address, at either end.
    pub address: Option<IpAddr>,
    /// No verdicts whose either end is in one of these.
    pub not_addresses: Vec<IpNet>,
    /// What the pod has at present, see [`Self::update`].
    pub marks: BTreeSet<Address>,
}

impl TraceFilter {
    /// Takes in what its pod has at present, if it names one.
    pub(crate) fn update<'a>(&mut self, mut pods: impl Iterator<Item = &'a PodView>) {
        let Some(uid) = &self.pod else { return };
        // What is gone may still be reported: a pod that ended keeps its marks.
        if let Some(view) = pods.find(|view| view.pod.uid == *uid) {
            self.marks = marks(view);
        }
    }

    /// Whether its client gets `record`.
    pub(crate) fn lets_pass(&self, record: &TraceRecord) -> bool {
        let ends = [&record.local, &record.remote];
        let ports = [record.local_port, record.remote_port];
        let is_of_pod = || {
            self.marks.contains(&watched_cgroup(record.cgroup_id))
                || ends.iter().any(|end| self.marks.contains(*end))
        };
        let is_left_out = |end: &Address| {
            let end = Ipv6Addr::from(*end).to_canonical();
            self.not_addresses.iter().any(|range| range.contains(&end))
        };
        (self.pod.is_none() || is_of_pod())
            && self.port.is_none_or(|port| ports.contains(&port))
            && self.address.is_none_or(|address| ends.contains(&&address16(address)))
            && !ends.into_iter().any(is_left_out)
    }
}

/// By what a record names a pod.
fn marks(view: &PodView) -> BTreeSet<Address> {
    let facts = view.eligibility.facts();
    let addresses = facts.into_iter().flat_map(|facts| &facts.addresses).map(|ip| address16(*ip));
    let netns = facts.map(|facts| facts.cookie);
    let netns = netns.into_iter().chain(view.closed_netns.keys().copied()).map(watched_netns);
    let cgroups = view.observed.cgroups.values().map(|id| watched_cgroup(*id));
    addresses.chain(netns).chain(cgroups).collect()
}

/// What the programs report for clients with these filters, of which there is at least one.
pub(crate) fn for_all<'a>(filters: impl Iterator<Item = &'a TraceFilter> + Clone) -> KernelFilter {
    let mut left_out: Option<BTreeSet<_>> = None;
    for filter in filters.clone() {
        let own: BTreeSet<_> = filter.not_addresses.iter().filter_map(range).collect();
        left_out = Some(left_out.map_or_else(|| own.clone(), |all| &all & &own));
    }
    let all_name_pods = filters.clone().all(|filter| filter.pod.is_some());
    KernelFilter {
        port: agreed(filters.clone().map(|filter| filter.port)),
        address: agreed(filters.clone().map(|filter| filter.address)),
        watched: all_name_pods.then(|| filters.flat_map(|filter| &filter.marks).copied().collect()),
        left_out: left_out.unwrap_or_default(),
    }
}

/// What all of `wanted` are, if they are the same.
fn agreed<T: PartialEq>(mut wanted: impl Iterator<Item = Option<T>>) -> Option<T> {
    let first = wanted.next()??;
    wanted.all(|other| other.as_ref() == Some(&first)).then_some(first)
}

/// As the map has it. `None` for a range of IPv6 that IPv4 in mapped form would be in.
fn range(cidr: &IpNet) -> Option<(Address, u32)> {
    let length = u32::from(cidr.prefix_len());
    match cidr.trunc() {
        IpNet::V4(v4) => Some((address16(v4.network().into()), 96 + length)),
        IpNet::V6(v6) if v6.contains(&Ipv6Addr::from(address16([0, 0, 0, 0].into()))) => None,
        IpNet::V6(v6) => Some((address16(v6.network().into()), length)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(cgroup_id: u64, local: &str, remote: &str, remote_port: u16) -> TraceRecord {
        let [local, remote] = [local, remote].map(|ip| address16(ip.parse().unwrap()));
        TraceRecord { cgroup_id, local, remote, local_port: 0, remote_port, hook: 0, rule: 0 }
    }

    fn of_pod(marks: &[Address]) -> TraceFilter {
        TraceFilter {
            pod: Some("u".to_owned()),
            marks: marks.iter().copied().collect(),
            ..TraceFilter::default()
        }
    }

    #[test]
    fn each_client_gets_what_it_asked_for() {
        let (by_cgroup, by_address) = (record(7, "::", "10.0.0.9", 80), record(8, "::", "10.0.0.1", 443));
        let all = TraceFilter::default();
        assert!(all.lets_pass(&by_cgroup) && all.lets_pass(&by_address));
        let pod = of_pod(&[watched_cgroup(7)]);
        assert!(pod.lets_pass(&by_cgroup) && !pod.lets_pass(&by_address));
        let pod = of_pod(&[address16("10.0.0.1".parse().unwrap())]);
        assert!(!pod.lets_pass(&by_cgroup) && pod.lets_pass(&by_address));
        assert!(!of_pod(&[]).lets_pass(&by_cgroup), "a pod of which nothing is known yet");
        let port = TraceFilter { port: Some(80), ..TraceFilter::default() };
        assert!(port.lets_pass(&by_cgroup) && !port.lets_pass(&by_address));
        let not = |range: &str| TraceFilter {
            not_addresses: vec![range.parse().unwrap()],
            ..TraceFilter::default()
        };
        assert!(!not("10.0.0.8/29").lets_pass(&by_cgroup) && not("10.0.0.8/29").lets_pass(&by_address));
        assert!(not("fd00::/8").lets_pass(&by_cgroup));
    }

    #[test]
    fn the_programs_report_what_anybody_wants() {
        let (one, two) = (watched_cgroup(1), watched_netns(2));
        let of = |filters: &[TraceFilter]| for_all(filters.iter());
        assert_eq!(of(&[of_pod(&[one]), of_pod(&[two])]).watched, Some([one, two].into()));
        assert_eq!(of(&[of_pod(&[one]), TraceFilter::default()]).watched, None);
        let on = |port| TraceFilter { port, ..TraceFilter::default() };
        assert_eq!(of(&[on(Some(80)), on(Some(80))]).port, Some(80));
        assert_eq!(of(&[on(Some(80)), on(Some(81))]).port, None);
        assert_eq!(of(&[on(Some(80)), on(None)]).port, None);
        let not = |ranges: &[&str]| TraceFilter {
            not_addresses: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            ..TraceFilter::default()
        };
        let ten = (address16("10.0.0.0".parse().unwrap()), 104);
        assert_eq!(of(&[not(&["10.1.2.3/8", "fd00::/8"]), not(&["10.0.0.0/8"])]).left_out, [ten].into());
        assert_eq!(of(&[not(&["10.0.0.0/8"]), not(&[])]).left_out, [].into());
        assert_eq!(of(&[not(&["::/0"])]).left_out, [].into(), "IPv4 is no part of it");
    }
}
