//! The pods that this process serves, by name, for their neighbours.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, PoisonError, RwLock},
};

use super::ServedPod;
use crate::mesh::{Mesh, Workload};

/// Namespace and name.
type PodName = (Arc<str>, Arc<str>);

/// The pods that this process serves, by name. Its only writer is the list of pods. A pod that is made
/// anew under its name, as of a `StatefulSet`, may be here beside the one that ends.
#[derive(Debug, Default)]
pub struct PodIndex(RwLock<HashMap<PodName, Vec<Arc<ServedPod>>>>);

impl PodIndex {
    /// `pod` is served from now on.
    pub(crate) fn add(&self, pod: &Arc<ServedPod>) {
        let mut pods = self.0.write().unwrap_or_else(PoisonError::into_inner);
        pods.entry(name(pod)).or_default().push(Arc::clone(pod));
    }

    /// `pod` is not.
    pub(crate) fn remove(&self, pod: &Arc<ServedPod>) {
        let mut pods = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let name = name(pod);
        if let Some(held) = pods.get_mut(&name) {
            held.retain(|held| !Arc::ptr_eq(held, pod));
            if held.is_empty() {
                pods.remove(&name);
            }
        }
    }

    /// The pod that `mesh` knows as `workload`, with the same node, cluster and service account, and
    /// that has the address of `address`.
    pub(crate) fn find(
        &self,
        workload: &Workload,
        mesh: &Mesh,
        address: SocketAddr,
    ) -> Option<Arc<ServedPod>> {
        let name = (Arc::clone(&workload.namespace), Arc::clone(&workload.name));
        let candidates = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&name)?.clone();
        candidates.into_iter().find(|pod| {
            let known = pod.workload(mesh).is_some_and(|known| known.uid == workload.uid);
            known && !pod.stop.is_cancelled() && pod.has(address)
        })
    }
}

fn name(pod: &ServedPod) -> PodName {
    (Arc::clone(&pod.info.namespace), Arc::clone(&pod.info.name))
}
