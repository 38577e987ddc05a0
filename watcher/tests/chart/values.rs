//! What may be set, and that the values, their schema and the page in the documentation agree.

use std::{collections::BTreeSet, fmt::Write as _, fs};

use serde_json::Value;
use testbed::{chart, command, doc_table};

use super::{VARIANTS, container, object, rendered, try_rendered};

#[test]
#[ignore = "needs Helm: make test"]
fn helm_finds_no_fault_in_the_chart() {
    let folder = chart::folder();
    for profile in ["standalone", "istio", "redirect-only"] {
        let set = format!("profile={profile}");
        let output = chart::helm(&["lint", "--strict", folder.to_str().unwrap(), "--set", &set]);
        let said = command::text(&output);
        assert!(output.status.success() && said.contains("0 chart(s) failed"), "{said}");
        assert!(!said.contains("[WARNING]") && !said.contains("[ERROR]"), "{said}");
    }
}

#[test]
#[ignore = "needs Helm: make test"]
fn two_renderings_are_the_same_and_have_no_hooks() {
    for (name, values) in VARIANTS {
        let first = rendered(values);
        assert_eq!(first, rendered(values), "{name}");
        assert!(!first.contains("helm.sh/hook"), "{name}");
    }
}

#[test]
#[ignore = "needs Helm: make test"]
fn a_wrong_key_or_value_is_refused_by_name() {
    for (values, said) in [
        ("failMode: open", "unknown value failMode, did you mean watcher.failMode?"),
        ("watcher: {failMod: open}", "unknown value watcher.failMod, did you mean watcher.failMode?"),
        ("watcher: {FAIL_MODE: open}", "did you mean watcher.failMode?"),
        ("watcher: {kubelet: 1}", "did you mean watcher.kubeletPort?"),
        ("Watcher: {failMode: open}", "unknown value Watcher, did you mean watcher?"),
        ("meshConfig: {trustDomain: a}", "meshConfig.trustDomain, did you mean control.trustDomain?"),
        (
            "updateStrategy: {rollingUpdate: {surge: 1}}",
            "updateStrategy.rollingUpdate.surge, did you mean updateStrategy.rollingUpdate.maxSurge?",
        ),
        ("watcher.failMode: open", "unknown value watcher.failMode"),
        ("zebra: {stripes: 2}", "unknown value zebra; `helm show values` lists all"),
        ("profile: sidecar", "'/profile'"),
        ("watcher: {failMode: ajar}", "'/watcher/failMode'"),
        ("watcher: {rescan: 0}", "'/watcher/rescan'"),
        ("watcher: {rescan: often}", "'/watcher/rescan'"),
        ("watcher: {dnsCapture: 'yes'}", "'/watcher/dnsCapture'"),
        ("watcher: {dnsResolvers: [10.0.0.1, 10.0.0.2, 10.0.0.3, 10.0.0.4]}", "'/watcher/dnsResolvers'"),
        ("watcher: {dnsResolvers: [dns.example.org]}", "'/watcher/dnsResolvers/0'"),
        ("watcher: {dataplaneLabels: []}", "'/watcher/dataplaneLabels'"),
        ("watcher: {startupTaint: 'a=b:NoSchedule'}", "'/watcher/startupTaint'"),
        ("watcher: {tunnelAccounts: [ztunnel]}", "'/watcher/tunnelAccounts/0'"),
        ("watcher: {metricsAddress: '15022'}", "'/watcher/metricsAddress'"),
        ("resourceName: Upper", "'/resourceName'"),
        ("terminationGracePeriodSeconds: 0", "'/terminationGracePeriodSeconds'"),
        ("variant: debug", "'/variant'"),
        ("global: {variant: debug}", "expected distroless"),
        ("env: {'A B': c}", "'/env'"),
        ("labels: {a: [b]}", "'/labels/a'"),
        ("resources: {request: {}}", "unknown value resources.request, did you mean resources.requests?"),
        ("rootConfigMap: Root", "'/rootConfigMap'"),
        ("control: {replica: 2}", "unknown value control.replica, did you mean control.replicas?"),
        ("control: {replicas: 0}", "'/control/replicas'"),
        ("control: {rootSecret: ''}", "'/control/rootSecret'"),
        ("control: {trustDomain: Example.org}", "'/control/trustDomain'"),
        ("control: {certificateLife: 599}", "'/control/certificateLife'"),
    ] {
        let refusal = try_rendered(values).expect_err(values);
        assert!(refusal.contains(said), "{values}: expected {said}\n{refusal}");
    }
}

