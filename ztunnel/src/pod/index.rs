//! The pods that this process serves, by name, for their neighbours.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use super::ServedPod;
use crate::mesh::{Mesh, Workload};

/// Namespace and name.
type PodName = (Arc<str>, Arc<str>);

/// The pods that this process serves, by name. Its only writer is the list of pods.
#[derive(Debug, Default)]
pub struct PodIndex(RwLock<HashMap<PodName, Arc<ServedPod>>>);

impl PodIndex {
    /// `pod` is served from now on.
    pub(crate) fn add(&self, pod: &Arc<ServedPod>) {
        let mut pods = self.0.write().unwrap_or_else(PoisonError::into_inner);
        pods.insert(name(pod), Arc::clone(pod));
    }

    /// `pod` is not. Another one of its name stays.
    pub(crate) fn remove(&self, pod: &Arc<ServedPod>) {
        let mut pods = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let name = name(pod);
        if pods.get(&name).is_some_and(|held| Arc::ptr_eq(held, pod)) {
            pods.remove(&name);
        }
    }

    /// The pod that `mesh` knows as `workload`, with the same node, cluster and service account.
    pub(crate) fn find(&self, workload: &Workload, mesh: &Mesh) -> Option<Arc<ServedPod>> {
        let name = (Arc::clone(&workload.namespace), Arc::clone(&workload.name));
        let pods = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let pod = pods.get(&name)?;
        let known = pod.workload(mesh)?;
        (known.uid == workload.uid && !pod.stop.is_cancelled()).then(|| Arc::clone(pod))
    }
}

fn name(pod: &ServedPod) -> PodName {
    (Arc::clone(&pod.info.namespace), Arc::clone(&pod.info.name))
}
