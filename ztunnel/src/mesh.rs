//! The mesh: workloads, services and policies, as one immutable snapshot.
//!
//! * `workloads`, `services`, `policies`: one type each; `gateways`: waypoints and network
//!   gateways
//! * `endpoints`: those of one service, and which are best for a client
//! * `change`: an update from a control plane, as a difference
//! * [`table`]: a hash table that is cheap to copy; [`index`]: the keys of each table
//! * `local_pod`: which workload is a pod of this node
//! * `neighbours`: the workloads of this node, and what they tell of a pod that is not told yet
//! * `view`: lookups that note missing names
//! * `store`: holds the current snapshot and swaps it as a whole; a connection uses one snapshot
//! * [`local_file`]: the source without a control plane, watched for edits
//! * [`baggage`]: the description of a workload that a tunnel sends to a peer

pub mod baggage;
pub mod change;
mod endpoints;
pub mod gateways;
mod index;
pub mod local_file;
mod local_pod;
mod neighbours;
pub mod policies;
pub mod services;
pub mod store;
mod table;
mod view;
pub mod workloads;

use std::{net::IpAddr, sync::Arc};

pub use change::MeshChange;
pub use endpoints::{Best, Endpoint, Endpoints, Purpose, Question};
pub use gateways::{GatewayAddress, GatewayDestination};
pub use local_pod::LocalPod;
pub use neighbours::OwnNode;
pub use policies::{Policy, PolicyKey, PolicyKnowledge};
pub use services::{Service, ServiceKey};
pub use store::{Knowledge, Store};
pub use view::{MeshView, NamedGateway};
pub use workloads::{Protocol, Workload};

use index::{
    ByAddress, ByName, ByUid, EndpointsOf, HostnameInOwnNamespace, ServiceByHostname, ServiceByKey,
    ServiceByVip,
};
use neighbours::Neighbours;
use policies::Policies;
use services::Ranges;
use table::{Keyed as _, Table};

/// A text that is not the key of a resource.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {text:?} is not of the form {form}")]
pub struct InvalidKey {
    kind: &'static str,
    text: String,
    form: &'static str,
}

impl InvalidKey {
    fn new(kind: &'static str, text: &str, form: &'static str) -> Self {
        Self { kind, text: text.to_owned(), form }
    }
}

/// All policies of one moment. See [`Mesh::policy_set`].
#[derive(Clone, Debug)]
pub struct PolicySet(Arc<Policies>);

/// Everything known at one moment, indexed for the lookups that a connection makes. A copy shares
/// unchanged parts.
#[derive(Clone, Debug, Default)]
pub struct Mesh {
    workloads: Table<ByUid>,
    /// Counts the workloads that were added or changed.
    puts: u64,
    by_address: Table<ByAddress>,
    by_name: Table<ByName>,
    by_own_hostname: Table<HostnameInOwnNamespace>,
    services: Table<ServiceByKey>,
    by_hostname: Table<ServiceByHostname>,
    by_vip: Table<ServiceByVip>,
    /// How many labels the longest host name with a wildcard has had.
    deepest_wildcard: usize,
    ranges: Arc<Ranges>,
    endpoints: Table<EndpointsOf>,
    neighbours: Neighbours,
    policies: Arc<Policies>,
}

impl Mesh {
    /// If two workloads or services have the same key, the later one wins.
    pub fn new(
        workloads: impl IntoIterator<Item = Workload>,
        services: impl IntoIterator<Item = Service>,
        policies: impl IntoIterator<Item = Policy>,
    ) -> Self {
        let services = services.into_iter().map(MeshChange::PutService);
        let workloads = workloads.into_iter().map(MeshChange::PutWorkload);
        Self::default().with(services.chain(workloads).chain(policies.into_iter().map(MeshChange::PutPolicy)))
    }

    /// An empty one that notes who is on `node`, where this tunnel is.
    #[must_use]
    pub fn on_node(node: OwnNode) -> Self {
        Self { neighbours: Neighbours::of(node), ..Self::default() }
    }

    /// The same with `changes` applied. The cost depends on the number of changes, not on the size
    /// of the mesh.
    #[must_use]
    pub fn with(&self, changes: impl IntoIterator<Item = MeshChange>) -> Self {
        let mut mesh = self.clone();
        for change in changes {
            match change {
                MeshChange::PutWorkload(workload) => mesh.put_workload(&Arc::new(workload)),
                MeshChange::PutService(service) => mesh.put_service(&Arc::new(service)),
                MeshChange::PutPolicy(policy) => Arc::make_mut(&mut mesh.policies).put(policy),
                MeshChange::RemoveWorkload(uid) => {
                    if let Some(ByUid(gone)) = mesh.workloads.take(&&*uid, |_| true) {
                        mesh.unlink_workload(&gone);
                    }
                }
                MeshChange::RemoveService(key) => mesh.take_service(&key),
                MeshChange::RemovePolicy(key) => Arc::make_mut(&mut mesh.policies).remove(&key),
                MeshChange::ForgetAddresses => {
                    let Self { policies, puts, neighbours, .. } = mesh;
                    mesh = Self { policies, puts, neighbours: neighbours.emptied(), ..Self::default() };
                }
                MeshChange::ForgetPolicies => mesh.policies = Arc::default(),
            }
        }
        mesh
    }

