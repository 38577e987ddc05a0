//! The objects: known to the API server field by field, true to each other, and explained.

use std::{collections::BTreeSet, fs};

use serde_json::{Value, json};
use testbed::{api_server::ApiServer, chart};

use super::{NAMESPACE, VARIANTS, object, rendered};

#[test]
#[ignore = "needs root: make test"]
fn the_api_server_knows_every_field() {
    let api = ApiServer::shared();
    for (name, values) in VARIANTS {
        for object in chart::objects(&rendered(values)) {
            let of = format!("{name}: {} {}", object["kind"], object["metadata"]["name"]);
            if let Err(error) = api.check(&object) {
                panic!("{of}: {error}");
            }
        }
    }
    // The check finds what is wrong.
    let mut set = object(&rendered("{}"), "DaemonSet");
    set["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = json!({});
    let said = api.check(&set).expect_err("a field that there is not").to_string();
    assert!(said.contains("readinesProbe"), "{said}");
}

fn is_control(object: &Value) -> bool {
    object["metadata"]["name"] == "ztunnel-control"
}

#[test]
#[ignore = "needs Helm: make test"]
fn account_rights_and_policy_are_of_the_pods() {
    for (name, values) in VARIANTS {
        let manifest = rendered(values);
        let set = object(&manifest, "DaemonSet");
        let account = set["spec"]["template"]["spec"]["serviceAccountName"].as_str().unwrap();
        assert_eq!(object(&manifest, "ServiceAccount")["metadata"]["name"], account, "{name}");
        let bindings = chart::objects(&manifest);
        let bindings: Vec<&Value> = bindings
            .iter()
            .filter(|object| object["kind"] == "ClusterRoleBinding" && !is_control(object))
            .collect();
        assert!(!bindings.is_empty());
        for binding in bindings {
            let subject = json!([{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}]);
            assert_eq!(binding["subjects"], subject, "{name}");
        }
        if values.contains("writeBack: false") {
            assert!(!manifest.contains("pods/status"), "{name}: a right, or a policy, that nobody needs");
        }
        let objects = chart::objects(&manifest);
        let policies = objects.iter().filter(|object| object["kind"] == "ValidatingAdmissionPolicy");
        let expressions: Vec<&str> = policies
            .map(|policy| policy["spec"]["matchConditions"][0]["expression"].as_str().unwrap())
            .collect();
        let rights = usize::from(manifest.contains("resources: [pods/status]\n  verbs"))
            + usize::from(manifest.contains("resources: [nodes]\n  verbs"));
        assert_eq!(expressions.len(), rights, "{name}: each right to write has its policy");
        for expression in expressions {
            assert!(expression.contains(&format!("system:serviceaccount:{NAMESPACE}:{account}\"")), "{name}");
        }
        assert_eq!(
            set["spec"]["selector"]["matchLabels"]["app"],
            set["spec"]["template"]["metadata"]["labels"]["app"]
        );
    }
}

#[test]
#[ignore = "needs Helm: make test"]
fn a_server_without_nodes_in_tokens_gets_no_policy() {
    let of = |version: &str| {
        chart::render(NAMESPACE, &["--kube-version", version, "--set", "watcher.startupTaint=k"])
    };
    assert!(of("1.32.0").contains("kind: ValidatingAdmissionPolicy\n"));
    assert!(!of("1.31.4").contains("ValidatingAdmissionPolicy"));
    let refusal = chart::try_render(NAMESPACE, &["--kube-version", "1.24.0"]).expect_err("too old");
    assert!(refusal.contains(">=1.25.0"), "{refusal}");
}

#[test]
#[ignore = "needs Helm: make test"]
fn only_the_watcher_reaches_the_api_server_and_its_container_is_the_one_with_privileges() {
    for (_, values) in VARIANTS {
        let set = object(&rendered(values), "DaemonSet");
        let pod = &set["spec"]["template"]["spec"];
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert_eq!(pod["hostNetwork"], false);
        let scraped = &set["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"];
        let ports = pod["containers"].as_array().unwrap().iter().map(|container| &container["ports"][0]);
        let scraped =
            ports.filter(|port| scraped.as_str() == Some(&port["containerPort"].to_string())).count();
        assert_eq!(scraped, 1);
        for container in pod["containers"].as_array().unwrap() {
            let is_watcher = container["name"] == "watcher";
            let security = &container["securityContext"];
            assert_eq!(security["privileged"], is_watcher);
            assert_eq!(security["readOnlyRootFilesystem"], true);
            let mounts = container["volumeMounts"].as_array().unwrap();
            assert_eq!(mounts.iter().any(|mount| mount["name"] == "api-access"), is_watcher);
            if !is_watcher {
                assert_eq!(
                    security["capabilities"],
                    json!({"drop": ["ALL"], "add": ["SYS_ADMIN", "NET_ADMIN"]})
                );
                assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
            }
        }
    }
}

/// The reasons are in the manifest, where whoever reviews it looks.
#[test]
#[ignore = "needs Helm: make test"]
fn each_host_path_and_each_capability_is_explained() {
    let manifest = rendered("{}");
    let lines: Vec<&str> = manifest.lines().map(str::trim).collect();
    let mut explained = 0;
    for (number, line) in lines.iter().enumerate() {
        let above = if line.starts_with("hostPath:") {
            number - 2
        } else if ["- SYS_ADMIN", "- NET_ADMIN", "privileged: true", "hostPID: true"].contains(line) {
            number - 1
        } else {
            continue;
        };
        assert!(lines[above].starts_with("# "), "{line}: no reason above it");
        explained += 1;
    }
    assert_eq!(explained, 9, "{manifest}");
}

#[test]
#[ignore = "needs Helm: make test"]
fn alerts_and_dashboard_ask_for_metrics_that_there_are() {
    let monitoring = "{podMonitor: {enabled: true, interval: 15s}, prometheusRule: {enabled: true}, dashboard: {enabled: true}}";
    let manifest = rendered(monitoring);
    let rules = object(&manifest, "PrometheusRule");
    let groups = rules["spec"]["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 2, "{rules}");
    let rules = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
    let mut expressions: Vec<String> = rules.map(|rule| rule["expr"].as_str().unwrap().to_owned()).collect();
    let dashboard = object(&manifest, "ConfigMap");
    let dashboard: Value = serde_json::from_str(dashboard["data"]["adit.json"].as_str().unwrap()).unwrap();
    for panel in dashboard["panels"].as_array().unwrap() {
        let targets = panel["targets"].as_array().unwrap();
        expressions.extend(targets.iter().map(|target| target["expr"].as_str().unwrap().to_owned()));
    }
    let page = |name: &str| fs::read_to_string(chart::folder().join("../../docs").join(name)).unwrap();
    let page = page("metrics.md") + &page("control-plane.md");
    let known: BTreeSet<&str> = page.split('`').collect();
    let mut found = BTreeSet::new();
    for expression in &expressions {
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let is_metric = |word: &&str| {
            ["adit_watcher_", "ztunnel_", "istio_", "process_"].iter().any(|prefix| word.starts_with(prefix))
        };
        for word in words.filter(is_metric) {
            let name = word.strip_suffix("_bucket").unwrap_or(word);
            assert!(known.contains(name), "{word} in {expression}: docs/metrics.md has no such metric");
            found.insert(name.to_owned());
        }
    }
    assert!(found.len() > 10 && expressions.len() > 15, "{found:?}");
    let monitor = object(&manifest, "PodMonitor");
    let set = object(&manifest, "DaemonSet");
    assert_eq!(monitor["spec"]["selector"], set["spec"]["selector"]);
    let containers = set["spec"]["template"]["spec"]["containers"].as_array().unwrap();
    let ports: Vec<&Value> =
        containers.iter().flat_map(|container| container["ports"].as_array().unwrap()).collect();
    for endpoint in monitor["spec"]["podMetricsEndpoints"].as_array().unwrap() {
        assert!(ports.iter().any(|port| port["name"] == endpoint["port"]), "{endpoint}");
    }
}
