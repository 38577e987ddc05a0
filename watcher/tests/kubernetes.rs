//! Pods of a real API server are enrolled by their labels, and their states are written back.

use std::fs;

use serde_json::json;
use testbed::{
    api_node::{ApiNode, REDIRECTION},
    fakes::{FakeTunnel, Received},
    program::binary,
    wait::wait_for,
    watcher_node::WatcherNode,
};

#[test]
#[ignore = "needs root: make test"]
fn labels_of_namespaces_and_pods_enrol_running_pods_and_take_them_out_again() {
    let mut node = ApiNode::new(&json!({}));
    let ambient = json!({"istio.io/dataplane-mode": "ambient"});
    let (_, uid) = node.pod("plain", &json!({}));
    let (labelled, _) = node.pod("labelled", &json!({"metadata": {"labels": ambient}}));
    node.pod("opted-out", &json!({"metadata": {"labels": {"istio.io/dataplane-mode": "none"}}}));
    node.pod("injected", &json!({"metadata": {"annotations": {"sidecar.istio.io/status": "{}"}}}));
    let native = json!({"spec": {"initContainers": [{"name": "own-proxy", "image": "none", "restartPolicy": "Always"}]}});
    node.pod("native", &native);
    node.api.pod(&node.namespace, "host", &node.host.name, &json!({"spec": {"hostNetwork": true}}));
    node.api.pod(&node.namespace, "elsewhere", "another-node", &json!({"metadata": {"labels": ambient}}));
    node.host.start(&["--sidecar-container", "own-proxy"]);
    node.wait_ready();
    assert!(node.find("elsewhere").is_none(), "another node's pod");
    let _tunnel = node.tunnel().take_all();

    node.wait_state("labelled", "open", "");
    for name in ["plain", "opted-out", "injected", "native", "host"] {
        node.wait_state(name, "plain", "");
    }
    node.api.label_namespace(&node.namespace, &ambient);
    node.wait_state("plain", "open", "");
    node.wait_state("labelled", "open", "");
    node.wait_state("opted-out", "plain", "");
    node.wait_state("injected", "plain", "sidecar");
    node.wait_state("native", "plain", "sidecar");
    node.wait_state("host", "plain", "host_network");
    let pod = node.find("plain").expect("the pod");
    assert_eq!((pod["uid"].as_str(), pod["service_account"].as_str()), (Some(uid.as_str()), Some("default")));
    for (name, value) in
        [("plain", Some("enabled")), ("labelled", Some("enabled")), ("opted-out", None), ("host", None)]
    {
        node.wait_annotation(name, value);
    }

    // A pod may opt out while it runs, and in again.
    node.api.patch_pod(
        &node.namespace,
        "plain",
        &json!({"metadata": {"labels": {"istio.io/dataplane-mode": "none"}}}),
    );
    node.wait_state("plain", "plain", "");
    node.wait_annotation("plain", None);
    node.api.patch_pod(
        &node.namespace,
        "plain",
        &json!({"metadata": {"labels": {"istio.io/dataplane-mode": null}}}),
    );
    node.wait_state("plain", "open", "");
    node.wait_annotation("plain", Some("enabled"));

    node.api.label_namespace(&node.namespace, &json!({"istio.io/dataplane-mode": null}));
    node.wait_state("plain", "plain", "");
    node.wait_state("labelled", "open", "");
    node.wait_annotation("plain", None);

    // A pod that ended is none, although the API still has it; nor is one that was deleted.
    node.api.set_status(&node.namespace, "labelled", &json!({"phase": "Succeeded"}));
    node.host.pods[labelled].end();
    node.api.delete_pod(&node.namespace, "plain");
    wait_for("both pods to be gone", || {
        (node.find("labelled").is_none() && node.find("plain").is_none()).then_some(())
    });
}

