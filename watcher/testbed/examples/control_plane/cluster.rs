//! Fills the API server, and changes pods as kubelets do.

use std::{fmt::Debug, sync::Arc};

use k8s_openapi::api::{
    authentication::v1::TokenRequest,
    core::v1::{ConfigMap, Namespace, Node, Pod, Service, ServiceAccount},
};
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use testbed::{api_server::ApiServer, cryptography, wait::wait_at_most};
use tokio::{runtime::Runtime, task::JoinSet};

use crate::{LIMIT, Sizes};

const NAMESPACES: usize = 50;
/// Requests at a time.
const AT_ONCE: usize = 32;

/// The objects.
pub struct Cluster {
    runtime: Runtime,
    client: Client,
}

fn namespace_of(number: usize) -> String {
    format!("ns-{}", number % NAMESPACES)
}

fn read<T: DeserializeOwned>(object: Value) -> T {
    serde_json::from_value(object).expect("an object")
}

fn status(number: usize, ready: bool) -> Value {
    let [a, b] = [number / 250, number % 250];
    let ip = format!("10.{}.{}.{b}", 100 + a / 250, a % 250);
    let condition = json!({"type": "Ready", "status": if ready { "True" } else { "False" }});
    json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [condition]}})
}

impl Cluster {
    pub fn fill(api: &ApiServer, sizes: Sizes) -> Self {
        cryptography::choose();
        let runtime = Runtime::new().expect("a runtime");
        let kubeconfig = Kubeconfig::read_from(api.admin_kubeconfig()).expect("a kubeconfig");
        let client = runtime.block_on(async {
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await.expect("a configuration");
            Client::try_from(config).expect("a client")
        });
        let cluster = Self { runtime, client };
        let Sizes { pods, services, nodes, policies, .. } = sizes;
        let per_namespace = (services / NAMESPACES).max(1);
        cluster.all(NAMESPACES, |client, number| async move {
            let namespace = json!({"metadata": {"name": namespace_of(number)}});
            create(&Api::all(client), read::<Namespace>(namespace)).await;
        });
        cluster.all(nodes, |client, number| async move {
            let labels = json!({"topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": format!("z{}", number % 3)});
            let node = json!({"metadata": {"name": format!("node-{number}"), "labels": labels}});
            create(&Api::all(client), read::<Node>(node)).await;
        });
        cluster.all(services, move |client, number| async move {
            let app = format!("app-{}", number / NAMESPACES % per_namespace);
            let service = json!({"metadata": {"name": format!("web-{number}")},
                "spec": {"selector": {"app": app}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}});
            create(&Api::namespaced(client, &namespace_of(number)), read::<Service>(service)).await;
        });
        cluster.all(policies, move |client, number| async move {
            let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("adit.dev", "v1alpha1", "AccessPolicy"));
            let app = format!("app-{}", number / NAMESPACES % per_namespace);
            let policy = json!({"apiVersion": "adit.dev/v1alpha1", "kind": "AccessPolicy",
                "metadata": {"name": format!("policy-{number}")}, "spec": {"selector": {"matchLabels": {"app": app}},
                    "rules": [{"from": [{"source": {"namespaces": [namespace_of(number)]}}]}]}});
            let policies = Api::namespaced_with(client, &namespace_of(number), &kind);
            create(&policies, read::<DynamicObject>(policy)).await;
        });
        cluster.all(pods, move |client, number| async move {
            let labels = json!({"app": format!("app-{}", number / NAMESPACES % per_namespace), "version": "v1",
                "pod-template-hash": "7d9c6b5f4"});
            let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-7d9c6b5f4", "uid": "u",
                "controller": true});
            let pod = json!({"metadata": {"name": format!("web-7d9c6b5f4-{number}"), "labels": labels,
                    "annotations": {"ambient.istio.io/redirection": "enabled"}, "ownerReferences": [owner]},
                "spec": {"nodeName": format!("node-{}", number % nodes), "containers": [{"name": "web", "image": "none",
                    "ports": [{"name": "http", "containerPort": 8080}]}]}});
            let pods = Api::namespaced(client, &namespace_of(number));
            create(&pods, read::<Pod>(pod)).await;
            set_status(&pods, number, true).await;
        });
        let account = json!({"metadata": {"name": "ztunnel"}});
        let accounts = Api::namespaced(cluster.client.clone(), "adit-system");
        cluster.runtime.block_on(create(&accounts, read::<ServiceAccount>(account)));
        cluster
    }

    /// One for the tunnel of each node.
    pub fn tokens(&self, nodes: usize) -> Vec<String> {
        self.all(nodes, |client, number| async move {
            let name = format!("ztunnel-{number}");
            let pod = json!({"metadata": {"name": name}, "spec": {"nodeName": format!("node-{number}"),
                "serviceAccountName": "ztunnel", "containers": [{"name": "a", "image": "none"}]}});
            let pods: Api<Pod> = Api::namespaced(client.clone(), "adit-system");
            let pod = create(&pods, read(pod)).await;
            let request: TokenRequest = read(json!({"spec": {"audiences": ["istio-ca"], "boundObjectRef":
                {"kind": "Pod", "apiVersion": "v1", "name": name, "uid": pod.metadata.uid}}}));
            let accounts: Api<ServiceAccount> = Api::namespaced(client, "adit-system");
            let made = accounts.create_token_request("ztunnel", &PostParams::default(), &request).await;
            made.expect("a token").status.expect("a token").token
        })
    }

    /// Of the control plane, in PEM.
    pub fn root(&self) -> String {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), "adit-system");
        wait_at_most(LIMIT, "the root", || {
            let map = self.runtime.block_on(maps.get_opt("adit-root-cert")).ok()??;
            map.data?.remove("root-cert.pem")
        })
    }

    /// A pod is not ready any more. Returns the name of its resource.
    pub fn change(&self, number: usize) -> String {
        let pods = Api::namespaced(self.client.clone(), &namespace_of(number));
        self.runtime.block_on(set_status(&pods, number, false));
        resource_of(number)
    }

    /// The same for many at once.
    pub fn change_all(&self, numbers: &[usize]) -> Vec<String> {
        let chosen: Arc<[usize]> = numbers.into();
        self.all(numbers.len(), move |client, at| {
            let number = chosen[at];
            async move {
                set_status(&Api::namespaced(client, &namespace_of(number)), number, false).await;
                resource_of(number)
            }
        })
    }

    /// Does something for each number below `count`, for some of them at a time.
    fn all<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
        &self,
        count: usize,
        work: impl Fn(Client, usize) -> F,
    ) -> Vec<T> {
        self.runtime.block_on(async {
            let (mut running, mut done) = (JoinSet::new(), Vec::with_capacity(count));
            for number in 0..count {
                if running.len() >= AT_ONCE {
                    done.extend(running.join_next().await);
                }
                let one = work(self.client.clone(), number);
                running.spawn(async move { (number, one.await) });
            }
            done.extend(running.join_all().await.into_iter().map(Ok));
            let mut done: Vec<(usize, T)> = done.into_iter().map(|one| one.expect("done")).collect();
            done.sort_by_key(|(number, _)| *number);
            done.into_iter().map(|(_, result)| result).collect()
        })
    }
}

fn resource_of(number: usize) -> String {
    format!("Kubernetes//Pod/{}/web-7d9c6b5f4-{number}", namespace_of(number))
}

async fn create<K>(api: &Api<K>, object: K) -> K
where
    K: Clone + DeserializeOwned + Serialize + Debug,
{
    api.create(&PostParams::default(), &object).await.expect("created")
}

async fn set_status(pods: &Api<Pod>, number: usize, ready: bool) {
    let (params, patch) = (PatchParams::default(), Patch::Merge(status(number, ready)));
    pods.patch_status(&format!("web-7d9c6b5f4-{number}"), &params, &patch).await.expect("a status");
}
