//! Which rule would decide about a connection, by the programs' own lists and from the maps as they
//! are now.

use std::cell::RefCell;

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED, is_v4},
    decide::{self, Arrival, ArrivalFacts, Connect, ConnectFacts, Facts},
    enrolment::{CgroupInfo, NetnsInfo, PodRecord},
    exclusions::{ExcludedId, GROUP, Listed, USER},
    flows::{Destination, Flow},
    listeners::ListenerKey,
    maps::{APP_LISTENERS, CGROUP_INFO, POD_BY_ADDR, POD_BY_NETNS},
    sealed::Sealed,
    settings::Settings,
    trace::Rule,
};

use crate::{Kernel, KernelError};

impl Kernel {
    /// The rule for a TCP connect to `destination` (IPv4 in mapped form) from a process in the
    /// cgroup `cgroup_id` by a socket of the netns `netns_cookie`. `None`: its pod has no cgroup,
    /// so no entry; the netns of the cgroup's pod. The process has these ids of user and group, as the
    /// node numbers them, or any that nobody names. The socket is taken to be bound to nothing,
    /// and to have room for a state.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn explain_connect(
        &self,
        cgroup_id: Option<u64>,
        netns_cookie: Option<u64>,
        ids: [Option<u32>; 2],
        destination: Destination,
    ) -> Result<Rule, KernelError> {
        let mut facts = MapFacts { ids, ..self.facts(cgroup_id)? };
        if let Some(cookie) = netns_cookie.or_else(|| facts.caller.map(|info| info.netns_cookie)) {
            facts.netns_cookie = cookie;
            let netns = self.get_sealed(POD_BY_NETNS.name, &cookie, NetnsInfo::CLOSED)?;
            facts.netns = netns;
            if let Some(netns) = netns {
                facts.netns_pod = self.taken_for(netns.cgroup_id)?;
            }
        }
        let call = Connect { is_tcp: true, is_udp: false, destination };
        let outbound = decide::outbound(&facts, &call);
        facts.checked(outbound.rule())
    }

    /// The rule for a TCP connection in clear that arrives in the steered netns `netns_cookie` at
    /// `destination` from `source`, an address in another netns (both in mapped form if IPv4).
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn explain_arrival(
        &self,
        netns_cookie: u64,
        source: Address,
        destination: Destination,
    ) -> Result<Rule, KernelError> {
        let netns = self.get_sealed(POD_BY_NETNS.name, &netns_cookie, NetnsInfo::CLOSED)?;
        let facts = MapFacts { netns_cookie, netns, ..self.facts(None)? };
        let flow =
            Flow { local: source, remote: destination.address, local_port: 0, remote_port: destination.port };
        let inbound = decide::inbound(&facts, &Arrival { flow, is_v4: is_v4(&destination.address) });
        facts.checked(inbound.rule())
    }

    /// The entry of a cgroup as the programs take it.
    fn taken_for(&self, id: u64) -> Result<Option<CgroupInfo>, KernelError> {
        self.get_sealed(CGROUP_INFO.name, &id, CgroupInfo::CLOSED)
    }

    fn facts(&self, cgroup_id: Option<u64>) -> Result<MapFacts<'_>, KernelError> {
        let caller = match cgroup_id {
            Some(id) => self.taken_for(id)?,
            None => None,
        };
        let (settings, listeners) = (self.settings()?, self.tunnel_listeners()?);
        Ok(MapFacts {
            kernel: self,
            settings,
            caller,
            netns_cookie: 0,
            netns_pod: None,
            netns: None,
            listeners,
            ids: [None; 2],
            failure: RefCell::default(),
        })
    }
}

/// The facts by look-ups from user space.
struct MapFacts<'a> {
    kernel: &'a Kernel,
    settings: Settings,
    caller: Option<CgroupInfo>,
    /// Of the socket, or that the connection arrives in.
    netns_cookie: u64,
    netns_pod: Option<CgroupInfo>,
    /// What is known of that netns.
    netns: Option<NetnsInfo>,
    listeners: Vec<ListenerKey>,
    /// The user and the group of the calling process.
    ids: [Option<u32>; 2],
    /// The first look-up that failed. A fact has no way to say so.
    failure: RefCell<Option<KernelError>>,
}

