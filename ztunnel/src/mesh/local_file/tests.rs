use std::fs;

use tokio::time::timeout;

use super::*;
use crate::mesh::{
    PolicyKey, Protocol, ServiceKey,
    policies::{Action, Clause, Match, PolicyScope, Rule, ServiceAccountMatch, StringMatch},
    services::{AppProtocol, HealthPolicy, LbMode, LbScope, PortMap, Visibility},
    tests::ip,
};

fn defaults() -> ResourceDefaults {
    ResourceDefaults { trust_domain: "cluster.local".into(), cluster_id: "Kubernetes".into() }
}

fn parsed(document: &str) -> Mesh {
    parse(document, &defaults()).unwrap_or_else(|error| panic!("{error}"))
}

fn refusal(document: &str) -> String {
    parse(document, &defaults()).expect_err("must be refused").to_string()
}

const FULL: &str = r#"
workloads:
- uid: cluster1//v1/Pod/default/web-1
  name: web-1
  namespace: default
  serviceAccount: web
  workloadIps: ["10.0.0.1", "fd00::1"]
  protocol: HBONE
  node: node-a
  network: ""
  clusterId: cluster1
  trustDomain: td.example
  canonicalName: web
  canonicalRevision: v1
  workloadName: web
  workloadType: deployment
  networkMode: Standard
  status: Healthy
  capacity: 3
  nativeTunnel: false
  locality: {region: r, zone: z, subzone: ""}
  authorizationPolicies: ["default/one"]
  services:
    "default/web.default.svc.cluster.local": {80: 8080}
- name: plain
  namespace: other
  workloadIp: 10.0.0.2
services:
- name: web
  namespace: default
  hostname: web.default.svc.cluster.local
  vips: ["/10.96.0.1", "east/fd96::1"]
  ports: {80: 8080, 443: 0}
  subjectAltNames: ["spiffe://td.example/ns/default/sa/other"]
  ipFamilies: Dual
  loadBalancer: {routingPreferences: [], mode: Standard, healthPolicy: AllowAll}
policies:
- name: one
  namespace: default
  scope: WorkloadSelector
  action: Deny
  dryRun: true
  rules:
  - - - namespaces: [{Exact: a}, plain]
        notNamespaces: [{Prefix: b}]
        principals: [{Suffix: c}, {Presence: []}]
        notPrincipals: [{Presence: null}]
        serviceAccounts: [{namespace: n, serviceAccount: s}]
        sourceIps: ["10.0.0.0/8", "fd00::7"]
        notSourceIps: ["10.1.0.0/16"]
        destinationIps: ["10.0.0.1/32"]
        destinationPorts: [8080]
        notDestinationPorts: [81]
    - []
"#;

#[test]
fn every_key_of_the_format_is_understood() {
    let mesh = parsed(FULL);
    let web = mesh.workload_by_address("", ip("fd00::1")).unwrap();
    assert_eq!(web.identity().to_string(), "spiffe://td.example/ns/default/sa/web");
    assert_eq!(
        (web.protocol, web.capacity, web.healthy, web.host_network),
        (Protocol::Hbone, 3, true, false)
    );
    assert_eq!((&*web.cluster_id, &*web.node, &*web.locality.region), ("cluster1", "node-a", "r"));
    assert_eq!(web.policies, ["default/one".parse::<PolicyKey>().unwrap()]);
    let key: ServiceKey = "default/web.default.svc.cluster.local".parse().unwrap();
    let service = mesh.service_by_vip("", ip("10.96.0.1")).unwrap();
    assert_eq!(service.key(), key);
    assert!(Arc::ptr_eq(service, mesh.service_by_vip("east", ip("fd96::1")).unwrap()));
    assert_eq!(service.ports, PortMap::from([(80, 8080), (443, 0)]));
    assert_eq!(service.load_balancing.health_policy, HealthPolicy::AllowAll);
    assert_eq!(mesh.endpoints(&key).len(), 1);

    let policy = mesh.policies().find(|policy| policy.key.to_string() == "default/one").unwrap();
    assert_eq!(
        (policy.scope, policy.action, policy.dry_run),
        (PolicyScope::WorkloadSelector, Action::Deny, true)
    );
    let [Rule(clauses)] = &policy.rules[..] else { panic!("{:?}", policy.rules) };
    let [Clause(matches), Clause(empty)] = &clauses[..] else { panic!("{clauses:?}") };
    assert!(empty.is_empty());
    let expected = Match {
        namespaces: vec![StringMatch::Exact("a".into()), StringMatch::Exact("plain".into())],
        not_namespaces: vec![StringMatch::Prefix("b".into())],
        principals: vec![StringMatch::Suffix("c".into()), StringMatch::Presence],
        not_principals: vec![StringMatch::Presence],
        service_accounts: vec![ServiceAccountMatch { namespace: "n".into(), service_account: "s".into() }],
        not_service_accounts: vec![],
        source_ips: vec!["10.0.0.0/8".parse().unwrap(), "fd00::7/128".parse().unwrap()],
        not_source_ips: vec!["10.1.0.0/16".parse().unwrap()],
        destination_ips: vec!["10.0.0.1/32".parse().unwrap()],
        not_destination_ips: vec![],
        destination_ports: vec![8080],
        not_destination_ports: vec![81],
    };
    assert_eq!(matches[..], [expected]);
}