    fn put_workload(&mut self, workload: &Arc<Workload>) {
        self.puts += 1;
        let before = self.workloads.get(&&*workload.uid).map(|ByUid(known)| Arc::clone(known));
        *self.workloads.get_or_add(&&*workload.uid, || ByUid(Arc::clone(workload))) =
            ByUid(Arc::clone(workload));
        // An update that leaves an address where it was is no move of that address.
        let since: Vec<u64> =
            workload.addresses.iter().map(|ip| self.has_had(before.as_ref(), workload, *ip)).collect();
        if let Some(before) = before {
            self.unlink_workload(&before);
        }
        self.neighbours.put(workload);
        self.by_name.add(ByName(Arc::clone(workload)));
        if workload.hostname.is_some() {
            self.by_own_hostname.add(HostnameInOwnNamespace(Arc::clone(workload)));
        }
        // The addresses of host-network pods are the node's: they do not identify the pod.
        if !workload.host_network {
            for (address, since) in since.into_iter().enumerate() {
                self.by_address.add(ByAddress { workload: Arc::clone(workload), address, since });
            }
        }
        for (key, ports) in &workload.services {
            let new = || EndpointsOf { service: key.clone(), endpoints: Arc::default() };
            let known = self.endpoints.get_or_add(&key.parts(), new);
            Arc::make_mut(&mut known.endpoints).add(workload, ports);
        }
    }

    /// Since when a workload has the address `ip`: since this change, unless it was its own `before`.
    fn has_had(&self, before: Option<&Arc<Workload>>, now: &Workload, ip: IpAddr) -> u64 {
        let key = (&*now.network, ip.to_canonical());
        let mut entries = self.by_address.all(key);
        let own = before.and_then(|before| entries.find(|entry| Arc::ptr_eq(&entry.workload, before)));
        own.map_or(self.puts, |entry| entry.since)
    }

    /// Removes it from every table except the one by uid.
    fn unlink_workload(&mut self, workload: &Arc<Workload>) {
        let it = |other: &Arc<Workload>| Arc::ptr_eq(workload, other);
        self.neighbours.take(workload);
        let by_name = ByName(Arc::clone(workload));
        self.by_name.take(&by_name.key(), |entry| it(&entry.0));
        if workload.hostname.is_some() {
            let by_own_hostname = HostnameInOwnNamespace(Arc::clone(workload));
            self.by_own_hostname.take(&by_own_hostname.key(), |entry| it(&entry.0));
        }
        for ip in &workload.addresses {
            let key = (&*workload.network, ip.to_canonical());
            self.by_address.take(&key, |entry| it(&entry.workload));
        }
        for key in workload.services.keys() {
            let new = || EndpointsOf { service: key.clone(), endpoints: Arc::default() };
            let known = self.endpoints.get_or_add(&key.parts(), new);
            let endpoints = Arc::make_mut(&mut known.endpoints);
            endpoints.remove(workload);
            if endpoints.is_empty() {
                self.endpoints.take(&key.parts(), |_| true);
            }
        }
    }

    fn put_service(&mut self, service: &Arc<Service>) {
        let key = service.key();
        self.take_service(&key);
        if service.hostname.starts_with('*') {
            self.deepest_wildcard = self.deepest_wildcard.max(service.hostname.split('.').count());
        }
        self.services.add(ServiceByKey(Arc::clone(service)));
        self.by_hostname.add(ServiceByHostname(Arc::clone(service)));
        for vip in 0..service.vips.len() {
            self.by_vip.add(ServiceByVip { service: Arc::clone(service), vip });
        }
        if !service.cidr_vips.is_empty() {
            Arc::make_mut(&mut self.ranges).put(key, Arc::clone(service));
        }
    }

    fn take_service(&mut self, key: &ServiceKey) {
        let Some(ServiceByKey(service)) = self.services.take(&key.parts(), |_| true) else { return };
        let it = |other: &Arc<Service>| Arc::ptr_eq(&service, other);
        self.by_hostname.take(&&*service.hostname, |entry| it(&entry.0));
        for (network, ip) in &service.vips {
            self.by_vip.take(&(network, ip.to_canonical()), |entry| it(&entry.service));
        }
        if !service.cidr_vips.is_empty() {
            Arc::make_mut(&mut self.ranges).remove(key);
        }
    }

