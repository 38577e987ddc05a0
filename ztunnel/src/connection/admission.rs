//! Whether a client may reach a pod, and for how long. The same for HBONE and for plaintext.

use std::net::{IpAddr, SocketAddr};

use crate::{
    context::ProcessContext,
    identity::Identity,
    mesh::{Mesh, Workload},
    pod::ServedPod,
    policy::{self, Denied},
};

/// Whether policy lets `client` reach `target` of `workload`.
pub(super) fn check(
    mesh: &Mesh,
    workload: &Workload,
    client: IpAddr,
    identity: Option<&Identity>,
    target: SocketAddr,
) -> Result<(), Denied> {
    let connection = policy::InboundConnection { source_ip: client, source: identity, destination: target };
    policy::check(mesh, workload, &connection)
}

/// Ends when a change of policy forbids what was allowed. A workload that is no longer known keeps
/// what it has.
pub(super) async fn until_denied(
    process: &ProcessContext,
    pod: &ServedPod,
    client: IpAddr,
    identity: Option<&Identity>,
    target: SocketAddr,
) {
    let mut changes = process.store.subscribe();
    loop {
        changes.mark_unchanged();
        let mesh = process.store.snapshot();
        if let Some(workload) = pod.workload(&mesh)
            && check(&mesh, workload, client, identity, target).is_err()
        {
            return;
        }
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}
