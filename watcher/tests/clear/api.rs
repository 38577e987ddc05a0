//! A node whose pods come from an API server.

use std::{collections::BTreeMap, fmt};

use serde_json::{Value, json};
use testbed::{
    api_server::ApiServer,
    cluster::{Cluster, WayToApi, Works},
};

use super::{
    life::{Life, Mode},
    rig::{ROLES, SLOTS, letter},
};

const NAMESPACE: &str = "demo";

/// The API server, and the way to it that one node has.
pub struct ApiSource {
    server: ApiServer,
    way: WayToApi,
    /// The node's index, and its name there.
    pub node: usize,
    name: String,
    /// What of a pod that is there may change, by its name and uid.
    published: BTreeMap<(String, String), Value>,
}

impl fmt::Debug for ApiSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiSource").field("node", &self.node).field("way", &self.way).finish_non_exhaustive()
    }
}

impl ApiSource {
    /// For a node on which no watcher has started yet.
    pub fn start(cluster: &mut Cluster, node: usize) -> Self {
        let server = ApiServer::start();
        server.namespace(NAMESPACE, &json!({}));
        let fixed = ROLES.iter().map(|(_, name, _)| (*name).to_owned());
        for name in fixed.chain(SLOTS.map(|host| format!("slot{host}"))) {
            server.service_account(NAMESPACE, &format!("{}-{name}", letter(node)));
        }
        let way = cluster.follow_api(node, &server);
        let name = cluster.nodes[node].pins_name.clone();
        Self { server, way, node, name, published: BTreeMap::new() }
    }

    /// Whether the node reaches it.
    pub fn set(&self, works: Works) {
        self.way.set(works);
    }

    /// Makes the pod's object; the pod's uid.
    pub fn create(&mut self, life: &Life) -> String {
        let changing = changing(life);
        let mut more = json!({"spec": {"serviceAccountName": life.name}});
        json_patch::merge(&mut more, &changing);
        let uid = self.server.pod(NAMESPACE, &life.name, &self.name, &more);
        self.published.insert((life.name.clone(), uid.clone()), changing);
        uid
    }

    /// Reports that a pod runs, as a kubelet does.
    pub fn report(&self, life: &Life) {
        let ips = life.place.told().map(|ip| ip.to_string());
        let status = json!({"phase": "Running", "podIP": ips[0], "podIPs": ips.map(|ip| json!({"ip": ip}))});
        self.server.set_status(NAMESPACE, &life.name, &status);
    }

    /// Changes and deletes objects, so that they are as `lives` of the node.
    pub fn publish<'a>(&mut self, lives: impl Iterator<Item = &'a Life>) {
        let wanted: BTreeMap<(String, String), Value> = lives
            .filter(|life| life.named)
            .map(|life| ((life.name.clone(), life.uid.clone()), changing(life)))
            .collect();
        let Self { published, server, .. } = self;
        published.retain(|(name, uid), at_present| {
            let Some(wanted) = wanted.get(&(name.clone(), uid.clone())) else {
                server.delete_pod(NAMESPACE, name);
                return false;
            };
            if at_present != wanted {
                server.patch_pod(NAMESPACE, name, wanted);
                at_present.clone_from(wanted);
            }
            true
        });
    }
}

/// What of a pod's object may change, as a patch.
fn changing(life: &Life) -> Value {
    let label = if life.labelled { "ambient" } else { "none" };
    let mut annotations = json!({});
    if life.mode == Mode::Open {
        annotations["ambient.adit.dev/fail-mode"] = json!("open");
    }
    if let Some(ports) = &life.excluded_ports {
        annotations["ambient.adit.dev/exclude-inbound-ports"] = json!(ports);
    }
    json!({"metadata": {"labels": {"istio.io/dataplane-mode": label}, "annotations": annotations}})
}
