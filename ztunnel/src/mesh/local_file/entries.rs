//! The document and its workloads as written, and the checks on each.

use std::{collections::BTreeMap, net::IpAddr, num::NonZeroU16, sync::Arc};

use serde::Deserialize;

use super::{
    LocalFileError, ResourceDefaults,
    check::{keys, or},
    invalid,
    policies::PolicyEntry,
    services::{GatewayEntry, ServiceEntry},
};
use crate::{
    identity::Identity,
    mesh::{
        InvalidKey, Protocol, Workload,
        services::PortMap,
        workloads::{ApplicationProtocol, ApplicationTunnel, Common, Locality},
    },
};

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Document {
    pub workloads: Vec<WorkloadEntry>,
    pub services: Vec<ServiceEntry>,
    pub policies: Vec<PolicyEntry>,
}

/// A workload as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WorkloadEntry {
    name: String,
    namespace: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    service_account: String,
    #[serde(default)]
    trust_domain: String,
    #[serde(default)]
    workload_ips: Vec<IpAddr>,
    workload_ip: Option<IpAddr>,
    #[serde(default)]
    protocol: ProtocolEntry,
    #[serde(default)]
    network_mode: NetworkModeEntry,
    #[serde(default)]
    network: String,
    #[serde(default)]
    node: String,
    #[serde(default)]
    cluster_id: String,
    #[serde(default)]
    canonical_name: String,
    #[serde(default)]
    canonical_revision: String,
    #[serde(default)]
    workload_name: String,
    #[serde(default)]
    workload_type: String,
    #[serde(default)]
    locality: LocalityEntry,
    #[serde(default)]
    authorization_policies: Vec<String>,
    #[serde(default)]
    services: BTreeMap<String, PortMap>,
    #[serde(default)]
    status: StatusEntry,
    capacity: Option<u32>,
    waypoint: Option<GatewayEntry>,
    network_gateway: Option<GatewayEntry>,
    #[serde(default)]
    native_tunnel: bool,
    application_tunnel: Option<ApplicationTunnelEntry>,
    #[serde(default)]
    hostname: String,
}

#[derive(Default, Deserialize)]
enum ProtocolEntry {
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "HBONE")]
    Hbone,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ApplicationTunnelEntry {
    #[serde(default)]
    protocol: ApplicationProtocolEntry,
    port: Option<u16>,
}

#[derive(Clone, Copy, Default, Deserialize)]
enum ApplicationProtocolEntry {
    #[default]
    #[serde(rename = "NONE")]
    None,
    #[serde(rename = "PROXY")]
    Proxy,
}

impl From<ApplicationTunnelEntry> for ApplicationTunnel {
    fn from(entry: ApplicationTunnelEntry) -> Self {
        Self {
            protocol: match entry.protocol {
                ApplicationProtocolEntry::None => ApplicationProtocol::None,
                ApplicationProtocolEntry::Proxy => ApplicationProtocol::Proxy,
            },
            // As in the protocol definition, 0 means unset.
            port: entry.port.and_then(NonZeroU16::new),
        }
    }
}

#[derive(Default, Deserialize)]
enum NetworkModeEntry {
    #[default]
    Standard,
    HostNetwork,
}

#[derive(Default, Deserialize)]
enum StatusEntry {
    #[default]
    Healthy,
    Unhealthy,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct LocalityEntry {
    region: String,
    zone: String,
    subzone: String,
}

impl WorkloadEntry {
    pub(super) fn check(self, defaults: &ResourceDefaults) -> Result<Workload, LocalFileError> {
        let object = format!("workload {}/{}", self.namespace, self.name);
        if self.name.is_empty() || self.namespace.is_empty() {
            return Err(invalid(object, "name, namespace", "may not be empty"));
        }
        let uid = or(self.uid, || format!("{}/{}", self.namespace, self.name));
        let service_account = or(self.service_account, || "default".to_owned());
        let trust_domain = or(self.trust_domain, || defaults.trust_domain.to_string());
        let gateway =
            |entry: Option<GatewayEntry>, key| entry.map(|entry| entry.check(&object, key)).transpose();
        let services: BTreeMap<_, PortMap> = keys(&object, "services", self.services)?;
        let common = Common {
            services: services.into_iter().map(|(key, ports)| (key, Arc::new(ports))).collect(),
            policies: self
                .authorization_policies
                .iter()
                .map(|key| {
                    key.parse().map_err(|error: InvalidKey| {
                        invalid(&object, "authorizationPolicies", error.to_string())
                    })
                })
                .collect::<Result<_, _>>()?,
            service_account: service_account.into(),
            trust_domain: trust_domain.into(),
            protocol: match self.protocol {
                ProtocolEntry::Tcp => Protocol::Tcp,
                ProtocolEntry::Hbone => Protocol::Hbone,
            },
            host_network: matches!(self.network_mode, NetworkModeEntry::HostNetwork),
            network: self.network.into(),
            cluster_id: or(self.cluster_id, || defaults.cluster_id.to_string()).into(),
            canonical_name: self.canonical_name.into(),
            canonical_revision: self.canonical_revision.into(),
            workload_name: or(self.workload_name, || self.name.clone()).into(),
            workload_type: self.workload_type.to_lowercase().into(),
            locality: Locality {
                region: self.locality.region.into(),
                zone: self.locality.zone.into(),
                subzone: self.locality.subzone.into(),
            },
            native_tunnel: self.native_tunnel,
            waypoint: gateway(self.waypoint, "waypoint")?,
            network_gateway: gateway(self.network_gateway, "networkGateway")?,
            hostname: (!self.hostname.is_empty()).then(|| self.hostname.into()),
            application_tunnel: self.application_tunnel.map(ApplicationTunnel::from),
            namespace: self.namespace.into(),
        };
        let workload = Workload {
            uid: uid.into(),
            name: self.name.into(),
            node: self.node.into(),
            addresses: self.workload_ips.into_iter().chain(self.workload_ip).collect(),
            capacity: self.capacity.unwrap_or(1),
            healthy: matches!(self.status, StatusEntry::Healthy),
            common: Arc::new(common),
        };
        let identity = workload.identity().to_string();
        if identity.parse::<Identity>().is_err() {
            let reason = format!("{identity} is not a valid identity");
            return Err(invalid(object, "trustDomain, namespace, serviceAccount", reason));
        }
        Ok(workload)
    }
}
