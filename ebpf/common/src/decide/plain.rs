//! Facts as plain values, for tests.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    vec::Vec,
};

use super::{ArrivalFacts, ConnectFacts, Facts, entry};
use crate::{
    address::{Address, UNSPECIFIED},
    enrolment::{CgroupInfo, NetnsInfo, PodRecord},
    exclusions::{CidrPrefix, DEVICE, GROUP, Listed, PortPrefix, USER},
    flows::{Destination, Flow},
    listeners::ListenerKey,
    settings::Settings,
};

/// What the maps would hold.
#[derive(Clone, Debug)]
pub struct PlainFacts {
    /// The settings of the node.
    pub settings: Settings,
    /// What is known of the caller's cgroup.
    pub caller: Option<CgroupInfo>,
    /// The cookie of the socket's netns, and of the one that a connection arrives in.
    pub socket_netns: u64,
    /// The entry of the pod that has it.
    pub netns_pod: Option<CgroupInfo>,
    /// The pods that have addresses.
    pub owners: BTreeMap<Address, PodRecord>,
    /// What is known of that netns.
    pub netns: Option<NetnsInfo>,
    /// Entries of exclusion lists, with their ids. Of equal ones the last counts.
    pub listed_ports: Vec<(u32, PortPrefix, Listed)>,
    /// The same.
    pub listed_cidrs: Vec<(u32, CidrPrefix, Listed)>,
    /// Users, groups and interfaces that lists leave alone: list, kind and id.
    pub excluded_ids: BTreeSet<(u32, u32, u32)>,
    /// The user and the group of the calling process.
    pub caller_ids: (u32, u32),
    /// Netns cookie, port and family of the tunnel's listeners.
    pub tunnel_listeners: BTreeSet<(u64, u32, u32)>,
    /// The same of applications.
    pub app_listeners: BTreeSet<(u64, u32, u32)>,
    /// Netns whose listeners are all known.
    pub complete: BTreeSet<u64>,
    /// Flows that the tunnel opened, with the netns it opened them from.
    pub tunnel_flows: Vec<(Flow, u64)>,
    /// Flows that the kubelet opened.
    pub kubelet_flows: Vec<Flow>,
    /// Flows that connect(2) redirected.
    pub redirected: Vec<Flow>,
    /// The port that the socket is bound to; 0: none.
    pub source_port: u16,
    /// The address that the socket is bound to; unspecified: none.
    pub source: Address,
    /// The interface that the socket is bound to; 0: none.
    pub device: u32,
    /// Whether there is memory for what is recorded of a socket.
    pub can_record: bool,
}

impl PlainFacts {
    /// Nothing is known but the settings; recording works.
    #[must_use]
    pub const fn new(settings: Settings) -> Self {
        Self {
            settings,
            caller: None,
            socket_netns: 0,
            netns_pod: None,
            owners: BTreeMap::new(),
            netns: None,
            listed_ports: Vec::new(),
            listed_cidrs: Vec::new(),
            excluded_ids: BTreeSet::new(),
            caller_ids: (0, 0),
            tunnel_listeners: BTreeSet::new(),
            app_listeners: BTreeSet::new(),
            complete: BTreeSet::new(),
            tunnel_flows: Vec::new(),
            kubelet_flows: Vec::new(),
            redirected: Vec::new(),
            source_port: 0,
            source: UNSPECIFIED,
            device: 0,
            can_record: true,
        }
    }
}

const fn parts(key: &ListenerKey) -> (u64, u32, u32) {
    (key.netns_cookie, key.port, key.family)
}

impl Facts for PlainFacts {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn port_listed(&self, exclusion_id: u32, port: u16, direction: u16) -> Listed {
        let of = |(id, ports, listed): &(u32, PortPrefix, Listed)| {
            (*id == exclusion_id && ports.contains(direction, port)).then_some((ports.length, *listed))
        };
        narrowest(exclusion_id, self.listed_ports.iter().filter_map(of))
    }
}

/// As a trie answers: by the longest prefix.
fn narrowest(exclusion_id: u32, listed: impl Iterator<Item = (u32, Listed)>) -> Listed {
    let longest = listed.filter(|_| exclusion_id != 0).max_by_key(|(length, _)| *length);
    longest.map_or(Listed::NO, |(_, listed)| listed)
}

impl ConnectFacts for PlainFacts {
    fn entry(&self) -> Option<&CgroupInfo> {
        entry(self.caller.as_ref(), self.netns_pod.as_ref(), self.socket_netns)
    }

    fn netns_cookie(&self) -> u64 {
        self.socket_netns
    }

    fn netns_flags(&self) -> u32 {
        self.netns.map_or(0, |netns| netns.flags)
    }

    fn has_address(&self, netns_cookie: u64, address: &Address, device: u32) -> bool {
        self.owners.get(address).is_some_and(|owner| owner.is_at(netns_cookie, device))
    }

    fn address_listed(&self, exclusion_id: u32, address: &Address) -> Listed {
        let of = |(id, cidr, listed): &(u32, CidrPrefix, Listed)| {
            (*id == exclusion_id && cidr.contains(address)).then_some((cidr.length, *listed))
        };
        narrowest(exclusion_id, self.listed_cidrs.iter().filter_map(of))
    }

    fn is_guarded_id(&self, exclusion_id: u32) -> bool {
        let (user, group) = self.caller_ids;
        let has = |kind, id| self.excluded_ids.contains(&(exclusion_id, kind, id));
        has(USER, user) || has(GROUP, group)
    }

    fn is_excluded_device(&self, exclusion_id: u32) -> bool {
        self.excluded_ids.contains(&(exclusion_id, DEVICE, self.device))
    }

    fn has_tunnel_listener(&self, key: &ListenerKey) -> bool {
        self.tunnel_listeners.contains(&parts(key))
    }

    fn source_port(&self) -> u16 {
        self.source_port
    }

    fn source(&self) -> Address {
        self.source
    }

    fn device(&self) -> u32 {
        self.device
    }

    fn record(&self, _original: &Destination, _redirect: &Destination) -> bool {
        self.can_record
    }
}

impl ArrivalFacts for PlainFacts {
    fn arrival_netns(&self) -> u64 {
        self.socket_netns
    }

    fn is_redirected(&self, flow: &Flow) -> bool {
        self.redirected.contains(flow)
    }

    fn netns(&self) -> Option<NetnsInfo> {
        self.netns
    }

    fn is_of_kubelet(&self, flow: &Flow) -> bool {
        self.kubelet_flows.contains(flow)
    }

    fn tunnel_flow(&self, flow: &Flow) -> Option<u64> {
        self.tunnel_flows.iter().find(|(of, _)| of == flow).map(|(_, cookie)| *cookie)
    }

    fn steer(&self, to: &ListenerKey) -> bool {
        self.tunnel_listeners.contains(&parts(to))
    }

    fn has_app_listener(&self, key: &ListenerKey) -> bool {
        self.app_listeners.contains(&parts(key))
    }

    fn knows_all_app_listeners(&self, netns_cookie: u64) -> bool {
        self.complete.contains(&netns_cookie)
    }
}
