//! Objects of the API → resources that tunnels understand, with the meaning that Istio's control
//! plane gives them at layer 4. Pure.
//!
//! * `workload`, `service`: who is there
//! * `policy`, `peer_authentication`: what may pass; where layer 4 cannot tell, less
//! * `address`: an address as bytes

mod address;
mod peer_authentication;
mod policy;
mod service;
mod workload;

use std::{collections::HashMap, sync::Arc};

use crate::{
    objects::{NamespaceObjects, node::NodeLocality},
    report::Unreported,
    settings::MeshSettings,
    snapshot::{NamespaceResources, Resource, Resources},
};

/// What a namespace depends on outside of itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Surroundings<'a> {
    pub settings: &'a MeshSettings,
    /// The root namespace, whose policies are about all others.
    pub root: &'a NamespaceObjects,
    pub nodes: &'a HashMap<String, NodeLocality>,
    /// Whether any namespace has a `PeerAuthentication`.
    pub peer_authentication: bool,
}

/// The resources of a namespace, and what of its policies cannot be enforced as written.
#[derive(Debug, Default)]
pub(crate) struct Converted {
    pub resources: NamespaceResources,
    /// `kind namespace/name` and why.
    pub unenforceable: Vec<(String, String)>,
}

/// The resources of the namespace `name`, which has these `objects`.
pub(crate) fn namespace(around: &Surroundings<'_>, name: &str, objects: &NamespaceObjects) -> Converted {
    let mut addresses = Resources::new();
    let mut add = |resource: Resource| {
        addresses.insert(resource.name().to_owned(), Arc::new(resource));
    };
    let distribution = objects.distribution.values().next().copied();
    for service in objects.services.values() {
        add(Resource::service(service::service(around.settings, name, distribution, service)));
    }
    let attached = workload::Attached::new(around, name, objects);
    for pod in objects.pods.values() {
        add(Resource::workload(workload::of_pod(around, name, pod, &attached)).since(pod.created));
    }
    for slice in objects.slices.values() {
        let of_slice = workload::of_slice(around.settings, name, slice, objects);
        for workload in of_slice {
            add(Resource::workload(workload));
        }
    }

    let mut policies = Resources::new();
    let mut unenforceable = Vec::new();
    for written in objects.policies() {
        let (policy, notes) = policy::policy(&around.settings.root_namespace, name, written);
        if !notes.is_empty() {
            let object = format!("{} {name}/{}", written.kind.name(), written.name);
            unenforceable.push((object, notes.join("; ")));
        }
        if let Some(policy) = policy {
            let resource = Resource::policy(&policy);
            policies.insert(resource.name().to_owned(), Arc::new(resource));
        }
    }
    for policy in peer_authentication::policies(around, name, objects) {
        let resource = Resource::policy(&policy);
        policies.insert(resource.name().to_owned(), Arc::new(resource));
    }
    for written in objects.peer_authentications.values() {
        if let Some(reason) = &written.unreadable {
            let object = format!("PeerAuthentication {name}/{}", written.name);
            unenforceable.push((object, reason.clone()));
        }
    }
    Converted { resources: NamespaceResources { addresses, policies }, unenforceable }
}

/// What the statuses of a namespace's policies do not say yet.
pub(crate) fn reports(settings: &MeshSettings, name: &str, objects: &NamespaceObjects) -> Vec<Unreported> {
    let unreported = objects.policies().filter_map(|written| {
        let (_, notes) = policy::policy(&settings.root_namespace, name, written);
        Unreported::new(policy::report(name, written, &notes)?, &written.conditions)
    });
    let peers = objects.peer_authentications.values().filter_map(|written| {
        let report = peer_authentication::report(&settings.root_namespace, name, objects, written);
        Unreported::new(report, &written.conditions)
    });
    unreported.chain(peers).collect()
}

#[cfg(test)]
mod tests;
