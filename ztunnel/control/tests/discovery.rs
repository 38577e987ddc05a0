//! What a real tunnel's discovery learns, and how soon.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use testbed::wait::wait_at_most;
use tokio_util::sync::CancellationToken;
use ztunnel::{
    discovery::client::DiscoveryClient,
    mesh::{Mesh, Store, Workload, local_file::ResourceDefaults},
    metrics::Metrics,
    readiness::Readiness,
};

use crate::rig::{Control, LIMIT, ready_at, unique};

/// From a change at the API server to the tunnel; less on a machine that does nothing else.
const SOON: Duration = Duration::from_secs(5);

/// The tunnel's own client and store.
struct Tunnel<'a> {
    control: &'a Control,
    store: Arc<Store>,
    stop: CancellationToken,
}

impl<'a> Tunnel<'a> {
    fn start(control: &'a Control, node: &str) -> Self {
        let config = control.tunnel_config(node);
        let (store, readiness) = (Arc::new(Store::untold()), Readiness::default());
        let (metrics, stop) = (Metrics::new(10), CancellationToken::new());
        let client = DiscoveryClient::new(
            config.xds.as_ref().unwrap(),
            ResourceDefaults::from(&config),
            Arc::clone(&store),
            None,
            None,
            &metrics,
            readiness.task("discovery"),
        );
        let running = stop.clone();
        control.runtime.spawn(async move { client.run(running).await });
        let known = async { tokio::time::timeout(LIMIT, store.until_known()).await };
        assert!(control.runtime.block_on(known).is_ok(), "nothing told\n{}", control.log());
        Self { control, store, stop }
    }

    /// Waits for what the mesh has.
    fn soon<T>(&self, what: &str, look: impl Fn(&Mesh) -> Option<T>) -> T {
        match testbed::wait::try_wait(SOON, || look(&self.store.snapshot())) {
            Some(found) => found,
            None => panic!("waited {SOON:?} in vain for {what}\n{}", self.control.log()),
        }
    }
}

