//! Proxies between client and target: waypoints, and gateways of other networks.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use serde::{Serialize, Serializer};

use super::{InvalidKey, ServiceKey};

/// A proxy that carries traffic for others.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayAddress {
    pub(crate) destination: GatewayDestination,
    /// Its HBONE port. Never 0.
    pub hbone_mtls_port: u16,
}

/// The address or host name of a gateway. Both may belong to a workload or to a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// Network and address.
    Address(Arc<str>, IpAddr),
    /// Namespace and host name.
    Hostname(ServiceKey),
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(network, ip) => write!(f, "{network}/{ip}"),
            Self::Hostname(key) => key.fmt(f),
        }
    }
}

/// `network/address` or `namespace/hostname`. The part after the slash decides which.
impl FromStr for GatewayDestination {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some((network, ip)) = text.rsplit_once('/')
            && let Ok(ip) = ip.parse::<IpAddr>()
        {
            return Ok(Self::Address(network.into(), ip.to_canonical()));
        }
        text.parse()
            .map(Self::Hostname)
            .map_err(|_| InvalidKey::new("gateway", text, "network/address or namespace/hostname"))
    }
}

impl Serialize for GatewayDestination {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for GatewayAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.destination, self.hbone_mtls_port)
    }
}

/// One of several waypoints of a service that share its traffic by weight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub destination: GatewayAddress,
    /// Its share. 0: no traffic.
    pub weight: u32,
}
