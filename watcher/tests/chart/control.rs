//! The control plane of profile `standalone`: started with the chart's arguments and the chart's
//! rights it is what the chart's tunnels call.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use testbed::{api_server::ApiServer, chart, command, process::Process, program::binary, wait::wait_for};

use super::{
    EVERYTHING, NAMESPACE, VARIANTS, container, containers::environment, control_object, object, rendered,
};

const STANDALONE: [&str; 2] = ["{}", EVERYTHING];

fn arguments(manifest: &str) -> Vec<String> {
    let control = container(manifest, "ztunnel-control").unwrap();
    assert_eq!(control["command"], json!(["/usr/local/bin/ztunnel-control"]));
    let arguments = control["args"].as_array().unwrap().iter();
    arguments.map(|argument| argument.as_str().unwrap().to_owned()).collect()
}

/// The value of an argument `--name=value`.
fn argument(manifest: &str, name: &str) -> String {
    let arguments = arguments(manifest);
    let found = arguments.iter().find_map(|argument| argument.strip_prefix(name)?.strip_prefix('='));
    found.unwrap_or_else(|| panic!("{name} in {arguments:?}")).to_owned()
}

/// Its variables.
fn variables(manifest: &str) -> BTreeMap<String, String> {
    environment(&container(manifest, "ztunnel-control").unwrap())
}

/// The value of a variable of the tunnel.
fn variable(manifest: &str, name: &str) -> String {
    environment(&container(manifest, "ztunnel").unwrap())[name].clone()
}