impl MapFacts<'_> {
    /// `rule`, unless a look-up on the way to it failed.
    fn checked(self, rule: Rule) -> Result<Rule, KernelError> {
        self.failure.into_inner().map_or(Ok(rule), Err)
    }

    fn or_default<T: Default>(&self, found: Result<T, KernelError>) -> T {
        found.unwrap_or_else(|error| {
            self.failure.borrow_mut().get_or_insert(error);
            T::default()
        })
    }
}

impl Facts for MapFacts<'_> {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn port_listed(&self, exclusion_id: u32, port: u16, direction: u16) -> Listed {
        let value = || self.or_default(self.kernel.port_listed(exclusion_id, port, direction));
        if exclusion_id == 0 { Listed::NO } else { Listed::of_value(value()) }
    }
}

impl ConnectFacts for MapFacts<'_> {
    fn entry(&self) -> Option<&CgroupInfo> {
        decide::entry(self.caller.as_ref(), self.netns_pod.as_ref(), self.netns_cookie)
    }

    fn netns_cookie(&self) -> u64 {
        self.netns_cookie
    }

    fn netns_flags(&self) -> u32 {
        self.netns.map_or(0, |netns| netns.flags)
    }

    fn has_address(&self, netns_cookie: u64, address: &Address, device: u32) -> bool {
        let record = self.kernel.get::<_, Sealed<PodRecord>>(POD_BY_ADDR.name, address);
        let opened = |sealed: Sealed<PodRecord>| sealed.open(address).copied();
        let owner = self.or_default(record.map(|record| record.and_then(opened)));
        owner.is_some_and(|owner| owner.is_at(netns_cookie, device))
    }

    fn address_listed(&self, exclusion_id: u32, address: &Address) -> Listed {
        let value = || self.or_default(self.kernel.address_listed(exclusion_id, address));
        if exclusion_id == 0 { Listed::NO } else { Listed::of_value(value()) }
    }

    fn is_guarded_id(&self, exclusion_id: u32) -> bool {
        let has = |(kind, id): (u32, Option<u32>)| {
            let guarded = |id| self.kernel.has_excluded_id(ExcludedId { exclusion_id, kind, id });
            id.is_some_and(|id| self.or_default(guarded(id)))
        };
        [USER, GROUP].into_iter().zip(self.ids).any(has)
    }

    /// The socket is bound to none.
    fn is_excluded_device(&self, _exclusion_id: u32) -> bool {
        false
    }

    fn has_tunnel_listener(&self, key: &ListenerKey) -> bool {
        self.listeners.contains(key)
    }

    fn source_port(&self) -> u16 {
        0
    }

    fn source(&self) -> Address {
        UNSPECIFIED
    }

    fn device(&self) -> u32 {
        0
    }

    fn record(&self, _original: &Destination, _redirect: &Destination) -> bool {
        true
    }
}

impl ArrivalFacts for MapFacts<'_> {
    fn arrival_netns(&self) -> u64 {
        self.netns_cookie
    }

    /// The connection comes from another netns.
    fn is_redirected(&self, _flow: &Flow) -> bool {
        false
    }

    fn netns(&self) -> Option<NetnsInfo> {
        self.netns
    }

    /// Asked of a connection that nobody opened yet.
    fn is_of_kubelet(&self, _flow: &Flow) -> bool {
        false
    }

    /// The connection comes from another netns, where no flow of the tunnel is this pod's.
    fn tunnel_flow(&self, _flow: &Flow) -> Option<u64> {
        None
    }

    fn steer(&self, to: &ListenerKey) -> bool {
        self.listeners.contains(to)
    }

    fn has_app_listener(&self, key: &ListenerKey) -> bool {
        self.or_default(self.kernel.get::<_, u32>(APP_LISTENERS.name, key).map(|found| found.is_some()))
    }

    fn knows_all_app_listeners(&self, netns_cookie: u64) -> bool {
        let state = self.or_default(self.kernel.app_listener_state(netns_cookie));
        state.is_some_and(|state| state.complete != 0)
    }
}
