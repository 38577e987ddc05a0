//! The entries of the mesh's tables, and the key by which each table finds a workload or service.

use std::{net::IpAddr, sync::Arc};

use super::{Endpoints, Service, ServiceKey, Workload, table::Keyed};

#[derive(Clone, Debug)]
pub(super) struct ByUid(pub Arc<Workload>);

impl Keyed for ByUid {
    type Key<'a> = &'a str;

    fn key(&self) -> &str {
        &self.0.uid
    }

    fn has(&self, key: &&str) -> bool {
        *self.0.uid == **key
    }
}

/// By network and one of its addresses.
#[derive(Clone, Debug)]
pub(super) struct ByAddress {
    pub workload: Arc<Workload>,
    /// Its index in the list of addresses.
    pub address: usize,
    /// When the workload got this address, counted in changes. When an address moves from one
    /// workload to the next, the control plane may send the new owner before it removes the old one.
    /// The later one owns the address.
    pub since: u64,
}

impl Keyed for ByAddress {
    type Key<'a> = (&'a str, IpAddr);

    fn key(&self) -> (&str, IpAddr) {
        (&self.workload.network, self.workload.addresses[self.address].to_canonical())
    }

    fn has(&self, key: &(&str, IpAddr)) -> bool {
        self.key() == *key
    }
}

/// By namespace and name.
#[derive(Clone, Debug)]
pub(super) struct ByName(pub Arc<Workload>);

impl Keyed for ByName {
    type Key<'a> = (&'a str, &'a str);

    fn key(&self) -> (&str, &str) {
        (&self.0.namespace, &self.0.name)
    }

    fn has(&self, key: &(&str, &str)) -> bool {
        self.key() == *key
    }
}

/// By namespace and the workload's own host name.
#[derive(Clone, Debug)]
pub(super) struct HostnameInOwnNamespace(pub Arc<Workload>);

impl Keyed for HostnameInOwnNamespace {
    type Key<'a> = (&'a str, &'a str);

    fn key(&self) -> (&str, &str) {
        (&self.0.namespace, self.0.hostname.as_deref().unwrap_or_default())
    }

    fn has(&self, key: &(&str, &str)) -> bool {
        self.key() == *key
    }
}

#[derive(Clone, Debug)]
pub(super) struct ServiceByKey(pub Arc<Service>);

impl Keyed for ServiceByKey {
    type Key<'a> = (&'a str, &'a str);

    fn key(&self) -> (&str, &str) {
        (&self.0.namespace, &self.0.hostname)
    }

    fn has(&self, key: &(&str, &str)) -> bool {
        self.key() == *key
    }
}

/// By host name, which services of several namespaces may have.
#[derive(Clone, Debug)]
pub(super) struct ServiceByHostname(pub Arc<Service>);

impl Keyed for ServiceByHostname {
    type Key<'a> = &'a str;

    fn key(&self) -> &str {
        &self.0.hostname
    }

    fn has(&self, key: &&str) -> bool {
        *self.0.hostname == **key
    }
}

/// By network and one of its addresses.
#[derive(Clone, Debug)]
pub(super) struct ServiceByVip {
    pub service: Arc<Service>,
    /// Which of them.
    pub vip: usize,
}

impl Keyed for ServiceByVip {
    type Key<'a> = (&'a str, IpAddr);

    fn key(&self) -> (&str, IpAddr) {
        let (network, ip) = &self.service.vips[self.vip];
        (network, ip.to_canonical())
    }

    fn has(&self, key: &(&str, IpAddr)) -> bool {
        self.key() == *key
    }
}

/// The known endpoints of a service, whether or not the service itself is known yet.
#[derive(Clone, Debug)]
pub(super) struct EndpointsOf {
    pub service: ServiceKey,
    pub endpoints: Arc<Endpoints>,
}

impl Keyed for EndpointsOf {
    type Key<'a> = (&'a str, &'a str);

    fn key(&self) -> (&str, &str) {
        self.service.parts()
    }

    fn has(&self, key: &(&str, &str)) -> bool {
        self.key() == *key
    }
}
