//! The workloads of this node, and what they tell of a pod of which nothing is told yet.
//!
//! A control plane tells of a new pod some moments after it has started. Who the pod is, the node
//! agent has proven by then; what all pods of a node share can be learnt from any other of them.

use std::sync::Arc;

use super::{
    LocalPod, Protocol, Workload,
    workloads::{Common, Locality},
};

/// The node of this tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnNode {
    /// Its cluster.
    pub cluster_id: Arc<str>,
    /// Its name; empty if it is not configured, and then nobody is known to be on it.
    pub name: Arc<str>,
}

/// The workloads of this node, unordered.
#[derive(Clone, Debug, Default)]
pub(super) struct Neighbours {
    /// `None`: none are noted.
    node: Option<OwnNode>,
    workloads: Arc<Vec<Arc<Workload>>>,
}

impl Neighbours {
    pub(super) fn of(node: OwnNode) -> Self {
        Self { node: Some(node).filter(|node| !node.name.is_empty()), workloads: Arc::default() }
    }

    /// Nobody of the same node.
    pub(super) fn emptied(self) -> Self {
        Self { workloads: Arc::default(), ..self }
    }

    pub(super) fn put(&mut self, workload: &Arc<Workload>) {
        if self.has(workload) {
            Arc::make_mut(&mut self.workloads).push(Arc::clone(workload));
        }
    }

    pub(super) fn take(&mut self, workload: &Arc<Workload>) {
        if self.has(workload)
            && let Some(place) = self.workloads.iter().position(|one| Arc::ptr_eq(one, workload))
        {
            Arc::make_mut(&mut self.workloads).swap_remove(place);
        }
    }

    /// A pod: machines that were registered by hand say what they like of where they are.
    fn has(&self, workload: &Workload) -> bool {
        self.node.as_ref().is_some_and(|node| {
            workload.node == node.name && workload.cluster_id == node.cluster_id && workload.is_pod()
        })
    }

    /// What `pod` is taken for until it is told: by its own names, and by what is the same for all
    /// pods of its node that are told. `None` if there is none, or if they differ.
    ///
    /// A wrong network would lead past the mesh, in plaintext, and a wrong trust domain to another
    /// identity. Settings of the tunnel only stand in for what is not told, so they do not count.
    pub(super) fn newcomer(&self, pod: &LocalPod) -> Option<Workload> {
        let (first, others) = self.workloads.split_first()?;
        let shared = |workload: &Workload| -> (Arc<str>, Arc<str>, Locality) {
            let Common { trust_domain, network, locality, .. } = &*workload.common;
            (Arc::clone(trust_domain), Arc::clone(network), locality.clone())
        };
        let (trust_domain, network, locality) = shared(first);
        let same = |other: &Arc<Workload>| {
            Arc::ptr_eq(&other.common, &first.common)
                || other.trust_domain == trust_domain
                    && other.network == network
                    && other.locality == locality
        };
        if !others.iter().all(same) {
            return None;
        }
        let LocalPod { cluster_id, node, namespace, name, service_account } = pod;
        let common = Common {
            namespace: Arc::clone(namespace),
            service_account: Arc::clone(service_account),
            trust_domain,
            network,
            cluster_id: Arc::clone(cluster_id),
            protocol: Protocol::Hbone,
            locality,
            ..Common::default()
        };
        Some(Workload {
            uid: format!("{cluster_id}//Pod/{namespace}/{name}").into(),
            name: Arc::clone(name),
            node: Arc::clone(node),
            capacity: 1,
            healthy: true,
            common: Arc::new(common),
            ..Workload::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{
        Mesh, MeshChange,
        tests::{but, local_pod, workload},
    };

    fn told(name: &str, change: impl FnOnce(&mut Common)) -> Workload {
        let uid = format!("Kubernetes//Pod/default/{name}").into();
        but(Workload { uid, ..workload(name, "10.0.0.1") }, change)
    }

    fn mesh(workloads: impl IntoIterator<Item = Workload>) -> Mesh {
        let node = OwnNode { cluster_id: "Kubernetes".into(), name: "node-a".into() };
        Mesh::on_node(node).with(workloads.into_iter().map(MeshChange::PutWorkload))
    }

    #[test]
    fn a_new_pod_is_who_the_agent_says_where_the_pods_of_its_node_are() {
        let east = |common: &mut Common| {
            common.trust_domain = "east.example".into();
            common.network = "east".into();
            common.locality.zone = "a".into();
        };
        let mesh = mesh([told("db-0", east), told("db-1", east)]);
        let new = mesh.newcomer(&local_pod("web-1")).unwrap();
        assert_eq!(new.identity().to_string(), "spiffe://east.example/ns/default/sa/web");
        assert_eq!((&*new.uid, &*new.node), ("Kubernetes//Pod/default/web-1", "node-a"));
        assert_eq!((&*new.network, &*new.locality.zone), ("east", "a"));
        assert!(new.canonical_name.is_empty() && new.addresses.is_empty() && new.policies.is_empty());
    }

    #[test]
    fn nothing_is_made_of_pods_that_differ_or_are_elsewhere() {
        let same = |_: &mut Common| {};
        let elsewhere = Workload { node: "node-b".into(), ..told("db-0", same) };
        let machine = workload("db-0", "10.0.0.1");
        let foreign = told("db-0", |common| common.cluster_id = "other".into());
        for lonely in [elsewhere, machine, foreign] {
            assert_eq!(mesh([lonely]).newcomer(&local_pod("web-1")), None);
        }
        let changes: [fn(&mut Common); 3] = [
            |common| common.network = "west".into(),
            |common| common.trust_domain = "other".into(),
            |common| common.locality.region = "north".into(),
        ];
        for change in changes {
            let differing = mesh([told("db-0", same), told("db-1", change)]);
            assert_eq!(differing.newcomer(&local_pod("web-1")), None);
            let gone = differing.with([MeshChange::RemoveWorkload("Kubernetes//Pod/default/db-1".into())]);
            assert!(gone.newcomer(&local_pod("web-1")).is_some());
            assert_eq!(differing.with([MeshChange::ForgetAddresses]).newcomer(&local_pod("web-1")), None);
        }
        let unnamed = Mesh::on_node(OwnNode { cluster_id: "Kubernetes".into(), name: "".into() });
        let unnamed =
            unnamed.with([MeshChange::PutWorkload(Workload { node: "".into(), ..told("db-0", same) })]);
        assert_eq!(unnamed.newcomer(&local_pod("web-1")), None);
    }

    #[test]
    fn what_the_control_plane_tells_of_the_name_counts() {
        let neighbour = || told("db-0", |_| {});
        let other_account = told("web-1", |common| common.service_account = "other".into());
        for known in [told("web-1", |_| {}), other_account] {
            assert_eq!(mesh([neighbour(), known]).newcomer(&local_pod("web-1")), None);
        }
        let of_another_cluster = told("web-1", |common| common.cluster_id = "other".into());
        assert!(mesh([neighbour(), of_another_cluster]).newcomer(&local_pod("web-1")).is_some());
    }
}