#[test]
fn what_is_left_out_has_istios_defaults() {
    let mesh = parsed(FULL);
    let plain = mesh.workload_by_address("", ip("10.0.0.2")).unwrap();
    assert_eq!(plain.identity().to_string(), "spiffe://cluster.local/ns/other/sa/default");
    assert_eq!((plain.protocol, plain.capacity, plain.healthy), (Protocol::Tcp, 1, true));
    assert_eq!((&*plain.uid, &*plain.cluster_id), ("other/plain", "Kubernetes"));
}

#[test]
fn an_empty_document_is_an_empty_mesh() {
    for document in ["", "{}", "workloads: []", "# nothing\n"] {
        assert_eq!(parsed(document).workloads().count(), 0, "{document:?}");
    }
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    let workload = |line: &str| format!("workloads:\n- name: a\n  namespace: b\n  {line}");
    let service = |line: &str| format!("services:\n- name: a\n  namespace: b\n  hostname: a.b\n  {line}");
    let policy = |one: &str| {
        format!("policies:\n- {{name: a, namespace: b, scope: Global, action: Allow, rules: [[[{one}]]]}}")
    };
    for (document, names) in [
        ("policy: []".to_owned(), "policy"),
        (workload("serviceacount: x"), "serviceacount"),
        (workload("protocol: QUIC"), "QUIC"),
        (workload("workloadIps: [10.0.0.300]"), "10.0.0.300"),
        (workload("applicationTunnel: {protocol: QUIC}"), "QUIC"),
        (workload("waypoint: {destination: nowhere}"), "workload b/a: waypoint: \"nowhere\""),
        (workload("networkGateway: {destination: /10.0.0.1, hboneMtlsPort: 0}"), "b/a: networkGateway"),
        (workload("authorizationPolicies: [x]"), "workload b/a: authorizationPolicies"),
        (workload("services: {web: {80: 80}}"), "workload b/a: services: \"web\""),
        (workload("serviceAccount: a/b"), "spiffe://cluster.local/ns/b/sa/a/b"),
        ("workloads:\n- name: a".to_owned(), "namespace"),
        (service("vips: [10.0.0.1]"), "service b/a.b: vips: \"10.0.0.1\""),
        (service("vips: [/10.0.0]"), "10.0.0"),
        (service("ports: {0: 1}"), "port 0"),
        (service("ports: {80: 99999}"), "99999"),
        (service("subjectAltNames: [web]"), "service b/a.b: subjectAltNames: \"web\""),
        (service("loadBalancer: {routingPreferences: [Rack]}"), "Rack"),
        (service("vips: [/10.0.0.0/33]"), "10.0.0.0/33"),
        (service("weightedWaypoints: [{destination: {destination: b/w.b}}]"), "weight"),
        (policy("{namespace: [x]}"), "namespace"),
        (policy("{namespaces: [{Regex: x}]}"), "one of Exact, Prefix, Suffix and Presence"),
        (policy("{sourceIps: [10.0.0.0/33]}"), "policy b/a: sourceIps: \"10.0.0.0/33\""),
        (policy("{destinationPorts: [http]}"), "http"),
        ("policies:\n- {name: a, namespace: b, scope: Cluster, action: Allow}".to_owned(), "Cluster"),
        ("policies:\n- {name: a, namespace: b, scope: Global, action: Audit}".to_owned(), "Audit"),
        ("- a".to_owned(), "not a valid document"),
    ] {
        let refusal = refusal(&document);
        assert!(refusal.contains(names), "{document}\n→ {refusal}, which does not name {names}");
    }
}

#[test]
fn two_of_one_name_or_address_are_refused() {
    let twice = |entry: &str| format!("workloads:\n- {entry}\n- {entry}");
    assert!(refusal(&twice("{name: a, namespace: b}")).contains("workload b/a"));
    let document = "workloads:\n- {name: a, namespace: b, workloadIp: 10.0.0.1}\n\
                    - {name: c, namespace: b, workloadIp: 10.0.0.1}";
    assert!(refusal(document).contains("also that of workload a"));
    let elsewhere = document.replace("name: c,", "name: c, network: east,");
    assert_eq!(parsed(&elsewhere).workloads().count(), 2);
}