    /// The workload with address `ip`. Never one on the host's network.
    ///
    /// Entries may name the address of a pod: it stays the pod's, with its identity, and HBONE. Of
    /// other workloads one that speaks HBONE comes first, as with Istio's tunnel.
    #[must_use]
    pub fn workload_by_address(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        let key = (network, ip.to_canonical());
        let rank = |entry: &&ByAddress| {
            let ByAddress { workload, since, .. } = entry;
            (workload.is_pod(), workload.is_pod() || workload.protocol == Protocol::Hbone, *since)
        };
        self.by_address.all(key).max_by_key(rank).map(|entry| &entry.workload)
    }

    /// The workload of a pod of this node. `None` also while only namesakes of it are known.
    #[must_use]
    pub fn workload_of(&self, pod: &LocalPod) -> Option<&Arc<Workload>> {
        let named = self.by_name.all((&pod.namespace, &pod.name)).map(|entry| &entry.0);
        let fitting = named.filter_map(|workload| Some((pod.fit(workload)?, workload)));
        fitting.max_by(|(a, _), (b, _)| a.cmp(b)).map(|(_, workload)| workload)
    }

    /// What a pod of this node is taken for while nothing is told under its name. Good for what it
    /// does itself, never for what is done to it: nobody knows what protects it. See `neighbours`.
    #[must_use]
    pub fn newcomer(&self, pod: &LocalPod) -> Option<Workload> {
        let mut named = self.by_name.all((&pod.namespace, &pod.name));
        let told = named.any(|ByName(workload)| workload.cluster_id == pod.cluster_id);
        if told { None } else { self.neighbours.newcomer(pod) }
    }

    /// The workload that has this host name itself, not through a service.
    #[must_use]
    pub fn workload_by_hostname(&self, key: &ServiceKey) -> Option<&Arc<Workload>> {
        self.by_own_hostname.get(&key.parts()).map(|entry| &entry.0)
    }

    /// The service with this key.
    #[must_use]
    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(&key.parts()).map(|entry| &entry.0)
    }

    /// The service that has this address, else the one with the narrowest range around it. Among
    /// several, the first by namespace and name.
    #[must_use]
    pub fn service_by_vip(&self, network: &str, ip: IpAddr) -> Option<&Arc<Service>> {
        let ip = ip.to_canonical();
        let exact = self.by_vip.all((network, ip)).map(|entry| &entry.service);
        exact
            .min_by_key(|service| (&service.namespace, &service.hostname))
            .or_else(|| self.ranges.find(network, ip))
    }

    /// The service with this host name. If several namespaces define it, the one in `namespace` is
    /// preferred, then the canonical one.
    #[must_use]
    pub fn service_by_hostname(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        let named = self.services_named(hostname);
        named.min_by_key(|service| (&*service.namespace != namespace, !service.canonical, &service.namespace))
    }

    /// All services with exactly this name, which may be a wildcard; one per namespace.
    pub fn services_named(&self, hostname: &str) -> impl Iterator<Item = &Arc<Service>> {
        self.by_hostname.all(hostname).map(|entry| &entry.0)
    }

    /// No host name with a wildcard has more labels than this.
    #[must_use]
    pub fn deepest_wildcard(&self) -> usize {
        self.deepest_wildcard
    }

    /// Every endpoint of a service, healthy or not.
    #[must_use]
    pub fn endpoints(&self, service: &ServiceKey) -> &Endpoints {
        self.endpoints.get(&service.parts()).map_or_else(Endpoints::none, |entry| &entry.endpoints)
    }

    /// What is known of the policy with this key.
    #[must_use]
    pub fn policy(&self, key: &PolicyKey) -> PolicyKnowledge<'_> {
        self.policies.get(key)
    }

    /// All policies as they are now, to find out later whether one has changed.
    #[must_use]
    pub fn policy_set(&self) -> PolicySet {
        PolicySet(Arc::clone(&self.policies))
    }

    /// Whether no policy has changed since.
    #[must_use]
    pub fn has_policies(&self, set: &PolicySet) -> bool {
        Arc::ptr_eq(&self.policies, &set.0)
    }

    /// Those that apply to every workload, then those of its namespace.
    pub fn policies_by_scope(&self, namespace: &str) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.by_scope(namespace)
    }

    /// All workloads, unordered.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter().map(|ByUid(workload)| workload)
    }

    /// All services, unordered.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.iter().map(|entry| &entry.0)
    }

    /// All policies, by namespace and name.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.iter()
    }
}

#[cfg(test)]
pub(crate) mod tests;
