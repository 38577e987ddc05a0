//! Which workload the client is, for labels. Policy uses only certificate and address.

use std::{net::IpAddr, sync::Arc};

use http::{HeaderMap, HeaderValue};

use crate::{
    hbone::{BAGGAGE, FORWARDED_NETWORK},
    identity::Identity,
    mesh::{MeshView, Workload, baggage},
    route::is_gateway,
};

/// The peer, by its TCP connection and by its certificate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer<'a> {
    pub ip: IpAddr,
    pub identity: Option<&'a Identity>,
}

/// Finds the client by its address. A request from another network (`x-forwarded-network`) has the
/// address of our network's gateway: then the client's own baggage counts, if it is `believed`. From
/// any other address it is a stranger's word, and labels by strangers' words would have no end.
pub(super) fn source(
    mesh: &MeshView<'_>,
    workload: &Workload,
    peer: Peer<'_>,
    headers: &HeaderMap,
    believed: bool,
) -> Option<Arc<Workload>> {
    let from = headers.get(FORWARDED_NETWORK).map(HeaderValue::as_bytes);
    if from.is_none_or(|network| network.eq_ignore_ascii_case(workload.network.as_bytes())) {
        return mesh.workload_by_address(&workload.network, peer.ip).cloned();
    }
    if !believed || !is_gateway_of(mesh, workload, peer.ip) {
        return None;
    }
    let lines = headers.get_all(BAGGAGE).iter().filter_map(|line| line.to_str().ok());
    Some(Arc::new(baggage::parse(lines).into_workload(peer.identity)))
}

/// Whether `ip` is the address of the gateway into the network of `workload`.
fn is_gateway_of(mesh: &MeshView<'_>, workload: &Workload, ip: IpAddr) -> bool {
    workload.network_gateway.as_ref().is_some_and(|gateway| {
        let peer = mesh.workload_by_address(&workload.network, ip);
        peer.is_some_and(|peer| is_gateway(mesh, peer, gateway))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{
        GatewayAddress, Mesh,
        tests::{but, ip, workload},
    };

    #[test]
    fn the_client_is_known_by_address_unless_it_comes_from_another_network() {
        let mut server = workload("web-0", "10.0.0.1");
        server.network = "East".into();
        server.network_gateway =
            Some(GatewayAddress { destination: "East/10.0.0.3".parse().unwrap(), hbone_mtls_port: 15008 });
        let east = |name, ip| but(workload(name, ip), |common| common.network = "East".into());
        let mesh =
            Mesh::new([server.clone(), east("near-0", "10.0.0.2"), east("gateway-0", "10.0.0.3")], [], []);
        let identity = "spiffe://td/ns/shop/sa/far".parse().unwrap();
        let known_as = |from: &str, network: Option<&'static str>, believed| {
            let mut headers = HeaderMap::new();
            if let Some(network) = network {
                headers.insert(FORWARDED_NETWORK, HeaderValue::from_static(network));
            }
            headers.insert(BAGGAGE, HeaderValue::from_static("k8s.deployment.name=far"));
            headers.append(BAGGAGE, HeaderValue::from_static("service.name=shop,cloud.region=r"));
            let peer = Peer { ip: ip(from), identity: Some(&identity) };
            source(&MeshView::complete(&mesh), &server, peer, &headers, believed)
        };
        for network in [None, Some("East"), Some("eaST")] {
            assert_eq!(&*known_as("10.0.0.2", network, true).unwrap().name, "near-0", "{network:?}");
        }
        for network in [Some("west"), Some("")] {
            assert!(known_as("10.0.0.2", network, true).is_none(), "a stranger's word");
            let described = known_as("10.0.0.3", network, true).unwrap();
            assert_eq!(
                (&*described.workload_name, &*described.canonical_name),
                ("far", "shop"),
                "{network:?}"
            );
            assert_eq!(
                (&*described.namespace, &*described.locality.region),
                ("shop", "r"),
                "the namespace is proven"
            );
            assert!(known_as("10.0.0.3", network, false).is_none());
        }
    }

    #[test]
    fn an_unknown_client_is_missed_unless_it_comes_from_another_network() {
        let (mesh, server) = (Mesh::default(), workload("web-0", "10.0.0.1"));
        let missed = |headers: &HeaderMap| {
            let view = MeshView::on_demand(&mesh);
            let peer = Peer { ip: ip("10.0.0.2"), identity: None };
            assert!(source(&view, &server, peer, headers, false).is_none());
            view.into_missed()
        };
        let far = HeaderMap::from_iter([(FORWARDED_NETWORK, HeaderValue::from_static("west"))]);
        assert_eq!(missed(&HeaderMap::new()), ["/10.0.0.2"]);
        assert!(missed(&far).is_empty());
    }
}
