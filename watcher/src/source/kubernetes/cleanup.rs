//! Takes the annotations of a node's pods back when its watcher is gone.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config,
    api::{ListParams, Patch},
};
use serde::Serialize;
use serde_json::json;
use tokio::time::{Instant, timeout_at};

use super::{
    pod::{REDIRECTION, REDIRECTION_ENABLED},
    status_writer,
};

/// What became of the annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TakenBack {
    /// How many pods carry it no more.
    pub pods: usize,
    /// What could not be done, and why: sentences.
    pub failed: Vec<String>,
}

/// Removes the annotation that says that a pod is in the mesh from every pod of `node`, within
/// `limit`.
pub async fn take_back_annotations(config: &Config, node: &str, limit: Duration) -> TakenBack {
    let deadline = Instant::now() + limit;
    let mut done = TakenBack::default();
    match annotated(config, node, deadline).await {
        Ok((client, pods)) => {
            for pod in pods {
                match remove(&client, &pod, deadline).await {
                    Ok(()) => done.pods += 1,
                    Err(problem) => done.failed.push(problem),
                }
            }
        }
        Err(problem) => done.failed.push(problem),
    }
    done
}

async fn annotated(config: &Config, node: &str, deadline: Instant) -> Result<(Client, Vec<Pod>), String> {
    let what = format!("the annotations of the pods of node {node} cannot be looked for");
    let client = Client::try_from(status_writer::config(config))
        .map_err(|error| format!("{what}: {}", super::cause(&error)))?;
    let wanted = ListParams::default().fields(&format!("spec.nodeName={node}"));
    let pods = match timeout_at(deadline, Api::<Pod>::all(client.clone()).list(&wanted)).await {
        Ok(Ok(pods)) => pods.items,
        Ok(Err(error)) => return Err(format!("{what}: {}", super::cause(&error))),
        Err(_) => return Err(format!("{what}: the API server does not answer in time")),
    };
    let is_marked = |pod: &Pod| {
        let annotations = pod.metadata.annotations.as_ref();
        annotations.and_then(|all| all.get(REDIRECTION)).is_some_and(|value| value == REDIRECTION_ENABLED)
    };
    Ok((client, pods.into_iter().filter(is_marked).collect()))
}

async fn remove(client: &Client, pod: &Pod, deadline: Instant) -> Result<(), String> {
    let (namespace, name) = (pod.metadata.namespace.as_deref(), pod.metadata.name.as_deref());
    let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
    let what = format!("pod {namespace}/{name} keeps the annotation {REDIRECTION}");
    // The uid makes the server refuse if another pod has the name by now.
    let patch = json!({"metadata": {"uid": pod.metadata.uid, "annotations": {REDIRECTION: null}}});
    let patch = Patch::Merge(&patch);
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    match timeout_at(deadline, pods.patch_status(name, &status_writer::params(), &patch)).await {
        Ok(Ok(_)) => Ok(()),
        // The pod is gone, or another one has its name.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Ok(()),
        Ok(Err(error)) => Err(format!("{what}: {}", super::cause(&error))),
        Err(_) => Err(format!("{what}: the API server does not answer in time")),
    }
}
