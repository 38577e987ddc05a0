//! Everything that tunnels are told, at one moment. Streams share it, and compare two of them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Instant,
};

use aws_lc_rs::digest::{SHA256, digest};
use prost::Message;
use prost_types::Any;
use ztunnel_api::{
    discovery,
    security::Authorization,
    workload::{Address, Service, Workload, WorkloadStatus, address::Type},
};

/// A kind of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResourceType {
    /// Workloads and services.
    Address,
    /// Policies.
    Authorization,
}

impl ResourceType {
    /// As requests and responses name it.
    #[must_use]
    pub fn url(self) -> &'static str {
        match self {
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
        }
    }

    /// `None` for a type that is not served.
    #[must_use]
    pub fn from_url(url: &str) -> Option<Self> {
        [Self::Address, Self::Authorization].into_iter().find(|of| of.url() == url)
    }
}

/// One resource, encoded.
#[derive(Debug)]
pub struct Resource {
    /// As it is in a response.
    entry: Box<[u8]>,
    name: String,
    aliases: Vec<String>,
    /// Equal content has the same, in every replica and after every restart.
    version: String,
    /// Of a pod: when it was created, in seconds since 1970. Else 0.
    created: i64,
    /// Of a workload: whether it is.
    healthy: bool,
    /// Of a workload: its node.
    node: String,
    /// Of a workload: its services.
    services: Vec<String>,
    is_service: bool,
}

impl Resource {
    fn new(of: ResourceType, name: String, aliases: Vec<String>, message: &impl Message) -> Self {
        let value = message.encode_to_vec();
        let hash = digest(&SHA256, &value);
        let mut half = [0; 16];
        half.copy_from_slice(&hash.as_ref()[..16]);
        let version = format!("{:032x}", u128::from_be_bytes(half));
        let resource = Some(Any { type_url: of.url().to_owned(), value });
        let sent = discovery::Resource { version, resource, name, aliases };
        let mut entry = Vec::new();
        // Field 2 of a response.
        prost::encoding::message::encode(2, &sent, &mut entry);
        let (entry, discovery::Resource { version, name, aliases, .. }) = (entry.into_boxed_slice(), sent);
        Self {
            entry,
            name,
            aliases,
            version,
            created: 0,
            healthy: false,
            node: String::new(),
            services: Vec::new(),
            is_service: false,
        }
    }

    pub(crate) fn workload(workload: Workload) -> Self {
        let name = workload.uid.clone();
        let aliases = workload.addresses.iter().filter_map(|address| alias(&workload.network, address));
        let (aliases, node) = (aliases.collect(), workload.node.clone());
        let healthy = workload.status() == WorkloadStatus::Healthy;
        let services = workload.services.keys().cloned().collect();
        let address = Address { r#type: Some(Type::Workload(workload)) };
        Self { healthy, node, services, ..Self::new(ResourceType::Address, name, aliases, &address) }
    }

    /// With the time of the pod's creation.
    pub(crate) fn since(self, created: i64) -> Self {
        Self { created, ..self }
    }

    pub(crate) fn service(service: Service) -> Self {
        let name = format!("{}/{}", service.namespace, service.hostname);
        let addresses = service.addresses.iter();
        let aliases = addresses.filter_map(|address| alias(&address.network, &address.address)).collect();
        let address = Address { r#type: Some(Type::Service(service)) };
        Self { is_service: true, ..Self::new(ResourceType::Address, name, aliases, &address) }
    }

    pub(crate) fn policy(policy: &Authorization) -> Self {
        let name = format!("{}/{}", policy.namespace, policy.name);
        Self::new(ResourceType::Authorization, name, Vec::new(), policy)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As it is in a response: an entry of the list of resources, encoded.
    pub(crate) fn entry(&self) -> &[u8] {
        &self.entry
    }

    /// Everything that it can be asked for by.
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.name).chain(&self.aliases)
    }

    /// Of two pods with one address, the greater one owns it: an address is given to another pod before
    /// the API server says that its last one is gone.
    pub(crate) fn claim(&self) -> (bool, i64) {
        (self.healthy, self.created)
    }

    /// Of a workload: its node. Else empty.
    pub(crate) fn node(&self) -> &str {
        &self.node
    }

    /// Of a workload: its services, by the names of their resources.
    pub(crate) fn services(&self) -> &[String] {
        &self.services
    }

    /// Whether workloads may be of it.
    pub(crate) fn is_service(&self) -> bool {
        self.is_service
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }
}

/// Another name of a resource: by one of its addresses.
fn alias(network: &str, address: &[u8]) -> Option<String> {
    let ip: std::net::IpAddr = match address.len() {
        4 => <[u8; 4]>::try_from(address).ok()?.into(),
        _ => <[u8; 16]>::try_from(address).ok()?.into(),
    };
    Some(format!("{network}/{ip}"))
}

/// By name.
pub type Resources = BTreeMap<String, Arc<Resource>>;

/// The resources of one namespace.
#[derive(Debug, Default)]
pub struct NamespaceResources {
    /// Workloads and services.
    pub addresses: Resources,
    /// Policies.
    pub policies: Resources,
}

impl NamespaceResources {
    fn of(&self, of: ResourceType) -> &Resources {
        match of {
            ResourceType::Address => &self.addresses,
            ResourceType::Authorization => &self.policies,
        }
    }

