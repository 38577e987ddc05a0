//! What is known of others: workloads, services and policies, as one immutable snapshot.
//!
//! * [`workloads`], [`services`], [`policies`]: what there is, one type each; [`gateways`]: ways around
//! * [`change`]: what a control plane tells, as a difference
//! * [`store`]: the current snapshot, swapped as a whole; a connection takes one and sees one truth
//! * [`local_file`]: the source without a control plane, watched for edits
//! * [`baggage`]: how a workload is told about to a peer

pub mod baggage;
pub mod change;
pub mod gateways;
pub mod local_file;
pub mod policies;
pub mod services;
pub mod store;
pub mod workloads;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

pub use change::Change;
pub use gateways::{GatewayAddress, GatewayDestination};
pub use policies::{Policy, PolicyKey};
pub use services::{Endpoint, Service, ServiceKey};
pub use store::Store;
pub use workloads::{Protocol, Workload};

/// Everything known at one moment, indexed for the questions that a connection asks.
#[derive(Debug, Default)]
pub struct Mesh {
    /// By uid.
    workloads: BTreeMap<Arc<str>, Arc<Workload>>,
    /// Who came when. While an address goes from one workload to the next, the control plane may tell of the new owner
    /// before it takes the old one back: the later one has it.
    arrivals: HashMap<Arc<str>, u64>,
    arrived: u64,
    by_address: ByNetworkAddress<Workload>,
    by_name: ByNamespaceAndName<Vec<Arc<Workload>>>,
    /// Workloads that have a host name of their own.
    named: BTreeMap<ServiceKey, Arc<Workload>>,
    services: BTreeMap<ServiceKey, Arc<Service>>,
    by_vip: ByNetworkAddress<Service>,
    by_cidr: HashMap<Arc<str>, Ranges>,
    by_hostname: HashMap<Arc<str>, Vec<Arc<Service>>>,
    endpoints: HashMap<ServiceKey, Vec<Endpoint>>,
    policies: BTreeMap<PolicyKey, Arc<Policy>>,
    global_policies: Vec<Arc<Policy>>,
    namespace_policies: HashMap<Arc<str>, Vec<Arc<Policy>>>,
}

/// By network, then address. Nested, so that a look-up needs no owned key.
type ByNetworkAddress<T> = HashMap<Arc<str>, HashMap<IpAddr, Arc<T>>>;
/// Services that have whole ranges, by the ranges' lengths: an address is looked up once for each length that there is,
/// the longest first.
type Ranges = BTreeMap<Reverse<u8>, HashMap<IpNet, Arc<Service>>>;
type ByNamespaceAndName<T> = HashMap<Arc<str>, HashMap<Arc<str>, T>>;

impl Mesh {
    /// Of two workloads or services with one key or address the later one counts.
    pub fn new(
        workloads: impl IntoIterator<Item = Workload>,
        services: impl IntoIterator<Item = Service>,
        policies: impl IntoIterator<Item = Policy>,
    ) -> Self {
        let mut mesh = Self::default();
        for service in services {
            mesh.services.insert(service.key(), Arc::new(service));
        }
        for workload in workloads {
            mesh.put(workload);
        }
        for policy in policies {
            mesh.policies.insert(policy.key.clone(), Arc::new(policy));
        }
        mesh.index();
        mesh
    }

    /// The same with `changes`.
    #[must_use]
    pub fn with(&self, changes: impl IntoIterator<Item = Change>) -> Self {
        let mut mesh = Self {
            workloads: self.workloads.clone(),
            arrivals: self.arrivals.clone(),
            arrived: self.arrived,
            services: self.services.clone(),
            policies: self.policies.clone(),
            ..Self::default()
        };
        for change in changes {
            match change {
                Change::Workload(workload) => mesh.put(workload),
                Change::Service(service) => drop(mesh.services.insert(service.key(), Arc::new(service))),
                Change::Policy(policy) => drop(mesh.policies.insert(policy.key.clone(), Arc::new(policy))),
                Change::NoWorkload(uid) => {
                    mesh.workloads.remove(&uid);
                    mesh.arrivals.remove(&uid);
                }
                Change::NoService(key) => drop(mesh.services.remove(&key)),
                Change::NoPolicy(key) => drop(mesh.policies.remove(&key)),
            }
        }
        mesh.index();
        mesh
    }

    fn put(&mut self, workload: Workload) {
        self.arrived += 1;
        // Who is told of again has not come again.
        self.arrivals.entry(Arc::clone(&workload.uid)).or_insert(self.arrived);
        self.workloads.insert(Arc::clone(&workload.uid), Arc::new(workload));
    }

