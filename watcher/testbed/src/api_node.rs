//! A node whose watcher follows an API server, and whose pods exist in both.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::{
    api_server::ApiServer,
    fakes::FakeTunnel,
    wait::{LIMIT, try_wait, wait_for},
    watcher_node::WatcherNode,
};

/// The annotation by which a watcher reports that a pod is in the mesh.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";

/// A node whose watcher follows the API server.
#[derive(Debug)]
pub struct ApiNode {
    /// The node itself.
    pub host: WatcherNode,
    /// Its API server.
    pub api: Arc<ApiServer>,
    /// A namespace of its own.
    pub namespace: String,
}

impl ApiNode {
    /// A node of the shared API server, with a namespace of these labels.
    pub fn new(labels: &Value) -> Self {
        Self::of(ApiServer::shared(), labels)
    }

    /// A node of this API server.
    pub fn of(api: Arc<ApiServer>, labels: &Value) -> Self {
        let mut host = WatcherNode::new();
        host.kubeconfig = Some(api.watcher_kubeconfig());
        let namespace = format!("{}-demo", host.name);
        api.namespace(&namespace, labels);
        Self { host, api, namespace }
    }

    /// Makes a running pod, in the API and on this node, and returns its index and its uid.
    pub fn pod(&mut self, name: &str, more: &Value) -> (usize, String) {
        let uid = self.api.pod(&self.namespace, name, &self.host.name, more);
        let number = self.host.pod_in(name, &format!("pod{uid}"));
        self.report(number);
        (number, uid)
    }

    /// Reports a pod as running, as the kubelet does.
    pub fn report(&self, number: usize) {
        let pod = &self.host.pods[number];
        let ips = [pod.address.clone(), format!("fd88:{number}::2")];
        let status = json!({"phase": "Running", "podIP": ips[0], "podIPs": ips.map(|ip| json!({"ip": ip}))});
        self.api.set_status(&self.namespace, &pod.name, &status);
    }

    /// A tunnel that expects pods of its namespace.
    pub fn tunnel(&self) -> FakeTunnel {
        self.host.tunnel().of_namespace(&self.namespace)
    }

    /// Waits until the watcher knows all pods of the API server.
    pub fn wait_ready(&self) {
        wait_for("the watcher to know all pods", || self.host.status()["ready"].as_bool()?.then_some(()));
    }

    /// Why the watcher cannot use the API server at present.
    pub fn source_error(&self) -> Option<String> {
        self.host.status()["source"]["error"].as_str().map(str::to_owned)
    }

    /// Waits until the watcher reports that it cannot use the API server, with all of `parts` in
    /// the reason.
    pub fn wait_source_error(&self, parts: &[&str]) {
        let mut last = None;
        let found = try_wait(LIMIT, || {
            last = self.source_error();
            last.as_ref().is_some_and(|error| parts.iter().all(|part| error.contains(part)))
        });
        assert!(found.is_some(), "wanted an error with {parts:?}, found {last:?}\n{}", self.host.log());
    }

    /// A pod as `watcher status` shows it.
    pub fn find(&self, name: &str) -> Option<Value> {
        let status = self.host.status();
        status["pods"].as_array()?.iter().find(|pod| pod["name"] == name).cloned()
    }

    /// Waits until the pod has this state, with this reason code ("": none).
    pub fn wait_state(&self, name: &str, state: &str, code: &str) {
        let mut last = None;
        let reached = try_wait(LIMIT, || {
            last = self.find(name);
            last.as_ref().is_some_and(|pod| {
                pod["state"] == state && pod["reason"]["code"].as_str().unwrap_or_default() == code
            })
        });
        assert!(reached.is_some(), "{name}: wanted {state} ({code}), found {last:?}\n{}", self.host.log());
    }

    /// Waits until the redirection annotation of the pod has this value.
    pub fn wait_annotation(&self, name: &str, value: Option<&str>) {
        wait_for(&format!("the annotation of {name} to be {value:?}"), || {
            (self.api.annotation(&self.namespace, name, REDIRECTION).as_deref() == value).then_some(())
        });
    }
}
