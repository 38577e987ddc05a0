//! The chart: what Helm makes of it, and whether everything in it is true of the programs and of the
//! API server.

mod containers;
mod control;
mod objects;
mod values;

use serde_json::Value;
use testbed::chart;

/// A switcher's values: names of Istio's ztunnel chart only, and some that all of its charts share.
const ISTIO_VALUES: &str = "
profile: ambient
hub: registry.example/istio
tag: 1.28.0
variant: distroless
revision: canary
istioNamespace: mesh-system
network: east
multiCluster: {clusterName: one}
logLevel: debug
logAsJson: true
caAddress: unix:/run/ca.sock
env: {ZTUNNEL_WORKER_THREADS: 3, RUST_LOG: info}
meshConfig: {trustDomainAliases: [old.example], defaultConfig: {proxyMetadata: {ISTIO_META_DNS_CAPTURE: 'false'}}}
terminationGracePeriodSeconds: 60
peerCaCrl: {enabled: true}
resources: {limits: {memory: 1Gi}}
seLinuxOptions: {type: spc_t}
resourceQuotas: {enabled: true, pods: 100}
updateStrategy: {rollingUpdate: {maxSurge: 0, maxUnavailable: 1}}
podLabels: {team: network}
podAnnotations: {example.org/note: text}
volumes: [{name: more, emptyDir: {}}]
volumeMounts: [{name: more, mountPath: /more}]
imagePullSecrets: [first, second]
global: {networkPolicy: {enabled: true}, variant: distroless, proxy: {image: unused}}
";

/// Every part and every option at once.
const EVERYTHING: &str = "
resourceName: mesh-tunnel
labels: {team: network}
annotations: {example.org/note: text}
config: {pool: {idle: 10m}, budget: {pod_dials: 64}}
affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Exists}]}]}}}
dnsPolicy: None
dnsConfig: {nameservers: [10.96.0.10]}
platform: openshift
resourceQuotas: {enabled: true}
imagePullPolicy: Never
rootConfigMap: mesh.root
peerCaCrl: {enabled: true}
control:
  replicas: 3
  rootSecret: mesh.root-key
  rootNamespace: policies
  trustDomain: example.org
  clusterDomain: east.example.org
  certificateLife: 600
  acknowledge: 5
  logLevel: info,ztunnel_control=debug
  resources: {limits: {cpu: 1, memory: 256Mi}}
  priorityClassName: ''
  nodeSelector: {}
  affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Exists}]}]}}}
  tolerations: []
watcher:
  failMode: open
  dnsCapture: true
  dnsResolvers: [10.96.0.10, 'fd00::a']
  dataplaneLabels: [istio.io/dataplane-mode=ambient, example.org/mesh]
  sidecarContainers: [linkerd-proxy]
  detectSidecars: true
  lists:
    excludeOutboundPorts: [6379, 7000-7010]
    excludeOutboundCidrs: [192.168.0.0/16, 'fd00::/8']
    excludeInterfaces: ['net*']
    guards: [istio, 'uid:5000', 'container:proxy']
    excludeInboundPorts: [9090]
    includeOutboundPorts: ['*']
    includeOutboundCidrs: ['::/0']
    includeInboundPorts: [8080]
  annotationsOf: [istio, linkerd, kuma, osm, fsm]
  startupTaint: adit.dev/not-ready
  writeBack: false
  tunnelAccounts: [other/tunnel]
  attach: kubepods.slice
  events: scan
  rescan: 3600
  leaveGrace: 600
  kubeletPort: 10350
  detach: true
  metricsAddress: 0.0.0.0:9000
  logLevel: info,watcher=debug
  resources: {limits: {cpu: 1, memory: 256Mi}}
logAsJson: true
networkPolicy: {enabled: true}
dashboard: {enabled: true, labels: {a: b}}
";

/// The charts that the tests look at: a name, and the values beside the chart's own.
const VARIANTS: [(&str, &str); 6] = [
    ("the chart's own values", "{}"),
    ("istio", "profile: istio"),
    ("redirect-only", "profile: redirect-only"),
    ("values of Istio's chart", ISTIO_VALUES),
    ("everything at once", EVERYTHING),
    ("redirect-only, with write-back and a taint", "{profile: redirect-only, watcher: {startupTaint: a/b}}"),
];

/// Where the tests install it.
const NAMESPACE: &str = "adit-system";

/// The manifest that these values make.
fn rendered(values: &str) -> String {
    try_rendered(values).unwrap_or_else(|said| panic!("{said}\nwith {values}"))
}

/// The same, or what Helm says against it.
fn try_rendered(values: &str) -> Result<String, String> {
    let file = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(file.path(), values).expect("values");
    chart::try_render(NAMESPACE, &["--values", file.path().to_str().expect("a readable path")])
}

/// The one object of this kind, beside the control plane's own and the lists.
fn object(manifest: &str, kind: &str) -> Value {
    one(manifest, kind, |name| name != "ztunnel-control" && name != "adit-lists")
}

/// The one object of this kind of the control plane.
fn control_object(manifest: &str, kind: &str) -> Value {
    one(manifest, kind, |name| name == "ztunnel-control")
}

fn one(manifest: &str, kind: &str, is_named: impl Fn(&Value) -> bool) -> Value {
    let objects = chart::objects(manifest).into_iter();
    let mut found: Vec<Value> =
        objects.filter(|object| object["kind"] == kind && is_named(&object["metadata"]["name"])).collect();
    assert_eq!(found.len(), 1, "{kind} in {manifest}");
    found.remove(0)
}

/// A container of DaemonSet or Deployment; `None`: there is none of this name.
fn container(manifest: &str, name: &str) -> Option<Value> {
    let containers = |object: &Value| object["spec"]["template"]["spec"]["containers"].as_array().cloned();
    let all = chart::objects(manifest).iter().filter_map(containers).flatten().collect::<Vec<Value>>();
    all.into_iter().find(|container| container["name"] == name)
}