    fn index(&mut self) {
        for service in self.services.values() {
            self.by_hostname.entry(Arc::clone(&service.hostname)).or_default().push(Arc::clone(service));
            for (network, vip) in &service.vips {
                let by_ip = self.by_vip.entry(Arc::clone(network)).or_default();
                by_ip.insert(vip.to_canonical(), Arc::clone(service));
            }
            for (network, range) in &service.cidr_vips {
                let ranges = self.by_cidr.entry(Arc::clone(network)).or_default();
                let of_length = ranges.entry(Reverse(range.prefix_len())).or_default();
                of_length.insert(range.trunc(), Arc::clone(service));
            }
        }
        let mut workloads: Vec<_> = self.workloads.values().collect();
        workloads.sort_by_key(|workload| self.arrivals.get(&workload.uid));
        for workload in workloads {
            let by_name = self.by_name.entry(Arc::clone(&workload.namespace)).or_default();
            by_name.entry(Arc::clone(&workload.name)).or_default().push(Arc::clone(workload));
            if let Some(hostname) = &workload.hostname {
                let key =
                    ServiceKey { namespace: Arc::clone(&workload.namespace), hostname: Arc::clone(hostname) };
                self.named.insert(key, Arc::clone(workload));
            }
            // The addresses of host-network pods are the node's: they tell nothing about who it is.
            if !workload.host_network {
                let by_ip = self.by_address.entry(Arc::clone(&workload.network)).or_default();
                for ip in &workload.addresses {
                    by_ip.insert(ip.to_canonical(), Arc::clone(workload));
                }
            }
            for (key, ports) in &workload.services {
                if let Some(service) = self.services.get(key) {
                    let endpoint = Endpoint::new(workload, service, ports);
                    self.endpoints.entry(key.clone()).or_default().push(endpoint);
                }
            }
        }
        for policy in self.policies.values() {
            match policy.scope {
                policies::Scope::Global => self.global_policies.push(Arc::clone(policy)),
                policies::Scope::Namespace => {
                    let namespace = Arc::clone(&policy.key.namespace);
                    self.namespace_policies.entry(namespace).or_default().push(Arc::clone(policy));
                }
                policies::Scope::WorkloadSelector => {} // named by the workloads
            }
        }
    }

    /// The workload that has `ip`. Never one on the host's network.
    pub fn workload_by_address(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(network)?.get(&ip.to_canonical())
    }

    /// The workload of a pod of this node, by what the node agent tells of it.
    pub fn workload_by_name(
        &self,
        namespace: &str,
        name: &str,
        service_account: &str,
    ) -> Option<&Arc<Workload>> {
        let named = self.by_name.get(namespace)?.get(name)?;
        named.iter().find(|workload| &*workload.service_account == service_account)
    }

    /// The workload that bears a host name by itself, as no service of it does.
    pub fn workload_by_hostname(&self, key: &ServiceKey) -> Option<&Arc<Workload>> {
        self.named.get(key)
    }

    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The service whose address it is, else the one that has the narrowest range around it.
    pub fn service_by_vip(&self, network: &str, ip: IpAddr) -> Option<&Arc<Service>> {
        let ip = ip.to_canonical();
        self.by_vip.get(network).and_then(|by_ip| by_ip.get(&ip)).or_else(|| {
            self.by_cidr.get(network)?.iter().find_map(|(Reverse(length), ranges)| {
                // A length that the address' family does not have is the other one's.
                ranges.get(&IpNet::new(ip, *length).ok()?.trunc())
            })
        })
    }

    /// The service of that name. Several namespaces may define one name: the one in `namespace` is preferred,
    /// then the one that calls itself canonical.
    pub fn service_by_hostname(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        let named = self.by_hostname.get(hostname)?;
        let preferred = named.iter().find(|service| &*service.namespace == namespace);
        preferred.or_else(|| named.iter().find(|service| service.canonical)).or_else(|| named.first())
    }

    /// All services of that very name, which may be a wildcard, one of each namespace.
    pub fn services_named(&self, hostname: &str) -> &[Arc<Service>] {
        self.by_hostname.get(hostname).map_or(&[], Vec::as_slice)
    }

    /// Every endpoint of a service, healthy or not.
    pub fn endpoints(&self, service: &ServiceKey) -> &[Endpoint] {
        self.endpoints.get(service).map_or(&[], Vec::as_slice)
    }

    pub fn policy(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// Those that hold for every workload, then those of its namespace.
    pub fn policies_by_scope(&self, namespace: &str) -> impl Iterator<Item = &Arc<Policy>> {
        let of_namespace = self.namespace_policies.get(namespace).map_or(&[][..], Vec::as_slice);
        self.global_policies.iter().chain(of_namespace)
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }
}

#[cfg(test)]
pub(crate) mod tests;
