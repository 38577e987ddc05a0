//! What the watchers and the tunnels of a cluster read: the pods files and the mesh file.

use std::{fmt::Write as _, fs, path::Path};

use super::{Cluster, Enrol, WEB_V4, WEB_V6};

impl Cluster {
    /// The pods file of a node.
    pub(super) fn pods_yaml(&self, node: usize) -> String {
        let mut yaml = String::from("pods:\n");
        for pod in self.pods.iter().filter(|pod| pod.node == node) {
            let _ = write!(
                yaml,
                "- uid: {}\n  name: {name}\n  namespace: demo\n  serviceAccount: {name}\n  cgroup: {}\n",
                pod.uid(),
                self.nodes[node].as_seen_inside(pod.cgroup.parent().expect("pod cgroup")).display(),
                name = pod.name,
            );
            if pod.enrol == Enrol::Mesh {
                yaml.push_str("  labels: {istio.io/dataplane-mode: ambient}\n");
            }
            if pod.fail_open {
                yaml.push_str("  failMode: open\n");
            }
        }
        if yaml == "pods:\n" { "pods: []\n".into() } else { yaml }
    }

    /// The mesh file of all tunnels.
    pub(super) fn mesh_yaml(&self) -> String {
        let mut yaml = String::from("workloads:\n");
        for pod in &self.pods {
            let protocol = if pod.enrol == Enrol::Mesh { "HBONE" } else { "TCP" };
            let _ = write!(
                yaml,
                "- uid: Kubernetes//Pod/demo/{name}\n  name: {name}\n  namespace: demo\n  \
                 serviceAccount: {name}\n  workloadIps: [\"{}\", \"{}\"]\n  protocol: {protocol}\n  \
                 node: {}\n  canonicalName: {name}\n  canonicalRevision: latest\n  workloadName: {name}\n  \
                 workloadType: deployment\n  clusterId: Kubernetes\n",
                pod.v4,
                pod.v6,
                self.nodes[pod.node].name,
                name = pod.name,
            );
            // Istio's ztunnel refuses a workload without this key.
            yaml.push_str(if pod.serves_web {
                "  services:\n    demo/web.demo.svc.cluster.local:\n      80: 8080\n"
            } else {
                "  services: {}\n"
            });
        }
        let _ = write!(
            yaml,
            "services:\n- name: web\n  namespace: demo\n  hostname: web.demo.svc.cluster.local\n  \
             vips: [\"/{WEB_V4}\", \"/{WEB_V6}\"]\n  ports: {{80: 8080}}\n"
        );
        let _ = write!(yaml, "policies:{}", if self.policies.is_empty() { " []\n" } else { "\n" });
        yaml + &self.policies
    }
}

/// Writes a file so that a reader sees the old or the new one, never half of it.
pub fn replace(path: &Path, content: &str) {
    let next = path.with_extension("next");
    fs::write(&next, content).expect("write");
    fs::rename(&next, path).expect("rename");
}