#[test]
#[ignore = "needs Helm: make test"]
fn values_of_istios_chart_have_their_effect_here() {
    let manifest = rendered(super::ISTIO_VALUES);
    let set = object(&manifest, "DaemonSet");
    let pod = &set["spec"]["template"]["spec"];
    let tunnel = container(&manifest, "ztunnel").unwrap();
    let variable = |name: &str| {
        let all = tunnel["env"].as_array().unwrap();
        let found: Vec<&Value> = all.iter().filter(|variable| variable["name"] == name).collect();
        assert!(found.len() <= 1, "{name} twice");
        found.first().and_then(|found| found["value"].as_str()).map(str::to_owned)
    };
    for (name, value) in [
        ("XDS_ADDRESS", "https://istiod-canary.mesh-system.svc:15012"),
        ("CA_ADDRESS", "unix:/run/ca.sock"),
        ("NETWORK", "east"),
        ("ISTIO_META_CLUSTER_ID", "one"),
        ("ISTIO_META_DNS_CAPTURE", "false"),
        ("ZTUNNEL_WORKER_THREADS", "3"),
        ("RUST_LOG", "info"),
        ("LOG_FORMAT", "json"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "60"),
        ("CRL_PATH", "/var/run/secrets/istio-crl/ca-crl.pem"),
    ] {
        assert_eq!(variable(name).as_deref(), Some(value), "{name}");
    }
    assert_eq!(tunnel["image"], "registry.example/istio/adit:1.28.0");
    assert_eq!(tunnel["resources"]["limits"]["memory"], "1Gi");
    assert_eq!(tunnel["securityContext"]["seLinuxOptions"]["type"], "spc_t");
    assert_eq!(pod["terminationGracePeriodSeconds"], 60);
    assert_eq!(set["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"], 1);
    assert_eq!(set["spec"]["template"]["metadata"]["labels"]["team"], "network");
    assert_eq!(set["metadata"]["labels"]["istio.io/rev"], "canary");
    assert_eq!(object(&manifest, "ResourceQuota")["spec"]["hard"]["pods"], 100);
    assert_eq!(object(&manifest, "ServiceAccount")["imagePullSecrets"][1]["name"], "second");
    assert_eq!(object(&manifest, "NetworkPolicy")["spec"]["policyTypes"][0], "Ingress");
    let arguments = container(&manifest, "watcher").unwrap()["args"].clone();
    let account = Value::from("--tunnel-account=mesh-system/ztunnel");
    assert!(arguments.as_array().unwrap().contains(&account), "{arguments}");
}

/// The chart's values as text.
fn values_file() -> String {
    fs::read_to_string(chart::folder().join("values.yaml")).unwrap()
}

/// Keys of the values with the comment above each: a comment without a blank line between.
fn documented(text: &str) -> Vec<(String, String)> {
    let mut path: Vec<(usize, String)> = Vec::new();
    let mut comment = String::new();
    let mut found = Vec::new();
    for line in text.lines() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if let Some(words) = trimmed.strip_prefix("# ") {
            comment.push_str(if comment.is_empty() { "" } else { " " });
            comment.push_str(words);
        } else if let Some((key, _)) = trimmed.split_once(':').filter(|_| !trimmed.starts_with('-')) {
            path.retain(|(above, _)| *above < indent);
            path.push((indent, key.to_owned()));
            if !comment.is_empty() {
                let names: Vec<&str> = path.iter().map(|(_, key)| key.as_str()).collect();
                found.push((names.join("."), std::mem::take(&mut comment)));
            }
        } else {
            comment.clear();
        }
    }
    found
}

