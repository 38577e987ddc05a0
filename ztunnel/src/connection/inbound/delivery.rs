//! What the authority of a CONNECT means for the pod that it came to: may it be requested for that,
//! and where is the application dialled. Pure.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use crate::connection::error::InboundError;
use crate::{
    config::ProxyTo,
    hbone::ConnectTarget,
    mesh::{GatewayAddress, MeshView, Service, Workload, workloads::ApplicationProtocol},
    route::is_gateway,
};

/// How a connection is handed to the application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Delivery {
    /// Known if a service's name was requested for, or its address at a waypoint.
    pub service: Option<Arc<Service>>,
    /// The pod's own address, and the port in it: what policy is about.
    pub target: SocketAddr,
    pub to: Handover,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handover {
    /// Dialled at the target, from the client's address if that is kept.
    Plain,
    /// Dialled at `dial`, with a PROXY header that names `requested` as the client's destination. A
    /// service that was requested by name has its address and port there, as Istio's tunnel tells
    /// them: by these a waypoint finds its route.
    Proxy { dial: SocketAddr, requested: SocketAddr },
}

/// `local`: the address at which the pod was reached.
pub(super) fn delivery(
    mesh: &MeshView<'_>,
    workload: &Workload,
    local: SocketAddr,
    target: &ConnectTarget,
    proxy_to: ProxyTo,
) -> Result<Delivery, InboundError> {
    let (service, port, requested) = match target {
        ConnectTarget::Address(requested) => {
            let ip = requested.ip().to_canonical();
            let service = if ip == local.ip() {
                None
            } else {
                match waypoint_for(mesh, workload, ip) {
                    Waypoint::OfService(service) => Some(service),
                    Waypoint::OfPod => None,
                    Waypoint::No => {
                        return Err(InboundError::IpMismatch { connection: local.ip(), authority: ip });
                    }
                }
            };
            (service, requested.port(), SocketAddr::new(ip, requested.port()))
        }
        ConnectTarget::Host { name, port } => {
            let (service, resolved) = resolve(mesh, workload, name, *port)?;
            let vip = service.as_ref().and_then(|service| service.vip_for(&workload.network));
            let requested =
                vip.map_or_else(|| SocketAddr::new(local.ip(), resolved), |vip| SocketAddr::new(vip, *port));
            (service, resolved, requested)
        }
    };
    let tunnel = workload.application_tunnel;
    let port = tunnel.and_then(|tunnel| tunnel.port).map_or(port, Into::into);
    let target = SocketAddr::new(local.ip(), port);
    let to = match tunnel.map(|tunnel| tunnel.protocol) {
        Some(ApplicationProtocol::Proxy) => {
            // Without a port of its own, the peer chooses one: on loopback that would lead to whatever
            // the pod shows to nobody, such as Envoy's admin server.
            let is_fixed = tunnel.is_some_and(|tunnel| tunnel.port.is_some());
            let dial = match (proxy_to, target.is_ipv4()) {
                (ProxyTo::PodAddress, _) => target,
                _ if !is_fixed => target,
                (ProxyTo::Loopback, true) => (Ipv4Addr::LOCALHOST, port).into(),
                (ProxyTo::Loopback, false) => (Ipv6Addr::LOCALHOST, port).into(),
            };
            Handover::Proxy { dial, requested }
        }
        Some(ApplicationProtocol::None) | None => Handover::Plain,
    };
    Ok(Delivery { service, target, to })
}

/// Whether, and for what, a workload is the waypoint.
enum Waypoint {
    No,
    OfService(Arc<Service>),
    OfPod,
}

/// Whether what is at `requested` names `workload` as its waypoint.
fn waypoint_for(mesh: &MeshView<'_>, workload: &Workload, requested: IpAddr) -> Waypoint {
    if let Some(service) = mesh.service_by_vip(&workload.network, requested) {
        let ours = is_waypoint_of(mesh, workload, service);
        return if ours { Waypoint::OfService(Arc::clone(service)) } else { Waypoint::No };
    }
    let ours = |waypoint: &GatewayAddress| is_gateway(mesh, workload, waypoint);
    match mesh.workload_by_address(&workload.network, requested) {
        Some(pod) if pod.waypoint.as_ref().is_some_and(ours) => Waypoint::OfPod,
        _ => Waypoint::No,
    }
}

fn is_waypoint_of(mesh: &MeshView<'_>, workload: &Workload, service: &Service) -> bool {
    let weighted = service.weighted_waypoints.iter().map(|waypoint| &waypoint.destination);
    weighted.chain(&service.waypoint).any(|waypoint| is_gateway(mesh, workload, waypoint))
}

