//! Pods of every kind that a cluster has, in the mesh from their first connection on.

use serde_json::{Value, json};
use testbed::wait::{try_wait_slowly, wait_slowly};

use crate::{
    policies,
    rig::{DEMO, LIMIT, PodSpec, Rig, SERVER, container},
};

/// A pod template whose container asks once, and ends.
fn asks_once() -> Value {
    json!({
        "spec": {"serviceAccountName": "client", "restartPolicy": "Never",
            "containers": [container("main", &["get", SERVER])]},
    })
}

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn pods_of_every_kind_are_in_the_mesh_from_their_first_connection() {
    let rig = Rig::start();
    rig.namespace(DEMO, &["client", "server"]);
    rig.install(&[]);
    rig.label(DEMO, "ambient");
    rig.cluster.apply(policies::CLIENT_ONLY);
    let spec = |name, account, role| PodSpec { namespace: DEMO, name, account, node: "node2", role };
    let server = rig.server();
    rig.wait_enrolled(&server, true);
    let client = rig.pod(spec("client", "client", &["serve", "8080"]));
    rig.wait_get(&client, SERVER, true);

    // The first instruction of each is a connect.
    let job = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "once", "namespace": DEMO},
        "spec": {"completions": 10, "parallelism": 2, "backoffLimit": 0, "template": asks_once()}});
    rig.cluster.apply(&job.to_string());
    let status = || rig.cluster.kubectl_line(&["-n", DEMO, "get", "job", "once", "-o", "jsonpath={.status}"]);
    let ended = try_wait_slowly(LIMIT, || {
        let status: Value = serde_json::from_str(&status()?).ok()?;
        (status["succeeded"] == 10 || status["failed"].as_u64() > Some(0)).then_some(())
    });
    let logs =
        || rig.cluster.kubectl_text(&["-n", DEMO, "logs", "-l", "job-name=once", "--prefix", "--tail=5"]);
    assert!(ended.is_some(), "{:?}\n{}", status(), logs());
    let succeeded =
        serde_json::from_str::<Value>(&status().expect("a status")).expect("JSON")["succeeded"].clone();
    assert_eq!(succeeded, 10, "{:?}\n{}\n{}", status(), logs(), rig.system_story());

    let mut with_init = spec("with-init", "client", &["serve", "8080"]).manifest();
    with_init["spec"]["initContainers"] =
        json!([container("first", &["get", SERVER]), container("second", &["get", SERVER])]);
    with_init["spec"]["restartPolicy"] = json!("Never");
    rig.cluster.apply(&with_init.to_string());
    rig.cluster.wait_ready(DEMO, "with-init");

    // A pod of the same name, recreated: nothing of the one before it counts.
    let set = json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "set", "namespace": DEMO},
        "spec": {"serviceName": "set", "replicas": 1, "selector": {"matchLabels": {"app": "set"}},
            "template": {"metadata": {"labels": {"app": "set"}}, "spec": {"serviceAccountName": "client",
                "terminationGracePeriodSeconds": 0, "containers": [container("main", &["serve", "8080"])]}}}});
    rig.cluster.apply(&set.to_string());
    let first = rig.cluster.ready_pod(DEMO, "set-0");
    rig.wait_get(&first, SERVER, true);
    rig.cluster.kubectl(&["-n", DEMO, "delete", "pod", "set-0"]);
    let second = wait_slowly(LIMIT, "the pod to be made anew", || {
        rig.cluster.pod(DEMO, "set-0").filter(|pod| pod.uid != first.uid && !pod.ip.is_empty())
    });
    rig.cluster.wait_ready(DEMO, "set-0");
    rig.wait_get(&second, SERVER, true);
    rig.wait_get(&client, &format!("http://{}:8080/", second.ip), true);

    // An ephemeral container is the pod, too.
    let debug = [
        "-n",
        DEMO,
        "debug",
        "client",
        "--image=localhost/pod:e2e",
        "--image-pull-policy=Never",
        "--container=debug",
        "--",
        "/usr/local/bin/pod",
        "get",
        SERVER,
    ];
    rig.cluster.kubectl(&debug);
    wait_slowly(LIMIT, "the ephemeral container to be answered", || {
        let said = rig.cluster.kubectl_line(&["-n", DEMO, "logs", "client", "-c", "debug"])?;
        said.contains("hello from server").then_some(())
    });

    // The kubelet's streams, to a pod that refuses everybody else.
    assert!(
        rig.cluster.exec(&server, "main", &["/bin/busybox", "echo", "here"]).expect("exec").contains("here")
    );
    let forward = ["-n", DEMO, "port-forward", "pod/server", "18080:8080"];
    let log = rig.cluster.file("port-forward.log");
    let _forward =
        testbed::process::Process::spawn("port-forward", rig.cluster.kubectl_command(&forward), &log);
    wait_slowly(LIMIT, "an answer by port-forward", || {
        rig.cluster.netns.curl("http://127.0.0.1:18080/").0 == 200
    });

    // Pods of the node's own netns have no identity.
    let mut on_host = spec("on-host", "client", &["serve", "8081"]).manifest();
    on_host["spec"]["hostNetwork"] = json!(true);
    rig.cluster.apply(&on_host.to_string());
    let on_host = rig.cluster.ready_pod(DEMO, "on-host");
    let by_address = format!("http://{}:8080/", server.ip);
    assert!(rig.get(&on_host, &by_address).is_err(), "a policy about identities refuses it");
    rig.wait_get(&on_host, &format!("http://{}:8080/", client.ip), true);

    // From outside of the cluster, by a port of the nodes, with either policy.
    let port = |path: &str, node: usize| format!("http://{}:{path}/", rig.cluster.nodes[node].address);
    rig.cluster.kubectl(&["-n", DEMO, "expose", "pod", "client", "--type=NodePort", "--port=8080"]);
    let number = ["-n", DEMO, "get", "service", "client", "-o", "jsonpath={.spec.ports[0].nodePort}"];
    let number = rig.cluster.kubectl(&number);
    for (policy, on_node1) in [("Cluster", true), ("Local", false)] {
        let patch = json!({"spec": {"externalTrafficPolicy": policy}}).to_string();
        rig.cluster.kubectl(&["-n", DEMO, "patch", "service", "client", "-p", &patch]);
        for (node, answers) in [(0, on_node1), (1, true)] {
            wait_slowly(LIMIT, &format!("node{} with policy {policy}", node + 1), || {
                (rig.cluster.netns.curl(&port(&number, node)).0 == 200) == answers
            });
        }
    }
    let mut with_port = spec("with-port", "client", &["serve", "8080"]).manifest();
    with_port["spec"]["containers"][0]["ports"] = json!([{"containerPort": 8080, "hostPort": 8088}]);
    rig.cluster.apply(&with_port.to_string());
    let with_port = rig.cluster.ready_pod(DEMO, "with-port");
    rig.wait_enrolled(&with_port, true);
    wait_slowly(LIMIT, "a port of the host", || rig.cluster.netns.curl(&port("8088", 1)).0 == 200);
}
