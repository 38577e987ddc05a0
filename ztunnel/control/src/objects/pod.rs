//! A pod.

use std::net::IpAddr;

use k8s_openapi::api::core::v1 as api;

use super::Labels;

const REDIRECTION: &str = "ambient.istio.io/redirection";
/// A pod with this label and the value `http` accepts HBONE by itself.
const OWN_TUNNEL: &str = "networking.istio.io/tunnel";
const WORKLOAD_NAME: &str = "service.istio.io/workload-name";

/// A pod that has an address and has not ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pod {
    pub name: String,
    pub uid: String,
    /// Seconds since 1970.
    pub created: i64,
    /// Never empty.
    pub addresses: Vec<IpAddr>,
    pub node: String,
    pub service_account: String,
    pub host_network: bool,
    /// Ready, and not about to end.
    pub healthy: bool,
    pub accepts: Accepts,
    pub labels: Labels,
    /// What its controller is called, as far as the pod shows.
    pub workload_name: String,
    /// Its named TCP ports.
    pub ports: Vec<(String, u16)>,
}

/// How connections to a pod can arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Accepts {
    /// In plaintext.
    #[default]
    Plaintext,
    /// By HBONE, at its node's tunnel.
    Hbone,
    /// By HBONE, by itself.
    NativeHbone,
}

impl Pod {
    /// `None` for a pod that has ended, has no address yet, or has one that cannot be read.
    pub(crate) fn read(pod: &api::Pod) -> Option<Self> {
        let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref()?);
        if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return None;
        }
        let listed = status.pod_ips.iter().flatten().map(|listed| listed.ip.as_str());
        let mut addresses = listed.map(str::parse).collect::<Result<Vec<IpAddr>, _>>().ok()?;
        if addresses.is_empty() {
            addresses.push(status.pod_ip.as_ref()?.parse().ok()?);
        }
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        let annotation = |key: &str| pod.metadata.annotations.as_ref()?.get(key).map(String::as_str);
        let accepts = if labels.get(OWN_TUNNEL).is_some_and(|how| how.split(',').any(|how| how == "http")) {
            Accepts::NativeHbone
        } else if annotation(REDIRECTION) == Some("enabled") {
            Accepts::Hbone
        } else {
            Accepts::Plaintext
        };
        Some(Self {
            name: pod.metadata.name.clone()?,
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            created: pod.metadata.creation_timestamp.as_ref().map_or(0, |created| created.0.as_second()),
            addresses,
            node: spec.node_name.clone().unwrap_or_default(),
            service_account: spec.service_account_name.clone().unwrap_or_else(|| "default".to_owned()),
            host_network: spec.host_network.unwrap_or_default(),
            healthy: is_ready(status) && pod.metadata.deletion_timestamp.is_none(),
            accepts,
            workload_name: workload_name(pod, &labels),
            labels,
            ports: named_ports(spec),
        })
    }

    /// The number of the port that is named `name`.
    pub(crate) fn port_named(&self, name: &str) -> Option<u16> {
        self.ports.iter().find(|(known, _)| known == name).map(|(_, port)| *port)
    }
}

fn is_ready(status: &api::PodStatus) -> bool {
    let ready = status.conditions.iter().flatten().find(|condition| condition.type_ == "Ready");
    ready.is_some_and(|condition| condition.status == "True")
}

/// Of containers, and of those that start before the others and go on running.
fn named_ports(spec: &api::PodSpec) -> Vec<(String, u16)> {
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    ports
        .filter(|port| matches!(port.protocol.as_deref(), None | Some("TCP")))
        .filter_map(|port| Some((port.name.clone()?, u16::try_from(port.container_port).ok()?)))
        .collect()
}

/// A label says it; else the controller, whose own controller (a deployment, a cron job) shows in its
/// name; else the pod.
fn workload_name(pod: &api::Pod, labels: &Labels) -> String {
    let own = || pod.metadata.name.clone().unwrap_or_default();
    if let Some(name) = labels.get(WORKLOAD_NAME) {
        return name.clone();
    }
    if pod.metadata.generate_name.as_ref().is_none_or(String::is_empty) {
        return own();
    }
    let owners = pod.metadata.owner_references.iter().flatten();
    let Some(controller) = owners.into_iter().find(|owner| owner.controller == Some(true)) else {
        return own();
    };
    let name = controller.name.as_str();
    let without = |suffix: Option<&String>| {
        let suffix = suffix.filter(|suffix| !suffix.is_empty())?;
        name.strip_suffix(suffix.as_str())?.strip_suffix('-')
    };
    let shown = match controller.kind.as_str() {
        "ReplicaSet" => without(labels.get("pod-template-hash"))
            .or_else(|| without(labels.get("rollouts-pod-template-hash")))
            .unwrap_or(name),
        "ReplicationController" => labels.get("deploymentconfig").map_or(name, String::as_str),
        "Job" => cron_job(name).unwrap_or(name),
        _ => name,
    };
    shown.to_owned()
}

