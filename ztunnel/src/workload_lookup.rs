//! What a connection must know before it can be judged: its pod's workload, and whatever else its rules ask for.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use crate::{
    context::ProcessContext,
    discovery::demand::UnresolvedName,
    mesh::{Mesh, Workload},
    pod::Pod,
};

/// A connection may come before the source of workloads has told about its pod.
const WORKLOAD_TIMEOUT: Duration = Duration::from_secs(5);

/// The pod is served, but nobody has told what workload it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("failed to fetch information about local workload")]
pub struct UnknownWorkload;

impl ProcessContext {
    /// The pod's workload and the snapshot that has it. Waits for it a little, if it is not there yet.
    pub async fn workload(&self, pod: &Pod) -> Result<(Arc<Mesh>, Arc<Workload>), UnknownWorkload> {
        let mut changes = self.store.subscribe();
        let arrived = async {
            loop {
                changes.mark_unchanged();
                let mesh = self.store.snapshot();
                let info = &pod.info;
                let found =
                    mesh.workload_by_name(&info.namespace, &info.name, &info.service_account).cloned();
                if let Some(workload) = found {
                    return Some((mesh, workload));
                }
                if let Some(demand) = &self.demand {
                    // As Istio's control plane calls a pod; it tells of this node's by itself.
                    demand.subscribe(&format!(
                        "{}//Pod/{}/{}",
                        self.config.cluster_id, info.namespace, info.name
                    ));
                }
                changes.changed().await.ok()?;
            }
        };
        timeout(WORKLOAD_TIMEOUT, arrived).await.ok().flatten().ok_or(UnknownWorkload)
    }

    /// A snapshot that has all of what is `missing` in `mesh`, by name, or of which the control plane said that it is not
    /// there. Where the mesh is told of as a whole, that is `mesh` itself.
    pub async fn informed(
        &self,
        mut mesh: Arc<Mesh>,
        missing: impl Fn(&Mesh) -> Vec<String>,
    ) -> Result<Arc<Mesh>, UnresolvedName> {
        let Some(demand) = &self.demand else { return Ok(mesh) };
        loop {
            let mut new = false;
            for name in missing(&mesh) {
                new |= demand.resolve(&name).await?;
            }
            // What was told may name others in turn. Ends, since a name is new once.
            if !new {
                return Ok(mesh);
            }
            mesh = self.store.snapshot();
        }
    }
}
