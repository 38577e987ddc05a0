//! What the containers are started with, given to the real programs: they take every argument and
//! every variable, and they answer the probes.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::{Value, json};
use testbed::{
    api_node::ApiNode,
    chart, command,
    netns::TestNetns,
    process::{Placement, Process},
    program::binary,
    wait::wait_for,
};

use super::{VARIANTS, container, rendered};

fn texts(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

fn run(program: &Path, arguments: &[String], variables: &BTreeMap<String, String>) -> Output {
    Command::new(program).args(arguments).env_clear().envs(variables).output().expect("the program starts")
}

/// The variables of a container, with what the kubelet would fill in.
pub(super) fn environment(container: &Value) -> BTreeMap<String, String> {
    let filled = |variable: &Value| match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
        Some("spec.nodeName") => "worker-1".to_owned(),
        Some("status.podIP") => "10.1.2.3".to_owned(),
        Some("metadata.name") => "ztunnel-abcde".to_owned(),
        Some("metadata.namespace") => "adit-system".to_owned(),
        Some("spec.serviceAccountName") => "ztunnel".to_owned(),
        Some(other) => panic!("{other}"),
        None => variable["value"].as_str().expect("a text").to_owned(),
    };
    let all = container["env"].as_array().unwrap();
    all.iter().map(|variable| (variable["name"].as_str().unwrap().to_owned(), filled(variable))).collect()
}

#[test]
#[ignore = "needs Helm: make test"]
fn the_watcher_takes_every_argument() {
    for (name, values) in VARIANTS {
        let watcher = container(&rendered(values), "watcher").unwrap();
        assert_eq!(watcher["command"], json!(["/usr/local/bin/watcher"]));
        let arguments = texts(&watcher["args"]);
        // An argument that is wrong counts before a later `--help`.
        let with = |more: &[&str]| {
            let more = more.iter().map(|argument| (*argument).to_owned());
            let arguments: Vec<String> = arguments.iter().cloned().chain(more).collect();
            run(&binary("watcher"), &arguments, &environment(&watcher))
        };
        let output = with(&["--help"]);
        assert!(output.status.success(), "{name}: {arguments:?}\n{}", command::text(&output));
        let output = with(&["--no-such-argument", "--help"]);
        assert_eq!(output.status.code(), Some(2), "{name}");
    }
}

/// The tunnel's file of the ConfigMap, where it is for the container's program.
fn configured(manifest: &str, variables: &mut BTreeMap<String, String>, folder: &Path) {
    if let Some(path) = variables.get_mut("ZTUNNEL_CONFIG") {
        let objects = chart::objects(manifest);
        let text = objects.iter().find_map(|object| object["data"]["ztunnel.yaml"].as_str());
        let file = folder.join("ztunnel.yaml");
        fs::write(&file, text.expect("the ConfigMap")).expect("written");
        *path = file.display().to_string();
    }
}

#[test]
#[ignore = "needs Helm: make test"]
fn the_tunnel_reads_every_variable() {
    let folder = tempfile::tempdir().unwrap();
    let mut tunnels = 0;
    for (name, values) in VARIANTS {
        let manifest = rendered(values);
        let Some(tunnel) = container(&manifest, "ztunnel") else { continue };
        tunnels += 1;
        assert_eq!(tunnel["command"], json!(["/usr/local/bin/ztunnel"]));
        let mut variables = environment(&tunnel);
        configured(&manifest, &mut variables, folder.path());
        let print = ["config", "print", "-o", "json"].map(str::to_owned);
        let output = run(&binary("ztunnel"), &print, &variables);
        assert!(output.status.success(), "{name}: {}", command::text(&output));
        let keys: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let keys = keys.as_array().unwrap();
        let effective = |key: &str| {
            let found = keys.iter().find(|found| found["key"] == key);
            found.unwrap_or_else(|| panic!("{key}"))["value"].as_str().map(str::to_owned)
        };
        for (variable, value) in &variables {
            // Rust's runtime reads the one; the other names the file itself.
            if ["RUST_BACKTRACE", "ZTUNNEL_CONFIG"].contains(&variable.as_str()) {
                continue;
            }
            let read = keys.iter().find(|key| key["variable"] == variable.as_str());
            let read =
                read.unwrap_or_else(|| panic!("{name}: the tunnel does not read {variable}: {keys:?}"));
            assert_eq!(read["origin"], "environment", "{name}: {variable}");
            assert_eq!(read["value"].as_str(), Some(value.as_str()), "{name}: {variable}");
        }
        if variables.contains_key("ZTUNNEL_CONFIG") {
            assert_eq!(effective("pool.idle").as_deref(), Some("10m"));
            assert_eq!(effective("budget.pod_dials").as_deref(), Some("64"));
        }
        // What it is started with is a command of its.
        let help = [texts(&tunnel["args"]), vec!["--help".to_owned()]].concat();
        let output = run(&binary("ztunnel"), &help, &variables);
        assert!(output.status.success(), "{name}: {}", command::text(&output));
        // Every folder that it is told of is mounted, and the one of every file.
        let mounts: Vec<&str> = tunnel["volumeMounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|mount| mount["mountPath"].as_str().unwrap())
            .collect();
        for (variable, value) in environment(&tunnel) {
            if let Some((parent, _)) = value.rsplit_once('/').filter(|_| value.starts_with('/')) {
                let is_mounted = mounts.contains(&parent) || mounts.contains(&value.as_str());
                assert!(is_mounted, "{name}: {variable} is {value}, mounted are {mounts:?}");
            }
        }
    }
    assert_eq!(tunnels, 4);
}

/// Path and port of a probe, which may name a port of the container.
fn target(container: &Value, probe: &str) -> (String, u64) {
    let get = &container[probe]["httpGet"];
    let port = get["port"].as_u64().unwrap_or_else(|| {
        let ports = container["ports"].as_array().unwrap();
        let named = ports.iter().find(|port| port["name"] == get["port"]);
        named.unwrap_or_else(|| panic!("{get}"))["containerPort"].as_u64().unwrap()
    });
    (get["path"].as_str().unwrap().to_owned(), port)
}

/// The status that this probe gets at `host` in `netns`; `None`: no answer.
fn probe(netns: &TestNetns, host: &str, container: &Value, probe: &str) -> Option<u16> {
    let (path, port) = target(container, probe);
    let url = format!("http://{host}:{port}{path}");
    let arguments =
        ["-sS", "--noproxy", "*", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}", &url];
    let output = netns.command("curl").args(arguments).output().expect("curl");
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).parse().expect("a status"))
}