impl Drop for Tunnel<'_> {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn pod<'a>(mesh: &'a Mesh, namespace: &str, name: &str) -> Option<&'a Arc<Workload>> {
    mesh.workloads().find(|workload| *workload.name == *name && *workload.common.namespace == *namespace)
}

fn shown(workload: &Workload) -> Value {
    serde_json::to_value(workload).unwrap()
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_tunnel_learns_of_pods_and_services_and_of_every_change() {
    let control = Control::start(&[]);
    let (api, demo, node) = (&control.api, unique("demo"), unique("node"));
    api.apply(&format!(
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: {node}\n  labels:\n    \
         topology.kubernetes.io/region: r1\n    topology.kubernetes.io/zone: z1"
    ));
    api.namespace(&demo, &json!({}));
    let tunnel = Tunnel::start(&control, &node);

    let more = json!({"metadata": {"labels": {"app": "web", "version": "v1"}},
        "spec": {"containers": [{"name": "c", "image": "none", "ports": [{"name": "http", "containerPort": 8080}]}]}});
    api.pod(&demo, "web-1", &node, &more);
    api.set_status(
        &demo,
        "web-1",
        &json!({"phase": "Running", "podIP": "10.1.0.1", "podIPs": [{"ip": "10.1.0.1"}]}),
    );
    let pod_soon = |what: &str, holds: &dyn Fn(&Value) -> bool| {
        tunnel.soon(what, |mesh| {
            pod(mesh, &demo, "web-1").map(|found| shown(found)).filter(|shown| holds(shown))
        })
    };
    let first = pod_soon("the pod", &|_| true);
    assert_eq!(first["status"], "Unhealthy", "{first}");
    assert_eq!((&first["canonicalName"], &first["canonicalRevision"]), (&json!("web"), &json!("v1")));
    assert_eq!(first["locality"]["zone"], "z1", "{first}");
    assert_eq!(first["clusterId"], "Kubernetes");

    api.set_status(&demo, "web-1", &ready_at("10.1.0.1"));
    pod_soon("the pod to be ready", &|pod| pod["status"] == "Healthy");
    let protocol = first["protocol"].clone();
    let redirected = json!({"metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}}});
    api.patch_pod(&demo, "web-1", &redirected);
    let hbone = pod_soon("HBONE", &|pod| pod["protocol"] != protocol);
    assert_eq!(hbone["protocol"], "HBONE");

    api.apply(&format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  namespace: {demo}\nspec:\n  \
         selector: {{app: web}}\n  ports:\n  - {{name: http, port: 80, targetPort: http}}"
    ));
    let key = format!("{demo}/web.{demo}.svc.cluster.local").parse().unwrap();
    let address = tunnel.soon("the service", |mesh| {
        let (_, address) = mesh.service(&key)?.vips.first()?;
        (mesh.endpoints(&key).len() == 1).then_some(*address)
    });
    assert!(tunnel.store.snapshot().service_by_vip("", address).is_some());

    api.delete_pod(&demo, "web-1");
    tunnel.soon("the pod to be gone", |mesh| {
        (pod(mesh, &demo, "web-1").is_none() && mesh.endpoints(&key).is_empty()).then_some(())
    });
    assert!(!control.get("/metrics").contains("ztunnel_control_nacks_total{"), "{}", control.log());
}

#[test]
#[ignore = "needs an API server: make test"]
fn policies_reach_whom_they_select_and_unknown_fields_make_them_stricter() {
    let control = Control::start(&[]);
    let (api, demo, node) = (&control.api, unique("demo"), unique("node"));
    api.namespace(&demo, &json!({}));
    api.pod(&demo, "web", &node, &json!({"metadata": {"labels": {"app": "web"}}}));
    api.set_status(&demo, "web", &ready_at("10.1.0.2"));
    let tunnel = Tunnel::start(&control, &node);
    let head = format!(
        "metadata:\n  name: p\n  namespace: {demo}\nspec:\n  selector: {{matchLabels: {{app: web}}}}"
    );
    let policy = format!("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n{head}");
    api.apply(&format!(
        "{policy}\n  action: DENY\n  rules:\n  - from: [{{source: {{namespaces: [bad]}}}}]\n    to: [{{operation: {{methods: [GET]}}}}]"
    ));
    let key = format!("{demo}/p");
    let named = |name: &str| {
        tunnel.soon(name, |mesh| {
            let named = pod(mesh, &demo, "web")?.common.policies.iter().any(|key| key.to_string() == *name);
            let policy = mesh.policies().find(|policy| is_named(policy, name))?;
            named.then(|| shown_policy(policy))
        })
    };
    let told = named(&key);
    // What layer 4 does not see is not asked for.
    assert!(told.to_string().contains("bad") && told["action"] == "Deny", "{told}");
    assert!(control.log().contains("stricter than it is written"), "{}", control.log());
    wait_at_most(SOON, "the gauge", || {
        (control.metric("ztunnel_control_unenforceable_policies") >= 1.0).then_some(())
    });

    let strict = format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n{head}\n  mtls: {{mode: STRICT}}"
    );
    api.apply(&strict);
    named("adit-system/istio_converted_static_strict");
}

/// A pod's address is free before the API server says that the pod is gone.
#[test]
#[ignore = "needs an API server: make test"]
fn of_two_pods_with_one_address_the_later_one_has_it_for_whoever_comes_when() {
    let control = Control::start(&[]);
    let (api, demo) = (&control.api, unique("demo"));
    api.namespace(&demo, &json!({}));
    let address = "10.1.0.77";
    let owner = |mesh: &Mesh| {
        let found = mesh.workload_by_address("", address.parse().unwrap())?;
        (*found.common.namespace == *demo).then(|| found.name.to_string())
    };
    // The later one has the earlier name.
    api.pod(&demo, "z-going", &unique("node"), &json!({}));
    api.set_status(&demo, "z-going", &ready_at(address));
    let before = Tunnel::start(&control, &unique("node"));
    before.soon("the first one", |mesh| owner(mesh).filter(|name| name == "z-going"));
    // Times of creation are in seconds.
    let second = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let created = second();
    wait_at_most(SOON, "the next second", || (second() > created + 1).then_some(()));
    api.pod(&demo, "a-coming", &unique("node"), &json!({}));
    api.set_status(&demo, "a-coming", &ready_at(address));
    before.soon("the second one", |mesh| owner(mesh).filter(|name| name == "a-coming"));

    let during = Tunnel::start(&control, &unique("node"));
    during.soon("both", |mesh| {
        pod(mesh, &demo, "a-coming").and_then(|_| pod(mesh, &demo, "z-going")).map(drop)
    });
    assert_eq!(owner(&during.store.snapshot()).as_deref(), Some("a-coming"));
    // Whatever else is said of the one that goes.
    api.set_status(&demo, "z-going", &json!({"conditions": [{"type": "Ready", "status": "False"}]}));
    api.delete_pod(&demo, "z-going");
    for tunnel in [&before, &during] {
        tunnel.soon("the first one to be gone", |mesh| {
            assert_eq!(owner(mesh).as_deref(), Some("a-coming"));
            pod(mesh, &demo, "z-going").is_none().then_some(())
        });
    }
}

#[test]
#[ignore = "needs an API server: make test"]
fn namesakes_in_two_namespaces_are_two_of_everything() {
    let control = Control::start(&[]);
    let (api, node) = (&control.api, unique("node"));
    let both = [unique("demo"), unique("demo")];
    let labels = json!({"metadata": {"labels": {"app": "web"}}});
    for (demo, address) in both.iter().zip(["10.1.0.81", "10.1.0.82"]) {
        api.namespace(demo, &json!({}));
        api.pod(demo, "web", &node, &labels);
        api.set_status(demo, "web", &ready_at(address));
        let select = format!("metadata:\n  name: web\n  namespace: {demo}\nspec:\n  selector:");
        api.apply(&format!("apiVersion: v1\nkind: Service\n{select} {{app: web}}\n  ports: [{{port: 80}}]"));
        api.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n{select} {{matchLabels: {{app: web}}}}\n  \
             rules: [{{from: [{{source: {{namespaces: [{demo}]}}}}]}}]"
        ));
    }
    let tunnel = Tunnel::start(&control, &node);
    let key = |demo: &str| format!("{demo}/web.{demo}.svc.cluster.local").parse().unwrap();
    let has_its_own = |mesh: &Mesh, demo: &str| {
        let workload = pod(mesh, demo, "web")?;
        let policies: Vec<String> = workload.common.policies.iter().map(ToString::to_string).collect();
        let endpoints: Vec<_> =
            mesh.endpoints(&key(demo)).iter().map(|one| one.workload.common.namespace.to_string()).collect();
        let policy = mesh.policies().find(|policy| is_named(policy, &format!("{demo}/web")))?;
        let allows_own = shown_policy(policy).to_string().contains(demo);
        (policies == [format!("{demo}/web")] && endpoints == [demo] && allows_own).then_some(())
    };
    for demo in &both {
        tunnel.soon("everything of a namespace", |mesh| has_its_own(mesh, demo));
    }
    api.delete_pod(&both[0], "web");
    tunnel.soon("one to be gone", |mesh| mesh.endpoints(&key(&both[0])).is_empty().then_some(()));
    tunnel.soon("the other to be there", |mesh| has_its_own(mesh, &both[1]));
}

fn is_named(policy: &ztunnel::mesh::Policy, key: &str) -> bool {
    let shown = shown_policy(policy);
    key.split_once('/')
        .is_some_and(|(namespace, name)| shown["namespace"] == namespace && shown["name"] == name)
}

fn shown_policy(policy: &ztunnel::mesh::Policy) -> Value {
    serde_json::to_value(policy).unwrap()
}