/// The keys that may be set, of objects whose other keys the chart refuses. By a template, which
/// names the nearest; what Helm says by `additionalProperties` does not.
fn keys(schema: &Value, object: &Value, above: &str, found: &mut BTreeSet<String>) {
    let name = object["$ref"].as_str().and_then(|path| path.strip_prefix("#/definitions/"));
    let object = name.map_or(object, |name| &schema["definitions"][name]);
    let Some(properties) = object["properties"].as_object() else { return };
    assert_eq!(object["additionalProperties"], Value::Null, "{above}: Helm refuses other keys");
    for (key, below) in properties {
        found.insert(format!("{above}{key}"));
        keys(schema, below, &format!("{above}{key}."), found);
    }
}

/// `UPDATE_DOCS=1` writes the list anew.
#[test]
fn the_keys_in_the_chart_are_those_of_the_documentation_and_the_schema() {
    let schema = fs::read_to_string(chart::folder().join("values.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    let mut found = BTreeSet::new();
    keys(&schema, &schema, "", &mut found);
    let expected = found.into_iter().collect::<Vec<_>>().join("\n") + "\n";
    let file = chart::folder().join("files/keys.txt");
    if doc_table::is_updating() {
        fs::write(&file, &expected).unwrap();
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), expected, "UPDATE_DOCS=1 cargo test documentation");
}

/// The keys that the schema lists by name.
fn in_schema(schema: &Value, above: &str, found: &mut BTreeSet<String>) {
    let Some(properties) = schema["properties"].as_object() else { return };
    for (key, below) in properties {
        let path = format!("{above}{key}");
        in_schema(below, &format!("{path}."), found);
        found.insert(path);
    }
}

fn value_at<'a>(values: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(values, |value, key| value.get(key))
}

#[test]
fn documentation_and_schema_have_every_value_and_no_other() {
    let text = values_file();
    let values: Value = serde_saphyr::from_str(&text).unwrap();
    let schema = fs::read_to_string(chart::folder().join("values.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    let documented = documented(&text);

    let mut listed = BTreeSet::new();
    in_schema(&schema, "", &mut listed);
    for path in &listed {
        assert!(value_at(&values, path).is_some(), "{path} is in the schema and not in values.yaml");
        let is_within = |key: &String| {
            path == key || path.starts_with(&format!("{key}.")) || key.starts_with(&format!("{path}."))
        };
        assert!(documented.iter().any(|(key, _)| is_within(key)), "{path} has no comment in values.yaml");
    }
    for (path, _) in &documented {
        assert!(listed.contains(path), "{path} is in values.yaml and not in the schema");
    }
    for key in values.as_object().unwrap().keys() {
        assert!(listed.contains(key), "{key} is in values.yaml and not in the schema");
    }

    let mut table = "| value | default | |\n|---|---|---|\n".to_owned();
    for (path, comment) in &documented {
        let default = value_at(&values, path).map(Value::to_string).unwrap_or_default();
        let _ = writeln!(table, "| `{path}` | `{default}` | {} |", comment.replace('|', "\\|"));
    }
    doc_table::assert_current("docs/install.md", "values: made from charts/adit/values.yaml", &table);
}

/// Each of them alone; the pages combine them no further.
#[test]
#[ignore = "needs Helm: make test"]
fn what_the_pages_say_to_set_can_be_set() {
    let mut seen = BTreeSet::new();
    for page in ["docs/install.md", "docs/operations.md", "README.md"] {
        let text = fs::read_to_string(chart::folder().join("../..").join(page)).unwrap();
        let said = text.split("--set ").skip(1).filter_map(|rest| rest.split([' ', '\n', '`']).next());
        seen.extend(said.map(str::to_owned));
    }
    assert!(seen.len() >= 6, "{seen:?}");
    for set in &seen {
        let plain = chart::render(super::NAMESPACE, &[]);
        assert_ne!(chart::render(super::NAMESPACE, &["--set", set]), plain, "{set} changes nothing");
    }
}

#[test]
fn the_chart_has_the_version_of_the_programs() {
    let text = fs::read_to_string(chart::folder().join("Chart.yaml")).unwrap();
    let chart: Value = serde_saphyr::from_str(&text).unwrap();
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}