/// A service by name, and the port at which this workload serves it, or takes it as its waypoint.
fn resolve(
    mesh: &MeshView<'_>,
    workload: &Workload,
    name: &str,
    port: u16,
) -> Result<(Option<Arc<Service>>, u16), InboundError> {
    if workload.hostname.as_deref() == Some(name) {
        return Ok((None, port));
    }
    let Some(service) = mesh.service_by_hostname(name, &workload.namespace) else {
        return Err(InboundError::UnknownHost(name.to_owned()));
    };
    let ours = mesh.endpoints(&service.key()).iter().find(|endpoint| endpoint.workload.uid == workload.uid);
    if let Some(target) = ours.and_then(|endpoint| endpoint.target_port(service, port)) {
        return Ok((Some(Arc::clone(service)), target));
    }
    if ours.is_none() && service.ports.contains_key(&port) && is_waypoint_of(mesh, workload, service) {
        return Ok((Some(Arc::clone(service)), port));
    }
    Err(InboundError::UnknownPort { service: name.to_owned(), port })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{
        Mesh, MeshChange,
        tests::{service, workload},
        workloads::ApplicationTunnel,
    };

    /// Service `web` at 10.96.0.1 and pod 10.0.0.1, both behind the waypoint at 10.0.8.8; a pod
    /// without one at 10.0.0.2, which serves `named`.
    fn mesh(tunnel: Option<ApplicationTunnel>) -> (Mesh, Workload) {
        let at = |name: &str| GatewayAddress { destination: name.parse().unwrap(), hbone_mtls_port: 15008 };
        let mut web = service("web", "10.96.0.1");
        web.waypoint = Some(at("/10.0.8.8"));
        let mut pod = workload("web-0", "10.0.0.1");
        pod.waypoint = Some(at("/10.0.8.8"));
        let mut named = service("named", "10.96.0.2");
        named.ports = [(80, 8080), (81, 0)].into();
        let mut other = workload("other-0", "10.0.0.2");
        other.services.insert(named.key(), Arc::new([(81, 9191)].into()));
        other.hostname = Some("other.example".into());
        let mut waypoint = workload("waypoint-0", "10.0.8.8");
        waypoint.application_tunnel = tunnel;
        (Mesh::new([pod, other, waypoint.clone()], [web, named], []), waypoint)
    }

    fn delivered(
        tunnel: Option<ApplicationTunnel>,
        authority: &str,
        proxy_to: ProxyTo,
    ) -> Result<Delivery, InboundError> {
        let (mesh, waypoint) = mesh(tunnel);
        let (view, local) = (MeshView::complete(&mesh), "10.0.8.8:15008".parse().unwrap());
        delivery(&view, &waypoint, local, &authority.parse().unwrap(), proxy_to)
    }

    #[test]
    fn a_waypoint_takes_what_is_addressed_to_those_that_name_it() {
        for (authority, target) in [
            ("10.96.0.1:80", Some("10.0.8.8:80")),
            ("10.0.0.1:8080", Some("10.0.8.8:8080")),
            ("10.0.8.8:1234", Some("10.0.8.8:1234")),
            ("web.default.svc.cluster.local:80", Some("10.0.8.8:80")),
            ("10.0.0.2:8080", None),
            ("10.96.0.2:80", None),
            ("10.0.0.3:80", None),
        ] {
            match (delivered(None, authority, ProxyTo::Loopback), target) {
                (Ok(delivery), Some(target)) => {
                    assert_eq!(delivery.target, target.parse().unwrap(), "{authority}");
                    assert_eq!(delivery.to, Handover::Plain);
                }
                (Err(InboundError::IpMismatch { .. }), None) => {}
                (other, _) => panic!("{authority}: {other:?}"),
            }
        }
        assert_eq!(
            &*delivered(None, "10.96.0.1:80", ProxyTo::Loopback).unwrap().service.unwrap().name,
            "web"
        );
    }

    #[test]
    fn a_waypoint_that_speaks_proxy_is_told_what_was_asked_for() {
        let tunnel = |port| {
            Some(ApplicationTunnel {
                protocol: ApplicationProtocol::Proxy,
                port: std::num::NonZeroU16::new(port),
            })
        };
        let requested = "10.96.0.1:80".parse().unwrap();
        for (port, to, dial) in [
            (15088, ProxyTo::Loopback, "127.0.0.1:15088"),
            (15088, ProxyTo::PodAddress, "10.0.8.8:15088"),
            (0, ProxyTo::Loopback, "10.0.8.8:80"),
        ] {
            let delivery = delivered(tunnel(port), "10.96.0.1:80", to).unwrap();
            assert_eq!(delivery.to, Handover::Proxy { dial: dial.parse().unwrap(), requested });
        }
        // By name: the service's address, and its own port.
        let delivery = delivered(tunnel(15088), "web.default.svc.cluster.local:80", ProxyTo::Loopback);
        let dial = "127.0.0.1:15088".parse().unwrap();
        assert_eq!(delivery.unwrap().to, Handover::Proxy { dial, requested });
        let error = delivered(tunnel(15088), "10.0.0.2:8080", ProxyTo::Loopback).unwrap_err();
        assert!(matches!(error, InboundError::IpMismatch { .. }), "{error}");
    }

    #[test]
    fn a_name_leads_to_the_port_at_which_the_pod_serves_it() {
        let (mesh, _) = mesh(None);
        let other = mesh.workloads().find(|pod| &*pod.name == "other-0").unwrap();
        let at = |authority: &str| {
            let local = "10.0.0.2:15008".parse().unwrap();
            let view = MeshView::complete(&mesh);
            delivery(&view, other, local, &authority.parse().unwrap(), ProxyTo::Loopback)
                .map(|delivery| delivery.target.port())
        };
        assert_eq!(at("named.default.svc.cluster.local:80").unwrap(), 8080);
        assert_eq!(at("named.default.svc.cluster.local:81").unwrap(), 9191, "by the port's name");
        assert_eq!(at("other.example:70").unwrap(), 70);
        assert!(matches!(at("named.default.svc.cluster.local:82"), Err(InboundError::UnknownPort { .. })));
        assert!(matches!(at("nobody.default.svc.cluster.local:80"), Err(InboundError::UnknownHost(_))));
        // Another's service, of which it is no waypoint.
        assert!(matches!(at("web.default.svc.cluster.local:80"), Err(InboundError::UnknownPort { .. })));
    }

    /// A pod that serves `named` at 8080, and takes PROXY headers at that port too.
    #[test]
    fn a_service_by_name_is_told_by_its_address_and_the_port_that_was_asked_for() {
        let (mesh, _) = mesh(None);
        let mut other =
            mesh.workloads().find(|pod| &*pod.name == "other-0").map(|pod| (**pod).clone()).unwrap();
        other.application_tunnel =
            Some(ApplicationTunnel { protocol: ApplicationProtocol::Proxy, port: None });
        let mut named = service("named", "10.96.0.2");
        named.ports = [(80, 8080)].into();
        let vip = |network: &str, address: &str| (network.into(), address.parse().unwrap());
        let requested = |vips: Vec<(Arc<str>, IpAddr)>, authority: &str| {
            let named = Service { vips, ..named.clone() };
            let mesh = mesh.with([MeshChange::PutService(named), MeshChange::PutWorkload(other.clone())]);
            let (view, local) = (MeshView::complete(&mesh), "10.0.0.2:15008".parse().unwrap());
            let target = authority.parse().unwrap();
            let delivery = delivery(&view, &other, local, &target, ProxyTo::PodAddress).unwrap();
            let Handover::Proxy { dial, requested } = delivery.to else { panic!("{:?}", delivery.to) };
            (dial.to_string(), requested.to_string())
        };
        let name = "named.default.svc.cluster.local:80";
        let dial = || "10.0.0.2:8080".to_owned();
        for (vips, told) in [
            (vec![vip("", "10.96.0.2")], "10.96.0.2:80"),
            (vec![vip("", "fd96::2"), vip("", "10.96.0.2")], "10.96.0.2:80"),
            (vec![vip("west", "10.97.0.2"), vip("", "fd96::2")], "[fd96::2]:80"),
            (vec![vip("west", "fd97::2"), vip("west", "10.97.0.2")], "10.97.0.2:80"),
            (vec![], "10.0.0.2:8080"),
        ] {
            assert_eq!(requested(vips, name), (dial(), told.to_owned()));
        }
        assert_eq!(
            requested(vec![], "other.example:70"),
            ("10.0.0.2:70".to_owned(), "10.0.0.2:70".to_owned())
        );
    }

    #[test]
    fn what_is_not_known_of_the_request_is_missed() {
        let (mesh, waypoint) = mesh(None);
        let missed = |mesh: &Mesh, authority: &str| {
            let (view, local) = (MeshView::on_demand(mesh), "10.0.8.8:15008".parse().unwrap());
            let _ = delivery(&view, &waypoint, local, &authority.parse().unwrap(), ProxyTo::Loopback);
            view.into_missed()
        };
        let empty = Mesh::default();
        assert_eq!(missed(&empty, "10.0.0.7:80"), ["/10.0.0.7"]);
        assert_eq!(missed(&empty, "web.example:80"), ["default/web.example"]);
        assert!(missed(&empty, "10.0.8.8:80").is_empty(), "its own address");
        for known in ["10.96.0.1:80", "10.0.0.1:80", "web.default.svc.cluster.local:80"] {
            assert!(missed(&mesh, known).is_empty(), "{known}");
            // Of the same, but without the waypoint that they name.
            let gone = mesh.with([MeshChange::RemoveWorkload(waypoint.uid.clone())]);
            assert_eq!(missed(&gone, known), ["/10.0.8.8"], "{known}");
        }
    }
}
