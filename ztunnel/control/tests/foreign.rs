//! What a tunnel that is not ours reads, for some sixty objects: what Istio's control plane makes of
//! the same ones, field by field. A field that is not named here is not sent.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use serde_json::{Value, json};
use testbed::{api_server::ApiServer, process::KillOnDrop, program::cache};

use crate::rig::{ADDRESS, AUTHORIZATION, Control, LIMIT, unique};

/// The objects, and what becomes of them: name of a resource → its fields.
#[derive(Default)]
struct Mesh {
    objects: Vec<Value>,
    pods: Vec<(String, Value)>,
    expected: BTreeMap<String, Value>,
}

fn merge(into: &mut Value, more: &Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            for (key, value) in more {
                if value.is_null() {
                    into.remove(key);
                } else {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (into, more) => *into = more.clone(),
    }
}

const NAMESPACE: &str = "demo";

impl Mesh {
    fn object(&mut self, kind: &str, version: &str, name: &str, more: &Value) {
        let mut object = json!({"apiVersion": version, "kind": kind,
            "metadata": {"name": name, "namespace": NAMESPACE}});
        merge(&mut object, more);
        self.objects.push(object);
    }

    /// A pod that is ready, with the last byte of its address. `more`: of the pod, and of what is sent.
    fn pod(&mut self, name: &str, last: u8, more: &Value, sent: &Value) {
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

    fn service(&mut self, name: &str, last: u8, spec: &Value, sent: &Value) {
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

    fn policy(&mut self, name: &str, more: &Value, sent: &Value) {
        self.object("AuthorizationPolicy", "security.istio.io/v1", name, more);
        if sent.is_null() {
            return;
        }
        let mut expected = json!({"name": name, "namespace": NAMESPACE, "scope": "NAMESPACE", "aliases": []});
        merge(&mut expected, sent);
        let namespace = expected["namespace"].as_str().unwrap();
        self.expected.insert(format!("{namespace}/{name}"), expected);
    }

    fn peer_authentication(&mut self, name: &str, spec: &Value) {
        self.object("PeerAuthentication", "security.istio.io/v1", name, &json!({"spec": spec}));
    }
}

fn nodes(mesh: &mut Mesh) {
    for (name, labels) in [
        (
            "n1",
            json!({"topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": "z",
            "topology.istio.io/subzone": "s"}),
        ),
        ("n2", json!({"topology.kubernetes.io/zone": "z"})),
        ("n3", json!({})),
    ] {
        mesh.object("Node", "v1", name, &json!({"metadata": {"labels": labels, "namespace": null}}));
    }
}

fn pods(mesh: &mut Mesh) {
    let nothing = &json!({});
    mesh.pod("plain", 1, nothing, nothing);
    mesh.pod(
        "region",
        2,
        &json!({"spec": {"nodeName": "n1"}}),
        &json!({"node": "n1", "locality": {"region": "r", "zone": "z", "subzone": "s"}}),
    );
    mesh.pod(
        "zone",
        3,
        &json!({"spec": {"nodeName": "n2"}}),
        &json!({"node": "n2", "locality": {"zone": "z"}}),
    );
    mesh.pod("nowhere", 4, &json!({"spec": {"nodeName": "unknown"}}), &json!({"node": "unknown"}));
    mesh.pod(
        "account",
        5,
        &json!({"spec": {"serviceAccountName": "web"}}),
        &json!({"service_account": "web"}),
    );
    mesh.pod("host", 6, &json!({"spec": {"hostNetwork": true}}), &json!({"network_mode": "HOST_NETWORK"}));
    mesh.pod(
        "captured",
        7,
        &json!({"metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}}}),
        &json!({"tunnel_protocol": "HBONE"}),
    );
    mesh.pod(
        "left",
        8,
        &json!({"metadata": {"annotations": {"ambient.istio.io/redirection": "disabled"}}}),
        nothing,
    );
    mesh.pod(
        "native",
        9,
        &json!({"metadata": {"labels": {"networking.istio.io/tunnel": "http"}}}),
        &json!({"tunnel_protocol": "HBONE", "native_tunnel": true}),
    );
    mesh.pod(
        "unready",
        10,
        &json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}),
        &json!({"status": "UNHEALTHY"}),
    );
    mesh.pod(
        "starting",
        11,
        &json!({"status": {"phase": "Pending", "conditions": []}}),
        &json!({"status": "UNHEALTHY"}),
    );
    mesh.pod(
        "dual",
        12,
        &json!({"status": {"podIPs": [{"ip": "10.1.0.12"}, {"ip": "fd00::12"}]}}),
        &json!({"addresses": ["10.1.0.12", "fd00::12"]}),
    );
    mesh.pod("succeeded", 13, &json!({"status": {"phase": "Succeeded"}}), &Value::Null);
    mesh.pod("failed", 14, &json!({"status": {"phase": "Failed"}}), &Value::Null);
    mesh.pod("without-address", 15, &json!({"status": {"podIP": null, "podIPs": null}}), &Value::Null);
    // Names, from the most to the least specific label.
    mesh.pod(
        "app",
        16,
        &json!({"metadata": {"labels": {"app": "shop", "version": "v1"}}}),
        &json!({"canonical_name": "shop", "canonical_revision": "v1"}),
    );
    mesh.pod(
        "recommended",
        17,
        &json!({"metadata": {"labels": {"app": "shop", "version": "v1",
            "app.kubernetes.io/name": "cart", "app.kubernetes.io/version": "v2"}}}),
        &json!({"canonical_name": "cart", "canonical_revision": "v2"}),
    );
    mesh.pod(
        "canonical",
        18,
        &json!({"metadata": {"labels": {"app": "shop", "app.kubernetes.io/name": "cart",
            "service.istio.io/canonical-name": "till", "service.istio.io/canonical-revision": "v3"}}}),
        &json!({"canonical_name": "till", "canonical_revision": "v3"}),
    );
    // Controllers.
    let owned = |name: &str, kind: &str, owner: &str, labels: Value| {
        json!({"metadata": {"name": name, "generateName": format!("{owner}-"), "labels": labels,
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": kind, "name": owner, "uid": "u", "controller": true}]}})
    };
    let named = |name: &str| json!({"workload_name": name, "canonical_name": name});
    mesh.pod(
        "",
        19,
        &owned("front-5d4-x1", "ReplicaSet", "front-5d4", json!({"pod-template-hash": "5d4"})),
        &named("front"),
    );
    mesh.pod("", 20, &owned("backup-28000001-x2", "Job", "backup-28000001", json!({})), &named("backup"));
    mesh.pod("", 21, &owned("once-x3", "Job", "once", json!({})), &named("once"));
    mesh.pod("", 22, &owned("db-0", "StatefulSet", "db", json!({})), &named("db"));
    mesh.pod("", 23, &owned("agent-x4", "DaemonSet", "agent", json!({})), &named("agent"));
}

fn services(mesh: &mut Mesh) {
    let nothing = &json!({});
    let web = |spec: Value| json!({"spec": spec});
    mesh.service("plain-svc", 1, nothing, nothing);
    mesh.service(
        "headless",
        2,
        &web(json!({"clusterIP": "None"})),
        &json!({"addresses": null, "ip_families": "DUAL"}),
    );
    mesh.service(
        "local",
        3,
        &web(json!({"internalTrafficPolicy": "Local"})),
        &json!({"load_balancing": {"routing_preference": ["NODE"], "mode": "STRICT"}}),
    );
    mesh.service(
        "same-zone",
        4,
        &web(json!({"trafficDistribution": "PreferClose"})),
        &json!({"load_balancing": {"routing_preference": ["NETWORK", "REGION", "ZONE"], "mode": "FAILOVER"}}),
    );
    mesh.service(
        "early",
        5,
        &web(json!({"publishNotReadyAddresses": true})),
        &json!({"load_balancing": {"health_policy": "ALLOW_ALL"}}),
    );
    mesh.service(
        "annotated",
        6,
        &json!({"metadata": {"annotations": {"networking.istio.io/traffic-distribution": "PreferClose"}}}),
        &json!({"load_balancing": {"routing_preference": ["NETWORK", "REGION", "ZONE"], "mode": "FAILOVER"}}),
    );
    let protocols =
        [("http", "HTTP11"), ("http2", "HTTP2"), ("grpc", "GRPC"), ("tcp", "TCP"), ("https", "TLS")];
    let ports: Vec<Value> =
        (81..).zip(protocols).map(|(port, (name, _))| json!({"name": name, "port": port})).collect();
    let sent: Vec<Value> = (81..)
        .zip(protocols)
        .map(|(port, (_, protocol))| json!({"service_port": port, "target_port": port, "app_protocol": protocol}))
        .collect();
    mesh.service("protocols", 7, &web(json!({"ports": ports})), &json!({"ports": sent}));
    // An alias is DNS's alone.
    mesh.service(
        "alias",
        8,
        &web(json!({"clusterIP": null, "type": "ExternalName", "externalName": "example.org"})),
        &Value::Null,
    );

    // Endpoints by selector, and a named port that each pod has another number for.
    mesh.service("selecting", 9, &web(json!({"selector": {"of": "selecting"},
            "ports": [{"name": "web", "port": 80, "targetPort": 8080}, {"name": "named", "port": 81, "targetPort": "http"}]})),
        &json!({"ports": [{"service_port": 80, "target_port": 8080}, {"service_port": 81}]}));
    let named = |port: u16| {
        json!({"metadata": {"labels": {"of": "selecting"}},
        "spec": {"containers": [{"name": "main", "image": "none", "ports": [{"name": "http", "containerPort": port}]}]}})
    };
    let key = "demo/selecting.demo.svc.cluster.local";
    let serves = |port: u16| json!({"services": {key: {"ports": [{"service_port": 80, "target_port": 8080}, {"service_port": 81, "target_port": port}]}}});
    mesh.pod("selected-a", 31, &named(9000), &serves(9000));
    mesh.pod("selected-b", 32, &named(9001), &serves(9001));
    mesh.pod(
        "selected-c",
        33,
        &json!({"metadata": {"labels": {"of": "selecting"}}}),
        &json!({"services": {key: {"ports": [{"service_port": 80, "target_port": 8080}]}}}),
    );

    // Endpoints that are no pods.
    mesh.service("outside", 10, nothing, nothing);
    mesh.object(
        "EndpointSlice",
        "discovery.k8s.io/v1",
        "outside-1",
        &json!({
        "metadata": {"labels": {"kubernetes.io/service-name": "outside"}}, "addressType": "IPv4",
        "ports": [{"name": "web", "port": 7000, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["192.0.2.1"]}]}),
    );
    mesh.expected.insert("Kubernetes/discovery.k8s.io/EndpointSlice/demo/outside-1/192.0.2.1".to_owned(), json!({
        "aliases": ["/192.0.2.1"],
        "workload": {"uid": "Kubernetes/discovery.k8s.io/EndpointSlice/demo/outside-1/192.0.2.1",
            "name": "outside-1", "namespace": "demo", "addresses": ["192.0.2.1"], "cluster_id": "Kubernetes",
            "network_mode": "HOST_NETWORK",
            "services": {"demo/outside.demo.svc.cluster.local": {"ports": [{"service_port": 80, "target_port": 7000}]}}}}));
}

fn policies(mesh: &mut Mesh) {
    let rules = |rules: Value| json!({"spec": {"rules": rules}});
    let from = |source: Value| json!([{"from": [{"source": source}]}]);
    let one = |sent: Value| json!({"rules": [{"clauses": [{"matches": [sent]}]}]});
    mesh.policy("nobody", &json!({"spec": {}}), &json!({}));
    mesh.policy("everybody", &rules(json!([{}])), &json!({"rules": [{}]}));
    mesh.policy(
        "denies",
        &json!({"spec": {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["a"]}}]}]}}),
        &json!({"action": "DENY", "rules": [{"clauses": [{"matches": [{"namespaces": [{"exact": "a"}]}]}]}]}),
    );
    mesh.policy("principals", &rules(from(json!({"principals": ["cluster.local/ns/a/sa/b", "*/sa/b", "cluster.local/*", "*"]}))),
        &one(json!({"principals": [{"exact": "cluster.local/ns/a/sa/b"}, {"suffix": "/sa/b"}, {"prefix": "cluster.local/"}, {"presence": {}}]})));
    mesh.policy(
        "not-principals",
        &rules(from(json!({"notPrincipals": ["*"], "notNamespaces": ["b"]}))),
        &one(json!({"not_principals": [{"presence": {}}], "not_namespaces": [{"exact": "b"}]})),
    );
    mesh.policy("accounts", &rules(from(json!({"serviceAccounts": ["web", "other/web"], "notServiceAccounts": ["x"]}))),
        &one(json!({"service_accounts": [{"namespace": "demo", "service_account": "web"}, {"namespace": "other", "service_account": "web"}],
            "not_service_accounts": [{"namespace": "demo", "service_account": "x"}]})));
    mesh.policy("addresses", &rules(from(json!({"ipBlocks": ["10.0.0.0/8", "192.0.2.1"], "notIpBlocks": ["fd00::/64"]}))),
        &one(json!({"source_ips": [{"address": "10.0.0.0", "length": 8}, {"address": "192.0.2.1", "length": 32}],
            "not_source_ips": [{"address": "fd00::", "length": 64}]})));
    mesh.policy(
        "ports",
        &rules(json!([{"to": [{"operation": {"ports": ["80", "81"], "notPorts": ["82"]}}]}])),
        &one(json!({"destination_ports": [80, 81], "not_destination_ports": [82]})),
    );
    // First what is called, then who calls, then conditions.
    mesh.policy("all-at-once", &rules(json!([{"from": [{"source": {"namespaces": ["a"]}}, {"source": {"namespaces": ["b"]}}],
            "to": [{"operation": {"ports": ["80"]}}],
            "when": [{"key": "destination.ip", "values": ["10.0.0.1"]}, {"key": "source.namespace", "notValues": ["c"]}]}])),
        &json!({"rules": [{"clauses": [
            {"matches": [{"destination_ports": [80]}]},
            {"matches": [{"namespaces": [{"exact": "a"}]}, {"namespaces": [{"exact": "b"}]}]},
            {"matches": [{"destination_ips": [{"address": "10.0.0.1", "length": 32}]}]},
            {"matches": [{"not_namespaces": [{"exact": "c"}]}]}]}]}));
    mesh.policy(
        "dry",
        &json!({"metadata": {"annotations": {"istio.io/dry-run": "true"}}, "spec": {}}),
        &json!({"dry_run": true}),
    );
    mesh.policy("allows-get", &rules(json!([{"to": [{"operation": {"methods": ["GET"]}}]}])), &json!({}));
    mesh.policy(
        "for-waypoint",
        &json!({"spec": {"targetRefs": [{"kind": "Service", "group": "", "name": "plain-svc"}]}}),
        &Value::Null,
    );
    mesh.policy("audits", &json!({"spec": {"action": "AUDIT", "rules": [{}]}}), &Value::Null);
    mesh.policy(
        "selects",
        &json!({"spec": {"selector": {"matchLabels": {"team": "a"}}}}),
        &json!({"scope": "WORKLOAD_SELECTOR"}),
    );
    mesh.policy(
        "global",
        &json!({"metadata": {"namespace": "adit-system"}, "spec": {}}),
        &json!({"namespace": "adit-system", "scope": null}),
    );

    mesh.peer_authentication("ports", &json!({"selector": {"matchLabels": {"peer": "ports"}},
        "mtls": {"mode": "STRICT"}, "portLevelMtls": {"8080": {"mode": "PERMISSIVE"}, "8081": {"mode": "DISABLE"}}}));
    let anonymous = json!({"matches": [{"not_principals": [{"presence": {}}]}]});
    mesh.expected.insert("demo/converted_peer_authentication_ports".to_owned(), json!({
        "name": "converted_peer_authentication_ports", "namespace": "demo", "scope": "WORKLOAD_SELECTOR", "action": "DENY",
        "aliases": [], "rules": [{"clauses": [anonymous, {"matches": [{"not_destination_ports": [8080]}]},
            {"matches": [{"not_destination_ports": [8081]}]}]}]}));
    mesh.peer_authentication(
        "strict",
        &json!({"selector": {"matchLabels": {"peer": "strict"}}, "mtls": {"mode": "STRICT"}}),
    );
    mesh.expected.insert("adit-system/istio_converted_static_strict".to_owned(), json!({
        "name": "istio_converted_static_strict", "namespace": "adit-system", "scope": "WORKLOAD_SELECTOR", "action": "DENY",
        "aliases": [], "rules": [{"clauses": [anonymous]}]}));
    for (name, last, key) in [
        ("peer-ports", 41, "demo/converted_peer_authentication_ports"),
        ("peer-strict", 42, "adit-system/istio_converted_static_strict"),
    ] {
        let peer = name.strip_prefix("peer-").unwrap();
        mesh.pod(
            name,
            last,
            &json!({"metadata": {"labels": {"peer": peer}}}),
            &json!({"authorization_policies": [key]}),
        );
    }
    mesh.pod(
        "selected-by-policy",
        43,
        &json!({"metadata": {"labels": {"team": "a"}}}),
        &json!({"authorization_policies": ["demo/selects"]}),
    );
}

/// What the client has, when it is what is expected or the time is over.
fn read(control: &Control, expected: &BTreeMap<String, Value>) -> BTreeMap<String, Value> {
    let python = cache().join("grpc/bin/python");
    assert!(python.exists(), "{} is missing: make setup", python.display());
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root.pem");
    std::fs::write(&root, &control.root).unwrap();
    let mut command = Command::new(python);
    command
        .arg(here.join("tests/foreign_client/client.py"))
        .arg(format!("localhost:{}", control.grpc.port()))
        .arg(root)
        .arg(here.join("../../watcher/testbed/src/fakes/fake_control_plane"));
    let mut client = KillOnDrop(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    writeln!(client.0.stdin.take().unwrap(), "{}", control.token(&unique("node"))).unwrap();
    let (sender, lines) = mpsc::channel();
    let output = BufReader::new(client.0.stdout.take().unwrap());
    thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let (deadline, mut has) = (Instant::now() + LIMIT, BTreeMap::new());
    while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        let all: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_str(&line).unwrap();
        has = all[ADDRESS].clone();
        has.extend(all[AUTHORIZATION].clone());
        // The API server's own service, and the pods of the tests' tokens.
        has.retain(|name, _| {
            !name.starts_with("default/kubernetes.") && !name.contains("/adit-system/bound-")
        });
        if has == *expected {
            break;
        }
    }
    has
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_foreign_tunnel_reads_what_istios_control_plane_would_send() {
    let api = Arc::new(ApiServer::start());
    let control = Control::start_with_istio(Arc::clone(&api), &[]);
    let mut mesh = Mesh::default();
    nodes(&mut mesh);
    pods(&mut mesh);
    services(&mut mesh);
    policies(&mut mesh);
    api.namespace(NAMESPACE, &json!({}));
    api.service_account(NAMESPACE, "web");
    mesh.objects.sort_by_key(|object| object["kind"] == "EndpointSlice");
    assert!(mesh.objects.len() >= 60, "{}", mesh.objects.len());
    for object in &mesh.objects {
        api.apply(&object.to_string());
    }
    for (name, status) in &mesh.pods {
        api.set_status(NAMESPACE, name, status);
    }
    let has = read(&control, &mesh.expected);
    let names: BTreeSet<&String> = has.keys().chain(mesh.expected.keys()).collect();
    let different: Vec<String> = names
        .into_iter()
        .filter(|name| has.get(*name) != mesh.expected.get(*name))
        .map(|name| {
            format!("{name}:\n  has      {:?}\n  expected {:?}", has.get(name), mesh.expected.get(name))
        })
        .collect();
    assert!(different.is_empty(), "{}", different.join("\n"));
}
