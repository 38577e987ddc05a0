//! Waits for what a connection needs to know before it can be decided: the workload of its own
//! pod, and whatever else the rules look up.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use crate::{
    context::ProcessContext,
    discovery::demand::UnresolvedName,
    mesh::{Mesh, MeshView, Workload},
    pod::ServedPod,
};

/// A connection may come before the source of workloads has described its pod.
const WORKLOAD_TIMEOUT: Duration = Duration::from_secs(5);

/// The pod is served, but no source has described its workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("failed to fetch information about local workload")]
pub(crate) struct UnknownWorkload;

/// The pod's workload and a snapshot that has it, and all policies. Waits up to 5 s for it.
///
/// # Errors
/// No source described the workload in that time.
pub(crate) async fn own_workload(
    process: &ProcessContext,
    pod: &ServedPod,
) -> Result<(Arc<Mesh>, Arc<Workload>), UnknownWorkload> {
    let mut changes = process.store.subscribe();
    let arrived = async {
        loop {
            changes.mark_unchanged();
            // A workload may be told before the policies: whoever waits for it waits for those too.
            if !process.store.is_known() {
                changes.changed().await.ok()?;
                continue;
            }
            let mesh = process.store.snapshot();
            if let Some(workload) = pod.workload(&mesh).cloned() {
                return Some((mesh, workload));
            }
            ask_for_own(process, &pod.info.namespace, &pod.info.name);
            changes.changed().await.ok()?;
        }
    };
    timeout(WORKLOAD_TIMEOUT, arrived).await.ok().flatten().ok_or(UnknownWorkload)
}

/// What the pod is taken for in connections that it makes while its workload is not told, and a
/// snapshot to judge them by. Nobody waits for it.
pub(crate) fn newcomer(process: &ProcessContext, pod: &ServedPod) -> Option<(Arc<Mesh>, Workload)> {
    if !process.store.is_known() {
        return None;
    }
    let mesh = process.store.snapshot();
    let workload = pod.newcomer(&mesh)?;
    ask_for_own(process, &pod.info.namespace, &pod.info.name);
    Some((mesh, workload))
}

/// Where the mesh is known on demand, requests the workload of a pod of this node. Istio's control
/// plane sends those unasked.
pub(crate) fn ask_for_own(process: &ProcessContext, namespace: &str, name: &str) {
    if let Some(demand) = &process.demand {
        // Istio's form of a pod's uid.
        demand.subscribe(&format!("{}//Pod/{namespace}/{name}", process.config.cluster_id));
    }
}

/// What `rule` decides when it knows everything that it looks up, and the snapshot that it decided
/// on.
///
/// Where the mesh is known on demand, requests the names that the rule did not find and runs the
/// rule again, until it misses only names that the control plane has answered before. Otherwise
/// the rule runs once, on `mesh`.
///
/// # Errors
/// The control plane did not answer in time, or too many names of the pod have no answer.
pub(crate) async fn ensure_known<T>(
    process: &ProcessContext,
    pod: &ServedPod,
    mut mesh: Arc<Mesh>,
    mut rule: impl FnMut(&MeshView<'_>) -> T,
) -> Result<(Arc<Mesh>, T), UnresolvedName> {
    let Some(demand) = &process.demand else {
        let decided = rule(&MeshView::complete(&mesh));
        return Ok((mesh, decided));
    };
    loop {
        let (decided, missed) = {
            let view = MeshView::on_demand(&mesh);
            (rule(&view), view.into_missed())
        };
        let mut new = false;
        for name in missed {
            new |= demand.resolve(&name, &pod.uid).await?;
        }
        // An answer may name others in turn. Ends, since a name is new only once.
        if !new {
            return Ok((mesh, decided));
        }
        mesh = process.store.snapshot();
    }
}

/// What `rule` finds for a label, on `mesh`: nobody waits for it. Where the mesh is known on demand
/// and the peer has `proven` that it is of the mesh, requests what the rule did not find, for the
/// next connection; strangers make the control plane no work.
pub(crate) fn for_label<T>(
    process: &ProcessContext,
    pod: &ServedPod,
    mesh: &Mesh,
    proven: bool,
    rule: impl FnOnce(&MeshView<'_>) -> T,
) -> T {
    let Some(demand) = process.demand.as_ref().filter(|_| proven) else {
        return rule(&MeshView::complete(mesh));
    };
    let view = MeshView::on_demand(mesh);
    let found = rule(&view);
    for name in view.into_missed() {
        // A pod with too many names gets no label either.
        let _ = demand.subscribe_for(&name, &pod.uid);
    }
    found
}