#[test]
#[ignore = "needs root: make test"]
fn a_pod_of_an_enrolled_namespace_is_closed_before_its_first_process() {
    let mut node = ApiNode::new(&json!({"istio.io/dataplane-mode": "ambient"}));
    node.host.start(&[]);
    node.wait_ready();
    let _tunnel = node.tunnel().take_all();
    let uid = node.api.pod(&node.namespace, "new", &node.host.name, &json!({}));
    node.wait_state("new", "closed", "no_cgroup");
    // No address is known to the API yet: the pod's netns tells.
    let number = node.host.pod_in("new", &format!("pod{uid}"));
    node.wait_state("new", "open", "");
    node.report(number);
    node.wait_annotation("new", Some("enabled"));
    node.wait_state("new", "open", "");
}

#[test]
#[ignore = "needs root: make test"]
fn a_tunnel_may_run_in_a_pod_of_its_own_service_account_and_in_no_other() {
    let mut node = ApiNode::new(&json!({}));
    let label = json!({"istio.io/dataplane-mode": "ambient"});
    node.pod("app", &json!({"metadata": {"labels": label}}));
    let account = |name: &str| json!({"spec": {"serviceAccountName": name}});
    node.api.service_account(&node.namespace, "ztunnel");
    let (own, _) = node.pod("tunnel", &account("ztunnel"));
    let (other, _) = node.pod("other", &account("default"));
    node.host.start(&["--tunnel-account", &format!("{}/ztunnel", node.namespace)]);
    node.wait_ready();
    let connect = |node: &ApiNode, number: usize| {
        let container = node.host.pods[number].cgroup.join("container");
        FakeTunnel::connect(&node.host.zds(), Some(&container)).of_namespace(&node.namespace)
    };

    assert_eq!(connect(&node, other).receive(), Received::Closed);
    let reason = node.host.status()["rejected_tunnel"].clone();
    assert_eq!(reason["code"], "tunnel_cgroup_shared");
    let expected = format!("{0}/default, expected {0}/ztunnel", node.namespace);
    assert!(reason["text"].as_str().expect("a text").contains(&expected), "{reason}");

    // A pod that is to be enrolled is no tunnel, whatever its account.
    let labelled = json!({"metadata": {"labels": label}, "spec": {"serviceAccountName": "ztunnel"}});
    let (enrolled, _) = node.pod("enrolled", &labelled);
    node.wait_state("enrolled", "closed", "no_tunnel");
    assert_eq!(connect(&node, enrolled).receive(), Received::Closed);
    node.api.delete_pod(&node.namespace, "enrolled");
    node.host.pods[enrolled].end();
    wait_for("the pod to be gone", || node.find("enrolled").is_none());

    let _tunnel = connect(&node, own).take_all();
    node.wait_state("app", "open", "");
}

#[test]
#[ignore = "needs root: make test"]
fn what_is_wrong_with_a_pod_is_told_by_events() {
    let mut node = ApiNode::new(&json!({"istio.io/dataplane-mode": "ambient"}));
    let (_, taken) = node.pod("taken", &json!({}));
    let annotations =
        json!({"ambient.adit.dev/fail-mode": "ajar", "ambient.adit.dev/exclude-outbound-ports": "6379,http"});
    node.pod("nonsense", &json!({"metadata": {"annotations": annotations}}));
    node.pod("liar", &json!({}));
    node.api.set_status(
        &node.namespace,
        "liar",
        &json!({"podIP": "10.99.99.99", "podIPs": [{"ip": "10.99.99.99"}]}),
    );
    node.host.start(&[]);
    let tunnel = node.tunnel();
    let refuses = taken.clone();
    let _tunnel = std::thread::spawn(move || {
        loop {
            match tunnel.receive() {
                Received::Closed => return,
                Received::Add(uid, _) if uid == refuses => {
                    tunnel.answer("cannot listen on 15006: address in use");
                }
                _ => tunnel.answer(""),
            }
        }
    });
    node.wait_state("nonsense", "open", "");
    let pod = node.find("nonsense").expect("the pod");
    assert_eq!(pod["notes"].as_array().map(Vec::len), Some(2), "{pod}");
    for (name, reason, part) in [
        ("nonsense", "BadAnnotation", "\"http\" ignored"),
        ("taken", "TunnelRefused", "15006: address in use"),
        ("liar", "AddressNotHeld", "10.99.99.99"),
    ] {
        let event = node.api.wait(&format!("an Event {reason} on {name}"), || async {
            let api = kube::Api::<k8s_openapi::api::events::v1::Event>::namespaced(
                node.api.client(),
                &node.namespace,
            );
            let events = api.list(&kube::api::ListParams::default()).await.ok()?;
            events.items.into_iter().find(|event| {
                event.reason.as_deref() == Some(reason)
                    && event.regarding.as_ref().is_some_and(|pod| pod.name.as_deref() == Some(name))
            })
        });
        assert!(event.note.as_deref().is_some_and(|note| note.contains(part)), "{event:?}");
        assert_eq!(event.type_.as_deref(), Some("Warning"));
        assert_eq!(event.reporting_instance.as_deref(), Some(node.host.name.as_str()));
    }
    node.wait_annotation("nonsense", Some("enabled"));
    node.wait_annotation("taken", None);
    node.wait_annotation("liar", None);
}