    /// Keeps of `before` what has not changed, so that two snapshots share it. `true`: all of it.
    pub(crate) fn share(&mut self, before: &Self) -> bool {
        let share = |now: &mut Resources, before: &Resources| {
            let mut same = now.len() == before.len();
            for (name, resource) in now.iter_mut() {
                let is_same = |held: &&Arc<Resource>| {
                    held.version() == resource.version() && held.created == resource.created
                };
                match before.get(name).filter(is_same) {
                    Some(held) => *resource = Arc::clone(held),
                    None => same = false,
                }
            }
            same
        };
        let addresses = share(&mut self.addresses, &before.addresses);
        share(&mut self.policies, &before.policies) && addresses
    }
}

/// Everything that tunnels are told, at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// Grows with each.
    pub number: u64,
    /// When the first change was received that led to it.
    pub changed: Instant,
    pub(crate) namespaces: BTreeMap<String, Arc<NamespaceResources>>,
    /// Made when somebody asks by name.
    index: OnceLock<AddressIndex>,
    differences: Mutex<Vec<SharedDifference>>,
}

/// From how many earlier snapshots the differences are kept. Nearly all tunnels have one of the last.
const DIFFERENCES: usize = 8;

/// What those must be told who hold an earlier snapshot.
#[derive(Clone, Debug)]
struct SharedDifference {
    before: u64,
    of: ResourceType,
    is: Arc<OnceLock<Arc<Difference>>>,
}

/// Workloads and services by whatever they can be asked for.
#[derive(Debug, Default)]
struct AddressIndex {
    names: HashMap<String, Vec<Arc<Resource>>>,
    nodes: HashMap<String, Vec<Arc<Resource>>>,
    services: HashMap<String, Vec<Arc<Resource>>>,
}

/// The difference between two snapshots.
#[derive(Clone, Debug, Default)]
pub struct Difference {
    /// New or changed.
    pub changed: Vec<Arc<Resource>>,
    /// Names of what is gone.
    pub removed: Vec<String>,
}

impl Snapshot {
    pub(crate) fn new(
        number: u64,
        changed: Instant,
        namespaces: BTreeMap<String, Arc<NamespaceResources>>,
    ) -> Self {
        Self { number, changed, namespaces, index: OnceLock::new(), differences: Mutex::default() }
    }

    /// All resources of a kind.
    pub fn all(&self, of: ResourceType) -> impl Iterator<Item = &Arc<Resource>> {
        self.namespaces.values().flat_map(move |namespace| namespace.of(of).values())
    }

    /// What somebody who holds `before` must be told. It is found out once for all that hold it.
    #[must_use]
    pub fn since(&self, before: &Self, of: ResourceType) -> Arc<Difference> {
        let shared = self.shared(before.number, of);
        Arc::clone(shared.get_or_init(|| Arc::new(self.compare(before, of))))
    }

    fn shared(&self, before: u64, of: ResourceType) -> Arc<OnceLock<Arc<Difference>>> {
        let mut all = self.differences.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = all.iter().find(|known| known.before == before && known.of == of) {
            return Arc::clone(&known.is);
        }
        if all.len() == DIFFERENCES {
            all.remove(0);
        }
        let new = SharedDifference { before, of, is: Arc::default() };
        all.push(new.clone());
        new.is
    }

    /// Namespaces that both share cost nothing.
    fn compare(&self, before: &Self, of: ResourceType) -> Difference {
        let nothing = NamespaceResources::default();
        let mut difference = Difference::default();
        let names: BTreeSet<&String> = self.namespaces.keys().chain(before.namespaces.keys()).collect();
        for name in names {
            let (now, was) = (self.namespaces.get(name), before.namespaces.get(name));
            if let (Some(now), Some(was)) = (now, was)
                && Arc::ptr_eq(now, was)
            {
                continue;
            }
            let now = now.map_or(&nothing, |namespace| &**namespace).of(of);
            let was = was.map_or(&nothing, |namespace| &**namespace).of(of);
            let news = now.iter().filter(|(name, resource)| {
                was.get(*name).is_none_or(|held| held.version() != resource.version())
            });
            difference.changed.extend(news.map(|(_, resource)| Arc::clone(resource)));
            difference.removed.extend(was.keys().filter(|name| !now.contains_key(*name)).cloned());
        }
        difference
    }

    /// The policy of this name.
    #[must_use]
    pub fn policy_named(&self, name: &str) -> Option<&Arc<Resource>> {
        let (namespace, _) = name.split_once('/')?;
        self.namespaces.get(namespace)?.policies.get(name)
    }

    /// Workloads and services of this name: a resource's own, or `network/address`.
    #[must_use]
    pub fn addresses_named(&self, name: &str) -> &[Arc<Resource>] {
        self.index().names.get(name).map_or(&[], Vec::as_slice)
    }

    /// The workloads of a service, by the name of its resource.
    #[must_use]
    pub fn workloads_of(&self, service: &str) -> &[Arc<Resource>] {
        self.index().services.get(service).map_or(&[], Vec::as_slice)
    }

    /// The workloads of a node.
    #[must_use]
    pub fn workloads_on(&self, node: &str) -> &[Arc<Resource>] {
        self.index().nodes.get(node).map_or(&[], Vec::as_slice)
    }

    fn index(&self) -> &AddressIndex {
        self.index.get_or_init(|| {
            let mut index = AddressIndex::default();
            for resource in self.all(ResourceType::Address) {
                let add = |map: &mut HashMap<String, Vec<Arc<Resource>>>, key: &String| {
                    map.entry(key.clone()).or_default().push(Arc::clone(resource));
                };
                for name in resource.names() {
                    add(&mut index.names, name);
                }
                for service in &resource.services {
                    add(&mut index.services, service);
                }
                if !resource.node.is_empty() {
                    add(&mut index.nodes, &resource.node);
                }
            }
            index
        })
    }
}
