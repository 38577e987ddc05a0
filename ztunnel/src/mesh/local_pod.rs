//! Which workload is a pod of this node. Workloads of other clusters may have the same names.

use std::{cmp::Reverse, sync::Arc};

use super::Workload;

/// The names by which a pod of this node is found among the workloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPod {
    /// Cluster of this node.
    pub cluster_id: Arc<str>,
    /// Name of this node; empty if it is not configured.
    pub node: Arc<str>,
    /// Namespace of the pod.
    pub namespace: Arc<str>,
    /// Name of the pod.
    pub name: Arc<str>,
    /// Service account of the pod.
    pub service_account: Arc<str>,
}

impl LocalPod {
    /// How well `workload`, which has the pod's name and namespace, fits: the greatest is the pod.
    /// `None`: it is certainly somebody else.
    ///
    /// Clusters often give their nodes the same names, so a workload of another cluster never
    /// fits, whatever its node. Within a cluster the names lead to one pod, to its predecessor on
    /// another node, or to a machine that was registered under the same name.
    pub(super) fn fit(&self, workload: &Workload) -> Option<impl Ord + use<>> {
        let ours = workload.cluster_id == self.cluster_id && workload.service_account == self.service_account;
        let on_this_node = !self.node.is_empty() && workload.node == self.node;
        let is_pod = workload.is_pod();
        // The uid only makes the choice the same every time.
        ours.then(|| (on_this_node, is_pod, Reverse(Arc::clone(&workload.uid))))
    }
}