/// The ConfigMap that the tunnel's pods mount for the root.
fn mounted_root(manifest: &str) -> String {
    let set = object(manifest, "DaemonSet");
    let volumes = set["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
    let root = volumes.iter().find(|volume| volume["name"] == "istiod-ca-cert").expect("the volume");
    root["configMap"]["name"].as_str().unwrap().to_owned()
}

#[test]
#[ignore = "needs Helm: make test"]
fn tunnels_know_the_trust_domains_of_the_mesh_configuration() {
    let manifest = rendered("{profile: istio, revision: canary}");
    assert!(manifest.contains("name: istio-canary\n"), "{manifest}");
    assert!(manifest.contains("configMap: {name: istio-trust-domains, optional: true}"), "{manifest}");
    let mounted = container(&manifest, "ztunnel").unwrap()["volumeMounts"].clone();
    for (variable_name, volume) in
        [("MESH_CONFIG_PATH", "istio-mesh-config"), ("TRUST_DOMAINS_PATH", "istio-trust-domains")]
    {
        let mounts = mounted.as_array().unwrap();
        let mount = mounts.iter().find(|mount| mount["name"] == volume).expect(volume);
        let folder = mount["mountPath"].as_str().unwrap();
        assert!(variable(&manifest, variable_name).starts_with(folder), "{variable_name}");
    }
    assert!(!rendered("{}").contains("istio-trust-domains"), "ztunnel-control has no such file");
    let aliases = "{meshConfig: {trustDomainAliases: [old.example, older.example]}}";
    assert_eq!(variable(&rendered(aliases), "TRUST_DOMAIN_ALIASES"), "old.example,older.example");
}

#[test]
#[ignore = "needs Helm: make test"]
fn it_takes_every_argument() {
    for values in STANDALONE {
        let with = |more: &str| {
            let manifest = rendered(values);
            let mut command = Command::new(binary("ztunnel-control"));
            command.args(arguments(&manifest)).args([more, "--help"]);
            command.env_clear().envs(variables(&manifest)).output().unwrap()
        };
        let output = with("--listen=[::]:15012");
        let said = command::text(&output);
        assert!(output.status.success(), "{values}: {said}");
        // Where it listens by itself is what service and probes name.
        let control = container(&rendered(values), "ztunnel-control").unwrap();
        for port in control["ports"].as_array().unwrap() {
            assert!(said.contains(&format!("[default: [::]:{}]", port["containerPort"])), "{port}: {said}");
        }
        // Lines are broken anywhere.
        let words: Vec<&str> = said.split_whitespace().collect();
        let words = words.join(" ");
        for (name, value) in variables(&rendered(values)) {
            assert!(words.contains(&format!("[env: {name}={value}]")), "{name}: {said}");
        }
        assert_eq!(with("--no-such-argument").status.code(), Some(2), "{values}");
    }
}

#[test]
#[ignore = "needs root: make test"]
fn with_the_charts_rights_it_becomes_what_the_charts_tunnels_call() {
    for values in STANDALONE {
        let manifest = rendered(values);
        let api = ApiServer::start();
        for object in chart::objects(&manifest) {
            let kind = object["kind"].as_str().unwrap();
            if object["metadata"]["name"] == "ztunnel-control"
                && (kind.contains("Role") || kind == "ServiceAccount")
            {
                api.apply(&object.to_string());
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let port = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (grpc, http) = (port(), port());
        let mut command = Command::new(binary("ztunnel-control"));
        command
            .args(arguments(&manifest))
            .args([format!("--listen=127.0.0.1:{grpc}"), format!("--http-listen=127.0.0.1:{http}")])
            .env_clear()
            .envs(variables(&manifest))
            .env("KUBECONFIG", api.kubeconfig_of(NAMESPACE, "ztunnel-control"))
            .stdin(Stdio::null());
        let _control = Process::spawn("ztunnel-control", command, &folder.path().join("log"));

        let control = container(&manifest, "ztunnel-control").unwrap();
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            assert_eq!(control[probe]["httpGet"]["port"], "control-http");
            let url =
                format!("http://127.0.0.1:{http}{}", control[probe]["httpGet"]["path"].as_str().unwrap());
            wait_for(&format!("{url} to be served"), || curl(&["--fail", &url]).then_some(()));
        }
        let maps: kube::Api<k8s_openapi::api::core::v1::ConfigMap> =
            kube::Api::namespaced(api.client(), NAMESPACE);
        let published = api.block_on(maps.get(&mounted_root(&manifest))).unwrap();
        let root = folder.path().join("root.pem");
        std::fs::write(&root, &published.data.unwrap()["root-cert.pem"]).unwrap();
        // By the name that the tunnel calls, and with the root that it has.
        for name in ["XDS_ADDRESS", "CA_ADDRESS"] {
            let address = variable(&manifest, name);
            let host = address.strip_prefix("https://").and_then(|rest| rest.strip_suffix(":15012")).unwrap();
            let resolve = format!("{host}:{grpc}:127.0.0.1");
            let url = format!("https://{host}:{grpc}/");
            let root = root.to_str().unwrap();
            assert!(curl(&["--cacert", root, "--resolve", &resolve, &url]), "{name}: {url}");
            assert!(!curl(&["--resolve", &resolve, &url]), "{name}: without the root");
        }
    }
}

fn curl(arguments: &[&str]) -> bool {
    let common = ["-sS", "--noproxy", "*", "--max-time", "5", "-o", "/dev/null"];
    Command::new("curl").args(common).args(arguments).output().expect("curl").status.success()
}

#[test]
#[ignore = "needs Helm: make test"]
fn names_that_two_sides_use_are_the_same() {
    for values in STANDALONE {
        let manifest = rendered(values);
        let host = format!("ztunnel-control.{NAMESPACE}.svc");
        assert_eq!(variable(&manifest, "XDS_ADDRESS"), format!("https://{host}:15012"));
        assert_eq!(control_object(&manifest, "Service")["spec"]["ports"][0]["port"], 15012);
        assert_eq!(variables(&manifest)["ROOT_CONFIG_MAP"], mounted_root(&manifest));
        assert_eq!(argument(&manifest, "--cluster-id"), variable(&manifest, "ISTIO_META_CLUSTER_ID"));
        let account = &object(&manifest, "DaemonSet")["spec"]["template"]["spec"]["serviceAccountName"];
        let account = format!("{NAMESPACE}/{}", account.as_str().unwrap());
        assert_eq!(argument(&manifest, "--tunnel-account"), account);

        let deployment = control_object(&manifest, "Deployment");
        let pod = &deployment["spec"]["template"];
        for selector in [
            &deployment["spec"]["selector"]["matchLabels"],
            &control_object(&manifest, "Service")["spec"]["selector"],
            &control_object(&manifest, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
            &pod["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        ] {
            assert_eq!(selector, &json!({"app": "ztunnel-control"}));
        }
        assert_eq!(pod["metadata"]["labels"]["app"], "ztunnel-control");
        assert_eq!(pod["metadata"]["labels"]["istio.io/dataplane-mode"], "none");
        let subject = json!([{"kind": "ServiceAccount", "name": pod["spec"]["serviceAccountName"],
            "namespace": NAMESPACE}]);
        for kind in ["ClusterRoleBinding", "RoleBinding"] {
            assert_eq!(control_object(&manifest, kind)["subjects"], subject);
        }
    }
    // Istio's own names stay where its control plane is.
    let manifest = rendered("profile: istio");
    assert_eq!(mounted_root(&manifest), "istio-ca-root-cert");
    assert_eq!(variable(&manifest, "CA_ADDRESS"), "https://istiod.istio-system.svc:15012");
    assert_eq!(mounted_root(&rendered("{}")), "adit-root-cert");
    let manifest = rendered("peerCaCrl: {enabled: true}");
    let list = &variables(&manifest)["CRL_CONFIG_MAP"];
    assert!(manifest.contains(&format!("configMap: {{name: {list}, optional: true}}")), "{manifest}");
    assert!(!variables(&rendered("{}")).contains_key("CRL_CONFIG_MAP"));
    assert_eq!(mounted_root(&rendered("{profile: istio, rootConfigMap: mesh.root}")), "mesh.root");
}

#[test]
#[ignore = "needs Helm: make test"]
fn it_is_there_with_its_profile_only_and_has_no_privileges() {
    for (name, values) in VARIANTS {
        let manifest = rendered(values);
        assert_eq!(manifest.contains("ztunnel-control"), STANDALONE.contains(&values), "{name}");
    }
    for values in STANDALONE {
        let manifest = rendered(values);
        let deployment = control_object(&manifest, "Deployment");
        let pod = &deployment["spec"]["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        assert_eq!(
            (&pod["volumes"], &pod["hostNetwork"], &pod["hostPID"]),
            (&Value::Null, &Value::Null, &Value::Null)
        );
        let security = &pod["containers"][0]["securityContext"];
        assert_eq!(
            security,
            &json!({"privileged": false, "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}})
        );
    }
}

/// Watchers wait for the root that the control plane publishes, and nodes for their watchers.
#[test]
#[ignore = "needs Helm: make test"]
fn it_starts_on_a_node_that_waits_for_its_watcher() {
    let manifest = rendered("watcher: {startupTaint: adit.dev/not-ready}");
    let deployment = control_object(&manifest, "Deployment");
    let tolerated = deployment["spec"]["template"]["spec"]["tolerations"].as_array().unwrap();
    assert!(tolerated.contains(&json!({"key": "adit.dev/not-ready", "operator": "Exists"})), "{tolerated:?}");
}

#[test]
#[ignore = "needs Helm: make test"]
fn monitoring_and_network_policy_know_it() {
    let manifest = rendered("{podMonitor: {enabled: true}, networkPolicy: {enabled: true}, platform: gke}");
    let control = container(&manifest, "ztunnel-control").unwrap();
    let ports = control["ports"].as_array().unwrap();
    let monitor = control_object(&manifest, "PodMonitor");
    assert!(ports.iter().any(|port| port["name"] == monitor["spec"]["podMetricsEndpoints"][0]["port"]));
    let policy = control_object(&manifest, "NetworkPolicy");
    let open: Vec<&Value> = policy["spec"]["ingress"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|rule| rule["ports"].as_array().unwrap())
        .map(|port| &port["port"])
        .collect();
    assert_eq!(open, ports.iter().map(|port| &port["containerPort"]).collect::<Vec<_>>());
    let tunnels = &object(&manifest, "DaemonSet")["spec"]["selector"];
    assert_eq!(&policy["spec"]["ingress"][0]["from"][0]["podSelector"], tunnels);
    let quota = object(&manifest, "ResourceQuota");
    let classes = &quota["spec"]["scopeSelector"]["matchExpressions"][0]["values"];
    assert_eq!(classes, &json!(["system-node-critical", "system-cluster-critical"]));
}
