//! Takes a taint off the node when the watcher is ready (`--startup-taint`).
//!
//! A node that registers with that taint gets no pod but those that tolerate it, as the watcher's
//! and the tunnel's do. So no other pod starts before the watcher can close it at birth. The taint
//! is taken off once: whoever puts it back wants it there.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Taint};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::{backoff::Backoff, cause};

/// Waits until the watcher is ready, then takes every taint of `key` off `node`, however long that
/// takes. Ends at once when the watcher ends first.
pub(super) async fn remove_when_ready(
    client: Client,
    node: String,
    key: String,
    ready: oneshot::Receiver<()>,
) {
    if ready.await.is_err() {
        return;
    }
    let nodes = Api::<Node>::all(client);
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_mins(1));
    loop {
        match remove(&nodes, &node, &key).await {
            Ok(true) => return info!(node, taint = key, "startup taint removed"),
            Ok(false) => return info!(node, taint = key, "the node does not have the startup taint"),
            Err(error) => {
                let error = cause(&error);
                warn!(node, taint = key, error, "cannot remove the startup taint; trying again");
            }
        }
        tokio::time::sleep(backoff.next()).await;
    }
}

/// Whether the node had the taint.
async fn remove(nodes: &Api<Node>, name: &str, key: &str) -> Result<bool, kube::Error> {
    let node = nodes.get(name).await?;
    let taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
    let kept: Vec<&Taint> = taints.iter().filter(|taint| taint.key != key).collect();
    if kept.len() == taints.len() {
        return Ok(false);
    }
    // The list is written whole. The version makes the server refuse if somebody else has changed
    // the node meanwhile.
    let version = node.metadata.resource_version;
    let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": kept}});
    let params = PatchParams { field_manager: Some("adit-watcher".to_owned()), ..PatchParams::default() };
    nodes.patch(name, &params, &Patch::Merge(&patch)).await.map(|_| true)
}
