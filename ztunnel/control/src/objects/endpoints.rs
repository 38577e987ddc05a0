//! Endpoints of a service, as an EndpointSlice lists them.

use std::net::IpAddr;

use k8s_openapi::api::discovery::v1 as api;

const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// A slice of a service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EndpointSlice {
    pub name: String,
    pub service: String,
    /// Name of the service's port, and the endpoints' number for it. TCP only.
    pub ports: Vec<(String, u16)>,
    pub endpoints: Vec<Endpoint>,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// A pod, of which the API tells more elsewhere.
    Pod { name: String, uid: String },
    /// Anything else. Its first address is its name.
    Other { addresses: Vec<IpAddr>, ready: bool },
}

impl EndpointSlice {
    /// `None` for a slice of no service, or of names instead of addresses.
    pub(crate) fn read(slice: &api::EndpointSlice) -> Option<Self> {
        if slice.address_type == "FQDN" {
            return None;
        }
        let ports = slice.ports.iter().flatten();
        let ports = ports.filter(|port| port.protocol.as_deref() == Some("TCP"));
        Some(Self {
            name: slice.metadata.name.clone()?,
            service: slice.metadata.labels.as_ref()?.get(SERVICE_NAME)?.clone(),
            ports: ports
                .filter_map(|port| {
                    Some((port.name.clone().unwrap_or_default(), u16::try_from(port.port?).ok()?))
                })
                .collect(),
            endpoints: slice.endpoints.iter().filter_map(endpoint).collect(),
        })
    }
}

/// `None` for one with an address that cannot be read: anybody may have written it.
fn endpoint(endpoint: &api::Endpoint) -> Option<Endpoint> {
    if let Some(target) = &endpoint.target_ref
        && target.kind.as_deref() == Some("Pod")
    {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        return Some(Endpoint::Pod { name: text(&target.name), uid: text(&target.uid) });
    }
    let addresses = endpoint.addresses.iter().map(|address| address.parse());
    let addresses: Vec<IpAddr> = addresses.collect::<Result<_, _>>().ok()?;
    let ready = endpoint.conditions.as_ref().is_none_or(|conditions| conditions.ready.unwrap_or(true));
    (!addresses.is_empty()).then_some(Endpoint::Other { addresses, ready })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_slice_lists_pods_and_others() {
        let slice = json!({
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "u", "port": 1, "protocol": "UDP"}],
        "endpoints": [
            {"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": "web-x", "uid": "u1"}},
            {"addresses": ["192.0.2.1"], "conditions": {"ready": false}},
            {"addresses": ["192.0.2.2"]},
            {"addresses": ["no address"]},
        ]});
        let read = EndpointSlice::read(&serde_json::from_value(slice.clone()).unwrap()).unwrap();
        assert_eq!((read.service.as_str(), &read.ports[..]), ("web", &[("http".to_owned(), 8080)][..]));
        let other =
            |address: &str, ready| Endpoint::Other { addresses: vec![address.parse().unwrap()], ready };
        let pod = Endpoint::Pod { name: "web-x".to_owned(), uid: "u1".to_owned() };
        assert_eq!(read.endpoints, [pod, other("192.0.2.1", false), other("192.0.2.2", true)]);

        for (pointer, value) in [("/addressType", json!("FQDN")), ("/metadata/labels", json!({}))] {
            let mut slice = slice.clone();
            *slice.pointer_mut(pointer).unwrap() = value;
            assert_eq!(EndpointSlice::read(&serde_json::from_value(slice).unwrap()), None, "{pointer}");
        }
    }
}
