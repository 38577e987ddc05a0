//! Look-ups of a rule in one snapshot, with a note of the names that were not found.
//!
//! Where the mesh is known on demand only, a name that a rule did not find may exist all the same.
//! A rule that looks things up through a [`MeshView`] cannot forget to have them requested: its
//! caller takes the [missed](MeshView::into_missed) names, requests them, and runs the rule again
//! on a newer snapshot.

use std::{cell::RefCell, net::IpAddr, sync::Arc};

use super::{Endpoints, GatewayAddress, GatewayDestination, Mesh, Service, ServiceKey, Workload};

/// The look-ups that rules may do. Two with one address note one name, since the control plane has
/// one answer to it.
#[derive(Debug)]
pub struct MeshView<'a> {
    mesh: &'a Mesh,
    /// `None`: the mesh is complete, nothing is noted.
    missed: Option<RefCell<Vec<String>>>,
}

/// What the name of a gateway or waypoint stands for.
#[derive(Clone, Copy, Debug)]
pub enum NamedGateway<'a> {
    /// A service; one of its endpoints is chosen.
    Service(&'a Arc<Service>),
    /// A workload.
    Workload(&'a Arc<Workload>),
}

impl<'a> MeshView<'a> {
    /// Of a mesh that is known as a whole: what is not found does not exist.
    #[must_use]
    pub fn complete(mesh: &'a Mesh) -> Self {
        Self { mesh, missed: None }
    }

    /// Of a mesh that is known on demand.
    #[must_use]
    pub fn on_demand(mesh: &'a Mesh) -> Self {
        Self { mesh, missed: Some(RefCell::default()) }
    }

    /// The names to request from the control plane, in its own form: `network/address` or
    /// `namespace/hostname`. Each is there once.
    pub fn into_missed(self) -> Vec<String> {
        self.missed.map(RefCell::into_inner).unwrap_or_default()
    }

    /// The service that has the address `ip`. See [`Mesh::service_by_vip`].
    pub fn service_by_vip(&self, network: &str, ip: IpAddr) -> Option<&'a Arc<Service>> {
        let found = self.mesh.service_by_vip(network, ip);
        self.note(found, || {
            let known = self.mesh.workload_by_address(network, ip).is_some();
            (!known).then(|| address_name(network, ip))
        })
    }

    /// The workload that has the address `ip`. See [`Mesh::workload_by_address`].
    pub fn workload_by_address(&self, network: &str, ip: IpAddr) -> Option<&'a Arc<Workload>> {
        let found = self.mesh.workload_by_address(network, ip);
        self.note(found, || {
            let known = self.mesh.service_by_vip(network, ip).is_some();
            (!known).then(|| address_name(network, ip))
        })
    }

    /// The service of that name, as a workload in `namespace` means it. See
    /// [`Mesh::service_by_hostname`].
    pub fn service_by_hostname(&self, hostname: &str, namespace: &str) -> Option<&'a Arc<Service>> {
        let found = self.mesh.service_by_hostname(hostname, namespace);
        self.note(found, || Some(format!("{namespace}/{hostname}")))
    }

    /// What `gateway` names. By address: a service's, else a workload's. By host name likewise.
    pub fn gateway(&self, gateway: &GatewayAddress) -> Option<NamedGateway<'a>> {
        let mesh = self.mesh;
        let found = match &gateway.destination {
            GatewayDestination::Address(network, ip) => match mesh.service_by_vip(network, *ip) {
                Some(service) => Some(NamedGateway::Service(service)),
                None => mesh.workload_by_address(network, *ip).map(NamedGateway::Workload),
            },
            GatewayDestination::Hostname(key) => match mesh.service(key) {
                Some(service) => Some(NamedGateway::Service(service)),
                None => mesh.workload_by_hostname(key).map(NamedGateway::Workload),
            },
        };
        self.note(found, || Some(gateway.destination.to_string()))
    }

    /// The endpoints of a service that was found. The control plane gives them with the service.
    pub fn endpoints(&self, service: &ServiceKey) -> &'a Endpoints {
        self.mesh.endpoints(service)
    }

    /// Passes `found` on. If there is nothing, notes the name, if there is one.
    fn note<T>(&self, found: Option<T>, name: impl FnOnce() -> Option<String>) -> Option<T> {
        if found.is_none()
            && let Some(missed) = &self.missed
            && let Some(name) = name()
        {
            let mut missed = missed.borrow_mut();
            if !missed.contains(&name) {
                missed.push(name);
            }
        }
        found
    }
}

/// How the control plane names an address.
fn address_name(network: &str, ip: IpAddr) -> String {
    GatewayDestination::Address(network.into(), ip.to_canonical()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::tests::{ip, service, workload};

    fn named(destination: &str) -> GatewayAddress {
        GatewayAddress { destination: destination.parse().unwrap(), hbone_mtls_port: 15008 }
    }

    fn missed(mesh: &Mesh, look_up: impl Fn(&MeshView<'_>)) -> Vec<String> {
        let complete = MeshView::complete(mesh);
        look_up(&complete);
        assert!(complete.into_missed().is_empty(), "what is not there does not exist");
        let view = MeshView::on_demand(mesh);
        look_up(&view);
        look_up(&view);
        view.into_missed()
    }

    #[test]
    fn every_look_up_notes_what_it_missed_once() {
        type LookUp = fn(&MeshView<'_>);
        let look_ups: [(LookUp, &str); 5] = [
            (|view| assert!(view.service_by_vip("", ip("::ffff:10.0.0.1")).is_none()), "/10.0.0.1"),
            (|view| assert!(view.workload_by_address("east", ip("fd00::1")).is_none()), "east/fd00::1"),
            (|view| assert!(view.service_by_hostname("web.example", "shop").is_none()), "shop/web.example"),
            (|view| assert!(view.gateway(&named("east/10.0.0.9")).is_none()), "east/10.0.0.9"),
            (|view| assert!(view.gateway(&named("shop/gate.example")).is_none()), "shop/gate.example"),
        ];
        for (look_up, name) in look_ups {
            assert_eq!(missed(&Mesh::default(), look_up), [name]);
        }
    }

    #[test]
    fn what_was_found_is_not_noted() {
        let mesh = Mesh::new([workload("pod", "10.0.0.1")], [service("web", "10.96.0.1")], []);
        let look_up = |view: &MeshView<'_>| {
            for address in ["10.0.0.1", "10.96.0.1"] {
                // One of the two is found, and an address has one name.
                let service = view.service_by_vip("", ip(address));
                assert!(service.is_some() != view.workload_by_address("", ip(address)).is_some());
                view.gateway(&named(&format!("/{address}"))).unwrap();
            }
            view.service_by_hostname("web.default.svc.cluster.local", "shop").unwrap();
            view.gateway(&named("default/web.default.svc.cluster.local")).unwrap();
        };
        assert!(missed(&mesh, look_up).is_empty());
    }
}