/// The cron job that made a job: the job's name ends with the time, 8 to 10 digits.
fn cron_job(job: &str) -> Option<&str> {
    let (name, time) = job.rsplit_once('-')?;
    let is_time = (8..=10).contains(&time.len()) && time.bytes().all(|byte| byte.is_ascii_digit());
    (is_time && !name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[expect(
        clippy::needless_pass_by_value,
        reason = "`json!` makes values, which tests hand over as they are"
    )]
    fn pod(metadata: Value, spec: Value, status: Value) -> Option<Pod> {
        let spec_with = |mut spec: Value| {
            if spec.get("containers").is_none() {
                spec["containers"] = json!([]);
            }
            spec
        };
        let pod = json!({"metadata": metadata, "spec": spec_with(spec), "status": status});
        Pod::read(&serde_json::from_value(pod).unwrap())
    }

    #[test]
    fn a_pod_counts_from_its_first_address_to_its_end() {
        let at = |status| pod(json!({"name": "a"}), json!({}), status).map(|pod| pod.addresses);
        assert_eq!(at(json!({"phase": "Pending"})), None);
        for phase in ["Succeeded", "Failed"] {
            assert_eq!(at(json!({"phase": phase, "podIP": "10.0.0.1"})), None);
        }
        assert_eq!(at(json!({"podIP": "10.0.0.300"})), None);
        assert_eq!(at(json!({"podIP": "10.0.0.1"})).unwrap(), ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        let both = at(json!({"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}));
        assert_eq!(both.unwrap().len(), 2);
    }

    #[test]
    fn a_pod_is_healthy_while_it_is_ready_and_not_deleted() {
        let health = |metadata, condition: &str| {
            let status = json!({"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": condition}]});
            pod(metadata, json!({}), status).unwrap().healthy
        };
        assert!(health(json!({"name": "a"}), "True"));
        assert!(!health(json!({"name": "a"}), "False"));
        let deleted = json!({"name": "a", "deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert!(!health(deleted, "True"));
    }

    #[test]
    fn how_a_pod_can_be_reached_is_in_its_annotation_or_label() {
        let accepts = |metadata| pod(metadata, json!({}), json!({"podIP": "10.0.0.1"})).unwrap().accepts;
        assert_eq!(accepts(json!({"name": "a"})), Accepts::Plaintext);
        let annotated =
            |value: &str| json!({"name": "a", "annotations": {"ambient.istio.io/redirection": value}});
        assert_eq!(accepts(annotated("enabled")), Accepts::Hbone);
        assert_eq!(accepts(annotated("disabled")), Accepts::Plaintext);
        let own = json!({"name": "a", "labels": {"networking.istio.io/tunnel": "http"}});
        assert_eq!(accepts(own), Accepts::NativeHbone);
    }

    #[test]
    fn the_name_of_a_workload_is_its_controllers() {
        let named = |generated: bool, labels: Value, kind: &str, controller: &str| {
            let mut metadata = json!({"name": "pod-x", "labels": labels, "ownerReferences":
                [{"apiVersion": "v1", "kind": kind, "name": controller, "uid": "1", "controller": true}]});
            if generated {
                metadata["generateName"] = json!("pod-");
            }
            pod(metadata, json!({}), json!({"podIP": "10.0.0.1"})).unwrap().workload_name
        };
        let hash = json!({"pod-template-hash": "5d4f"});
        for (labels, kind, controller, expected) in [
            (hash.clone(), "ReplicaSet", "web-5d4f", "web"),
            (hash, "ReplicaSet", "web", "web"),
            (json!({}), "ReplicaSet", "web-5d4f", "web-5d4f"),
            (json!({"deploymentconfig": "dc"}), "ReplicationController", "dc-1", "dc"),
            (json!({}), "Job", "backup-29311200", "backup"),
            (json!({}), "Job", "backup-1234567", "backup-1234567"),
            (json!({}), "StatefulSet", "db", "db"),
            (json!({"service.istio.io/workload-name": "said"}), "StatefulSet", "db", "said"),
        ] {
            assert_eq!(named(true, labels, kind, controller), expected, "{kind} {controller}");
        }
        assert_eq!(named(false, json!({}), "StatefulSet", "db"), "pod-x");
    }

    #[test]
    fn ports_have_names_in_containers_that_go_on_running() {
        let spec = json!({
            "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080},
                {"name": "dns", "containerPort": 53, "protocol": "UDP"}, {"containerPort": 1}]}],
            "initContainers": [
                {"name": "once", "ports": [{"name": "once", "containerPort": 2}]},
                {"name": "stays", "restartPolicy": "Always", "ports": [{"name": "side", "containerPort": 3}]}],
        });
        let pod = pod(json!({"name": "a"}), spec, json!({"podIP": "10.0.0.1"})).unwrap();
        assert_eq!(pod.ports, [("http".to_owned(), 8080), ("side".to_owned(), 3)]);
        assert_eq!((pod.port_named("side"), pod.port_named("once")), (Some(3), None));
    }
}