#[test]
#[ignore = "needs root: make test"]
fn the_watcher_answers_its_probes_when_started_as_in_the_chart() {
    let watcher = container(&rendered("{}"), "watcher").unwrap();
    let mut node = ApiNode::new(&json!({"istio.io/dataplane-mode": "ambient"}));
    node.pod("a", &json!({}));
    // The node has names and folders of its own; whatever the testbed gives itself is left out.
    let arguments = texts(&watcher["args"]);
    let given = |argument: &&String| !argument.starts_with("--leave-grace=");
    let (head, rest) = arguments.split_at(2);
    assert_eq!(head, ["run", "--kubernetes"]);
    let rest: Vec<&str> = rest.iter().filter(given).map(String::as_str).collect();
    // Its API server is on loopback of this netns, so it stays here, at a port of its own.
    let port = std::net::TcpListener::bind("[::]:0").unwrap().local_addr().unwrap().port();
    let address = format!("--metrics-address=[::]:{port}");
    let rest: Vec<&str> = rest
        .into_iter()
        .map(|argument| if argument.starts_with("--metrics-address=") { &address } else { argument })
        .collect();
    node.host.start(&rest);
    node.wait_ready();
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let (path, _) = target(&watcher, probe);
        for host in ["127.0.0.1", "[::1]"] {
            let url = format!("http://{host}:{port}{path}");
            wait_for(&format!("{url} to be served"), || {
                let output = Command::new("curl")
                    .args(["-sS", "--fail", "--noproxy", "*", "--max-time", "5", &url])
                    .output();
                output.expect("curl").status.success().then_some(())
            });
        }
    }
}

/// A control plane that is away is no reason to restart a tunnel.
#[test]
#[ignore = "needs root: make test"]
fn a_tunnel_without_its_control_plane_is_live_and_not_ready() {
    let tunnel = container(&rendered("{}"), "ztunnel").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let netns = TestNetns::new(format!("adit-chart{}", std::process::id()));
    netns.run("ip link set lo up");
    let mut variables = environment(&tunnel);
    // The two paths that are of the node; nobody listens at either.
    variables.insert("INPOD_UDS".into(), folder.path().join("ztunnel.sock").display().to_string());
    variables.insert("XDS_ADDRESS".into(), "https://127.0.0.1:15012".into());
    let mut line: Vec<String> = vec!["env".into(), "-i".into()];
    line.extend(variables.iter().map(|(name, value)| format!("{name}={value}")));
    line.push(binary("ztunnel").display().to_string());
    line.extend(texts(&tunnel["args"]));
    let line: Vec<&str> = line.iter().map(String::as_str).collect();
    let command = Placement::default().in_netns(&netns).command(&line);
    let _tunnel = Process::spawn("ztunnel", command, &folder.path().join("ztunnel.log"));
    for host in ["127.0.0.1", "[::1]"] {
        for live in ["startupProbe", "livenessProbe"] {
            wait_for("the tunnel to be live", || {
                (probe(&netns, host, &tunnel, live) == Some(200)).then_some(())
            });
        }
        assert_eq!(probe(&netns, host, &tunnel, "readinessProbe"), Some(500));
    }
}