#[test]
#[ignore = "needs root: make test"]
fn a_static_pods_cgroup_is_found_by_its_hash() {
    let mut node = ApiNode::new(&json!({"istio.io/dataplane-mode": "ambient"}));
    let hash = "0123456789abcdef0123456789abcdef";
    let annotations = json!({"kubernetes.io/config.mirror": hash, "kubernetes.io/config.hash": hash});
    node.api.pod(
        &node.namespace,
        "static",
        &node.host.name,
        &json!({"metadata": {"annotations": annotations}}),
    );
    let number = node.host.pod_in("static", &format!("pod{hash}"));
    node.report(number);
    node.host.start(&[]);
    let _tunnel = node.tunnel().take_all();
    node.wait_state("static", "open", "");
    node.wait_annotation("static", Some("enabled"));
    assert_eq!(node.find("static").expect("the pod")["uid"], hash);
}

#[test]
#[ignore = "needs root: make test"]
fn options_that_cannot_work_are_refused_with_what_to_do() {
    let mut node = WatcherNode::new();
    node.kubeconfig = Some(node.dir.path().join("nowhere"));
    let path = node.dir.path().join("broken");
    fs::write(&path, "clusters: 5").expect("file");
    for (variables, words, says) in [
        (vec![], vec!["--kubernetes"], "NODE_NAME"),
        (vec![], vec![], "--pods FILE or --kubernetes"),
        (vec![("KUBERNETES_SERVICE_HOST", "10.96.0.1".to_owned())], vec![], "NODE_NAME"),
        (vec![], vec!["--kubernetes", "--node", "a"], "KUBECONFIG"),
        (vec![("KUBECONFIG", path.display().to_string())], vec!["--kubernetes", "--node", "a"], "KUBECONFIG"),
        (vec![], vec!["--kubernetes", "--pods", "x"], "cannot be used with"),
        (vec![], vec!["--kubernetes", "--dataplane-label", "x=none"], "expected KEY=VALUE or KEY"),
    ] {
        let output = std::process::Command::new(binary("watcher"))
            .env_clear()
            .envs(variables)
            .args(["run", "--bpffs"])
            .arg(node.bpffs())
            .arg("--attach")
            .arg(node.cgroup.join("pods"))
            .arg("--run-dir")
            .arg(node.dir.path())
            .args(&words)
            .output()
            .expect("watcher");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(says), "{words:?}: {said}");
    }
}