#[test]
fn gateways_are_named_by_address_or_host_in_either_spelling() {
    let gateway = |written: &str| {
        let mesh = parsed(&format!("workloads:\n- {{name: a, namespace: b, waypoint: {written}}}"));
        mesh.workloads().next().unwrap().waypoint.as_ref().unwrap().to_string()
    };
    for (written, expected) in [
        ("{destination: {namespace: b, hostname: w}, hboneMtlsPort: 15009}", "b/w:15009"),
        ("{destination: b/w.b}", "b/w.b:15008"),
        ("{destination: east/10.0.0.1}", "east/10.0.0.1:15008"),
        ("{destination: {address: 10.0.0.1}}", "/10.0.0.1:15008"),
        ("{destination: '/fd00::1'}", "/fd00::1:15008"),
    ] {
        assert_eq!(gateway(written), expected, "{written}");
    }
}

#[test]
fn rare_keys_are_understood() {
    let mesh = parsed(
        "workloads:\n- {name: a, namespace: b, hostname: a.example, nativeTunnel: true,
           networkGateway: {destination: east/10.0.0.9}, applicationTunnel: {protocol: PROXY, port: 15088}}
services:\n- {name: a, namespace: b, hostname: a.b, vips: [east/10.0.0.7/8], visibility: Namespace, ports: {80: 80},
           appProtocols: {80: HTTP2}, loadBalancer: {routingPreferences: [Network, Zone], mode: Failover},
           weightedWaypoints: [{destination: {destination: b/w.b}, weight: 7}]}",
    );
    let workload = serde_json::to_value(mesh.workloads().next().unwrap()).unwrap();
    assert_eq!(workload["hostname"], "a.example");
    assert_eq!(workload["nativeTunnel"], true);
    assert_eq!(workload["networkGateway"]["destination"], "east/10.0.0.9");
    assert_eq!(workload["applicationTunnel"], serde_json::json!({"protocol": "PROXY", "port": 15088}));
    let service = mesh.services().next().unwrap();
    assert_eq!(service.cidr_vips, [("east".into(), "10.0.0.0/8".parse().unwrap())]);
    assert_eq!(service.visibility, Visibility::Namespace);
    assert_eq!(service.app_protocols, [(80, AppProtocol::Http2)].into());
    assert_eq!(service.load_balancing.mode, LbMode::Failover);
    assert_eq!(service.load_balancing.preferences, [LbScope::Network, LbScope::Zone]);
    let [waypoint] = &service.weighted_waypoints[..] else { panic!("{service:?}") };
    assert_eq!((waypoint.destination.to_string().as_str(), waypoint.weight), ("b/w.b:15008", 7));
}

fn one(name: &str) -> String {
    format!("workloads:\n- {{name: {name}, namespace: b, workloadIp: 10.0.0.1}}")
}

#[tokio::test]
async fn an_edit_applies_while_running_and_a_bad_one_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mesh.yaml");
    fs::write(&path, one("first")).unwrap();
    let store = Arc::new(Store::new(parse(&one("first"), &defaults()).unwrap()));
    let stop = CancellationToken::new();
    let watching = tokio::spawn(watch(path.clone(), defaults(), Arc::clone(&store), stop.clone()));
    let shows = |name: &'static str| {
        let store = Arc::clone(&store);
        async move {
            let mut versions = store.subscribe();
            let seen = || store.snapshot().workloads().any(|workload| &*workload.name == name);
            timeout(Duration::from_secs(10), async {
                while !seen() {
                    versions.changed().await.unwrap();
                }
            })
            .await
            .unwrap_or_else(|_| panic!("{name} never came"));
        }
    };

    fs::write(&path, one("written")).unwrap();
    shows("written").await;
    fs::write(folder.path().join("new"), one("renamed")).unwrap();
    fs::rename(folder.path().join("new"), &path).unwrap();
    shows("renamed").await;

    // Seen or not, neither a bad edit nor a missing file replaces anything.
    let version = *store.subscribe().borrow();
    fs::write(&path, "workload: []").unwrap();
    apply(&path, &fs::read_to_string(&path).unwrap(), &defaults(), &store);
    fs::remove_file(&path).unwrap();
    fs::write(&path, one("again")).unwrap();
    shows("again").await;
    assert_eq!(*store.subscribe().borrow(), version + 1, "only the good edits count");
    stop.cancel();
    watching.await.unwrap();
}
