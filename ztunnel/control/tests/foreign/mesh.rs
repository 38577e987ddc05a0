//! Objects, and the resources that Istio's control plane makes of them. A resource has the fields that
//! its object does not change; `sent` names the others (null: not sent; null for all: no resource).

use std::collections::BTreeMap;

use json_patch::merge;
use serde_json::{Value, json};

/// The objects, and what becomes of them: name of a resource → its fields.
#[derive(Default)]
pub struct Mesh {
    pub objects: Vec<Value>,
    pub pods: Vec<(String, Value)>,
    pub expected: BTreeMap<String, Value>,
}

pub const NAMESPACE: &str = "demo";

impl Mesh {
    pub fn object(&mut self, kind: &str, version: &str, name: &str, more: &Value) {
        let mut object = json!({"apiVersion": version, "kind": kind,
            "metadata": {"name": name, "namespace": NAMESPACE}});
        merge(&mut object, more);
        self.objects.push(object);
    }

    /// A pod that is ready, with the last byte of its address. `more`: of the pod, and of what is sent.
    pub fn pod(&mut self, name: &str, last: u8, more: &Value, sent: &Value) {
        let address = format!("10.1.0.{last}");
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {"nodeName": "n3", "containers": [{"name": "main", "image": "none"}]},
            "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
                "conditions": [{"type": "Ready", "status": "True"}]}});
        merge(&mut pod, more);
        let name = pod["metadata"]["name"].as_str().unwrap().to_owned();
        let status = pod.as_object_mut().unwrap().remove("status").unwrap();
        let mut expected = json!({
            "uid": format!("Kubernetes//Pod/{NAMESPACE}/{name}"), "name": name, "namespace": NAMESPACE,
            "addresses": [address], "service_account": "default", "node": "n3",
            "canonical_name": name, "canonical_revision": "latest", "workload_type": "POD",
            "workload_name": name, "cluster_id": "Kubernetes",
        });
        merge(&mut expected, sent);
        self.objects.push(pod);
        self.pods.push((name.clone(), status));
        if sent.is_null() {
            return;
        }
        let addresses = expected["addresses"].as_array().unwrap().iter();
        let aliases: Vec<String> = addresses.map(|ip| format!("/{}", ip.as_str().unwrap())).collect();
        let uid = expected["uid"].as_str().unwrap().to_owned();
        self.expected.insert(uid, json!({"workload": expected, "aliases": aliases}));
    }

    pub fn service(&mut self, name: &str, last: u8, spec: &Value, sent: &Value) {
        let address = format!("10.96.7.{last}");
        let mut whole = json!({"spec": {"clusterIP": address,
            "ports": [{"name": "web", "port": 80, "targetPort": 8080}]}});
        merge(&mut whole, spec);
        self.object("Service", "v1", name, &whole);
        let hostname = format!("{name}.{NAMESPACE}.svc.cluster.local");
        let mut expected = json!({"name": name, "namespace": NAMESPACE, "hostname": hostname,
            "addresses": [{"address": address}], "ports": [{"service_port": 80, "target_port": 8080}],
            "ip_families": "IPV4_ONLY", "canonical": true});
        merge(&mut expected, sent);
        if sent.is_null() {
            return;
        }
        let addresses = expected.get("addresses").and_then(Value::as_array).into_iter().flatten();
        let aliases: Vec<String> =
            addresses.map(|one| format!("/{}", one["address"].as_str().unwrap())).collect();
        self.expected
            .insert(format!("{NAMESPACE}/{hostname}"), json!({"service": expected, "aliases": aliases}));
    }

    pub fn policy(&mut self, name: &str, more: &Value, sent: &Value) {
        self.object("AuthorizationPolicy", "security.istio.io/v1", name, more);
        if sent.is_null() {
            return;
        }
        let mut expected = json!({"name": name, "namespace": NAMESPACE, "scope": "NAMESPACE", "aliases": []});
        merge(&mut expected, sent);
        let namespace = expected["namespace"].as_str().unwrap();
        self.expected.insert(format!("{namespace}/{name}"), expected);
    }

    pub fn peer_authentication(&mut self, name: &str, spec: &Value) {
        self.object("PeerAuthentication", "security.istio.io/v1", name, &json!({"spec": spec}));
    }
}