#[test]
#[ignore = "needs root: make test"]
fn who_undoes_everything_takes_the_annotations_back() {
    let mut node = ApiNode::new(&json!({"istio.io/dataplane-mode": "ambient"}));
    for name in ["a", "b", "c"] {
        node.pod(name, &json!({}));
    }
    node.host.start(&["--detach"]);
    let _told = node.tunnel().take_all();
    for name in ["a", "b", "c"] {
        node.wait_state(name, "open", "");
        node.wait_annotation(name, Some("enabled"));
    }
    let mut watcher = node.host.watcher.take().expect("watcher");
    watcher.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(watcher.wait().success(), "{}", node.host.log());
    for name in ["a", "b", "c"] {
        assert_eq!(
            node.api.annotation(&node.namespace, name, REDIRECTION),
            None,
            "{name}\n{}",
            node.host.log()
        );
    }
}

#[test]
#[ignore = "needs root: make test"]
fn uninstalling_takes_back_the_annotations_that_a_killed_watcher_left_or_says_what_stays() {
    let mut node = ApiNode::new(&json!({"istio.io/dataplane-mode": "ambient"}));
    for name in ["a", "b"] {
        node.pod(name, &json!({}));
    }
    node.host.start(&[]);
    let _told = node.tunnel().take_all();
    for name in ["a", "b"] {
        node.wait_annotation(name, Some("enabled"));
    }
    node.host.kill_watcher();
    let uninstall = |kubeconfig: &std::path::Path| {
        let bpffs = node.host.bpffs().display().to_string();
        let zds = node.host.zds().display().to_string();
        let words = ["uninstall", "--kubernetes", "--bpffs", &bpffs, "--zds-socket", &zds, "-o", "json"];
        let output = node.host.prepared(&words).env("KUBECONFIG", kubeconfig).output().expect("watcher");
        let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(said["ok"], output.status.success(), "{said}");
        said
    };
    // Where it may not, or cannot, it says so; the node is in order all the same.
    let away = node.host.dir.path().join("away.kubeconfig");
    let text = fs::read_to_string(node.api.watcher_kubeconfig()).expect("kubeconfig");
    fs::write(&away, text.replace(&node.api.port().to_string(), "1")).expect("kubeconfig");
    let said = uninstall(&away);
    assert!(said["ok"] == false && said["links"].as_u64().is_some_and(|links| links > 0), "{said}");
    let failed = said["annotations"]["failed"][0].as_str().expect("a sentence");
    assert!(failed.contains("cannot be looked for"), "{said}");

    let said = uninstall(&node.api.watcher_kubeconfig());
    assert!(said["ok"] == true && said["annotations"]["pods"] == 2, "{said}");
    for name in ["a", "b"] {
        assert_eq!(node.api.annotation(&node.namespace, name, REDIRECTION), None, "{name}");
    }
}

#[test]
#[ignore = "needs root: make test"]
fn any_of_several_labels_enrols_and_istios_none_opts_out() {
    let mut node = ApiNode::new(&json!({}));
    let labels = |labels: serde_json::Value| json!({"metadata": {"labels": labels}});
    node.pod("istios", &labels(json!({"istio.io/dataplane-mode": "ambient"})));
    node.pod("vendors", &labels(json!({"vendor.example/mesh": "on"})));
    node.pod("bare", &labels(json!({"in-mesh": ""})));
    node.pod("other", &labels(json!({"vendor.example/mesh": "off"})));
    node.pod("out", &labels(json!({"vendor.example/mesh": "on", "istio.io/dataplane-mode": "none"})));
    node.pod("plain", &json!({}));
    let options = ["istio.io/dataplane-mode=ambient", "vendor.example/mesh=on", "in-mesh"];
    node.host.start(&options.map(|option| ["--dataplane-label", option]).concat());
    let _told = node.tunnel().take_all();
    for (name, state) in [
        ("istios", "open"),
        ("vendors", "open"),
        ("bare", "open"),
        ("other", "plain"),
        ("out", "plain"),
        ("plain", "plain"),
    ] {
        node.wait_state(name, state, "");
    }
    // By the namespace too; the pod's own opt-out stays.
    node.api.label_namespace(&node.namespace, &json!({"vendor.example/mesh": "on"}));
    node.wait_state("plain", "open", "");
    node.wait_state("out", "plain", "");
}
