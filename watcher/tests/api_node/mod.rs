//! A node whose watcher follows the API server, and whose pods are known to both.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::api_server::ApiServer;
use crate::support::{Bed, FakeTunnel, Told, wait_for};

pub const REDIRECTION: &str = "ambient.istio.io/redirection";

/// A node whose watcher follows the API server.
pub struct Node {
    pub api: Arc<ApiServer>,
    pub bed: Bed,
    /// A namespace of its own.
    pub namespace: String,
}

impl Node {
    pub fn new(labels: &Value) -> Self {
        Self::of(ApiServer::shared(), labels)
    }

    /// A node of this API server.
    pub fn of(api: Arc<ApiServer>, labels: &Value) -> Self {
        let mut bed = Bed::new();
        bed.kubeconfig = Some(api.watcher_kubeconfig());
        let namespace = format!("{}-demo", bed.name);
        api.namespace(&namespace, labels);
        Self { api, bed, namespace }
    }

    /// A running pod: of the API, with processes on this node. Its number and uid.
    pub fn pod(&mut self, name: &str, more: &Value) -> (usize, String) {
        let uid = self.api.pod(&self.namespace, name, &self.bed.name, more);
        let number = self.bed.pod_in(name, &format!("pod{uid}"));
        self.report(number);
        (number, uid)
    }

    /// As the kubelet does once it runs.
    pub fn report(&self, number: usize) {
        let pod = &self.bed.pods[number];
        let ips = [pod.address.clone(), format!("fd88:{number}::2")];
        let status = json!({"phase": "Running", "podIP": ips[0], "podIPs": ips.map(|ip| json!({"ip": ip}))});
        self.api.set_status(&self.namespace, &pod.name, &status);
    }

    pub fn tunnel(&self) -> FakeTunnel {
        self.bed.tunnel().of_namespace(&self.namespace)
    }

    pub fn wait_ready(&self) {
        wait_for("the source to have told of all pods", || {
            self.bed.status()["ready"].as_bool()?.then_some(())
        });
    }

    /// Why the source cannot be used at present.
    pub fn source_error(&self) -> Option<String> {
        self.bed.status()["source"]["error"].as_str().map(str::to_owned)
    }

    /// Waits until the source cannot be used, for a reason that contains all of `parts`.
    pub fn wait_source_error(&self, parts: &[&str]) {
        let mut last = None;
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            last = self.source_error();
            if last.as_ref().is_some_and(|error| parts.iter().all(|part| error.contains(part))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("wanted an error with {parts:?}, found {last:?}\n{}", self.bed.log());
    }

    pub fn find(&self, name: &str) -> Option<Value> {
        let status = self.bed.status();
        status["pods"].as_array()?.iter().find(|pod| pod["name"] == name).cloned()
    }

    pub fn wait_state(&self, name: &str, state: &str, code: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut last = None;
        while Instant::now() < deadline {
            last = self.find(name);
            if last.as_ref().is_some_and(|pod| {
                pod["state"] == state && pod["reason"]["code"].as_str().unwrap_or_default() == code
            }) {
                return;
            }
        }
        panic!("{name}: wanted {state} ({code}), found {last:?}\n{}", self.bed.log());
    }

    pub fn wait_annotation(&self, name: &str, value: Option<&str>) {
        wait_for(&format!("the annotation of {name} to be {value:?}"), || {
            (self.api.annotation(&self.namespace, name, REDIRECTION).as_deref() == value).then_some(())
        });
    }
}

/// Takes whatever it is told, until told to stop.
pub fn obliging(tunnel: FakeTunnel) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || while tunnel.take() != Told::Closed {})
}
