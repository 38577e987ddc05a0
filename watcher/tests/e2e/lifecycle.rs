//! The life of an installation: on pods that wait for it, upgraded and rolled back, with an image
//! that is not there, installed twice, on a node that is drained.

use std::{path::Path, process::Command};

use testbed::{chart, command, wait::wait_slowly};

use crate::{
    policies,
    rig::{DEMO, LIMIT, Rig, SERVER, SYSTEM},
    traffic::Load,
};

/// The chart as the commit before this one had it, unpacked into `folder`. Where the history does not
/// reach so far, as in a shallow clone, the chart as it is: an upgrade to that rolls all pods, too.
fn previous_chart(folder: &Path) -> String {
    let present = chart::folder();
    let root = present.ancestors().nth(2).expect("the repository");
    let archive = folder.join("chart.tar");
    let mut git = Command::new("git");
    git.arg("-C").arg(root).args(["archive", "HEAD^", "charts/adit", "-o"]).arg(&archive);
    let output = git.output().expect("git");
    if !output.status.success() {
        eprintln!("the chart of the previous commit is not here: {}", command::text(&output));
        return present.to_str().expect("UTF-8 path").to_owned();
    }
    let unpacked = Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(folder).status();
    assert!(unpacked.expect("tar").success());
    folder.join("charts/adit").to_str().expect("UTF-8 path").to_owned()
}

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn an_installation_is_upgraded_rolled_back_and_drained_under_traffic() {
    let rig = Rig::start();
    // The label is there first, and pods that wait for nothing.
    rig.namespace(DEMO, &["client", "server"]);
    rig.label(DEMO, "ambient");
    let server = rig.server();
    let client = rig.serving("client", "client", "node1");
    rig.wait_get(&client, SERVER, true);

    let previous = previous_chart(rig.cluster.dir.path());
    rig.install_chart(&previous, &[]);
    for pod in [&server, &client] {
        rig.wait_enrolled(pod, true);
    }
    rig.wait_get(&client, SERVER, true);
    rig.wait_record("node2", &["inbound", "/ns/demo/sa/client", "/ns/demo/sa/server"]);

    let load = Load::start(&rig, 1);
    load.assert_whole(&rig, "with the previous chart");
    rig.upgrade(&["--set", "podAnnotations.step=upgrade"]).expect("helm upgrade");
    rig.wait_rolled_out();
    load.assert_whole(&rig, "after helm upgrade");
    rig.cluster.helm(&["rollback", "adit", "1", "--namespace", SYSTEM]).expect("helm rollback");
    rig.wait_rolled_out();
    load.assert_whole(&rig, "after helm rollback");

    // Pods of an image that is not there come and wait; those before them stay.
    rig.upgrade(&["--set", "image=localhost/adit:nowhere"]).expect("helm upgrade");
    wait_slowly(LIMIT, "a pod that waits for its image", || {
        rig.cluster.kubectl(&["-n", SYSTEM, "get", "pods", "-l", "app=ztunnel"]).contains("ErrImageNeverPull")
    });
    load.assert_whole(&rig, "while an image cannot be had");
    rig.upgrade(&[]).expect("helm upgrade");
    rig.wait_rolled_out();
    load.assert_whole(&rig, "after an image that could not be had");

    let twice = rig.cluster.helm(&[
        "install",
        "again",
        chart::folder().to_str().expect("UTF-8"),
        "--namespace",
        "elsewhere",
        "--create-namespace",
    ]);
    let said = twice.expect_err("two watchers would redirect the same pods");
    assert!(said.contains("exists and cannot be imported into the current release"), "{said}");

    // What can move, moves. The DaemonSet's pods stay, and so does what they serve.
    let drained = rig.cluster.try_kubectl(&[
        "drain",
        "node1",
        "--ignore-daemonsets",
        "--pod-selector=app!=connections-1,app!=requests-1,app!=client",
        "--timeout=100s",
    ]);
    assert!(drained.status.success(), "{}", command::text(&drained));
    load.assert_whole(&rig, "after node1 was drained");
    rig.cluster.kubectl(&["uncordon", "node1"]);

    // The API server is away: nothing that runs needs it.
    rig.cluster.api.kill_server();
    let before = load.answered_without_api(&rig);
    wait_slowly(LIMIT, "more requests without the API server", || {
        load.answered_without_api(&rig) > before + 200
    });
    rig.cluster.api.start_server();
    load.assert_whole(&rig, "after the API server was away");
    rig.wait_rolled_out();
}

/// As when a runtime loses a sandbox: the pod is the same, with the same uid, and its netns and its
/// address are others.
#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn a_sandbox_that_is_made_anew_is_the_same_pod() {
    let rig = Rig::start();
    rig.namespace(DEMO, &["client", "server"]);
    rig.install(&[]);
    rig.label(DEMO, "ambient");
    let server = rig.server();
    let client = rig.serving("client", "client", "node1");
    for pod in [&server, &client] {
        rig.wait_enrolled(pod, true);
    }
    rig.cluster.apply(policies::STRICT);
    rig.wait_get(&client, SERVER, true);
    for (node, pod) in [(1, &server), (0, &client)] {
        rig.cluster.nodes[node].run(&format!(
            "for pid in $(pgrep -f '^/bin/sleep 1000000000'); do
               grep -q pod{} /proc/$pid/cgroup && kill -9 $pid
             done",
            pod.uid
        ));
        let again = wait_slowly(LIMIT, "the pod to have another address", || {
            rig.cluster.pod(DEMO, &pod.name).filter(|again| again.ip != pod.ip)
        });
        rig.cluster.wait_ready(DEMO, &pod.name);
        assert_eq!(again.uid, pod.uid);
        rig.wait_get(&client, SERVER, true);
    }
    let identities = ["inbound", "/ns/demo/sa/client", "/ns/demo/sa/server"];
    let client = rig.cluster.ready_pod(DEMO, "client");
    rig.wait_record("node2", &[&identities[..], &[&client.ip]].concat());
}
