//! What the API says of a pod is not always what runs: a pod whose object is gone may run on, and
//! one that runs may do so where no program reaches it.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::json;
use testbed::{
    api_node::ApiNode,
    process::{Placement, Process},
    wait::{try_wait, wait_for},
};

const AMBIENT: &str = "istio.io/dataplane-mode";

/// A process of pod `number` that prints what each connect(2) to a neighbour that does not exist
/// says at once: `EPERM` where the programs refuse it, for lack of a listener of the fake tunnel.
fn dialler(node: &ApiNode, number: usize) -> Process {
    let pod = &node.host.pods[number];
    let script = "
import errno, socket, time
last = None
while True:
    s = socket.socket(); s.setblocking(False)
    said = s.connect_ex(('10.88.NUMBER.99', 80)); s.close()
    if said != last:
        print(errno.errorcode.get(said, said), flush=True); last = said
    time.sleep(0.001)
"
    .replace("NUMBER", &number.to_string());
    let placed = Placement::in_cgroup(&pod.cgroup.join("container")).in_netns(&pod.netns);
    let log = node.host.dir.path().join(format!("dial-{number}.log"));
    let process = Process::spawn("dialler", placed.command(&["python3", "-c", &script]), &log);
    wait_for("the first refusal", || !process.output().is_empty());
    process
}

fn wait_gone(node: &ApiNode, name: &str) {
    let gone = try_wait(testbed::wait::LIMIT, || node.find(name).is_none());
    assert!(gone.is_some(), "{name} is still there: {:?}\n{}", node.find(name), node.host.log());
}

/// Deleted by force, failed, given up with its node: its processes know nothing of that.
#[test]
#[ignore = "needs root: make test"]
fn a_pod_whose_object_is_gone_stays_in_the_mesh_until_its_processes_end() {
    let mut node = ApiNode::new(&json!({AMBIENT: "ambient"}));
    let (deleted, _) = node.pod("deleted", &json!({}));
    let (failed, _) = node.pod("failed", &json!({}));
    let (unlabelled, _) = node.pod("unlabelled", &json!({}));
    node.host.start(&["--rescan", "1"]);
    let _told = node.tunnel().take_all();
    for name in ["deleted", "failed", "unlabelled"] {
        node.wait_state(name, "open", "");
    }
    let dialler = dialler(&node, deleted);
    let dialler_of_failed = self::dialler(&node, failed);
    node.api.delete_pod(&node.namespace, "deleted");
    node.api.set_status(&node.namespace, "failed", &json!({"phase": "Failed"}));
    for name in ["deleted", "failed"] {
        node.wait_state(name, "open", "object_gone");
    }
    for (pod, dialler) in [(deleted, &dialler), (failed, &dialler_of_failed)] {
        assert!(node.host.pods[pod].is_prepared());
        assert_eq!(dialler.output(), "EPERM\n", "in clear\n{}", node.host.log());
    }
    assert!(!node.host.log().contains("pod left the mesh"), "{}", node.host.log());

    // Not even a watcher that has never seen the objects lets them go.
    node.host.watcher.as_ref().expect("watcher").signal(Signal::SIGKILL);
    node.host.kill_watcher();
    node.host.start(&["--rescan", "1"]);
    let _told = node.tunnel().take_all();
    node.wait_state("unlabelled", "open", "");
    for name in ["deleted", "failed"] {
        node.wait_state(name, "open", "object_gone");
    }
    for dialler in [&dialler, &dialler_of_failed] {
        assert_eq!(dialler.output(), "EPERM\n", "in clear\n{}", node.host.log());
    }

    // The label acts at once, whatever runs.
    node.api.patch_pod(&node.namespace, "unlabelled", &json!({"metadata": {"labels": {AMBIENT: "none"}}}));
    node.wait_state("unlabelled", "plain", "");
    wait_for("its netns to be restored", || !node.host.pods[unlabelled].is_prepared());

    drop((dialler, dialler_of_failed));
    for pod in [deleted, failed] {
        node.host.pods[pod].end();
    }
    for name in ["deleted", "failed"] {
        wait_gone(&node, name);
    }
}

/// Its object named them, and nobody else.
#[test]
#[ignore = "needs root: make test"]
fn a_pod_whose_object_is_gone_keeps_its_exclusions_over_a_restart() {
    let mut node = ApiNode::new(&json!({AMBIENT: "ambient"}));
    let annotations = json!({
        "ambient.adit.dev/exclude-outbound-ports": "6379,7000-7010",
        "ambient.adit.dev/exclude-outbound-cidrs": "192.0.2.0/24,2001:db8::/32",
    });
    node.pod("deleted", &json!({"metadata": {"annotations": annotations}}));
    node.host.start(&["--rescan", "1"]);
    let _told = node.tunnel().take_all();
    node.wait_state("deleted", "open", "");
    node.api.delete_pod(&node.namespace, "deleted");
    node.wait_state("deleted", "open", "object_gone");
    let explained = |node: &ApiNode, to: &str| {
        let (ok, said) =
            node.host.command(&["explain", &format!("{}/deleted", node.namespace), to, "-o", "json"]);
        assert!(ok, "{said}");
        let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
        said["outbound"].as_str().expect("a rule").to_owned()
    };
    for restarts in 0..3 {
        for (to, rule) in [
            ("10.1.1.1:6379", "leave: port excluded"),
            ("10.1.1.1:7010", "leave: port excluded"),
            ("192.0.2.200:80", "leave: CIDR excluded"),
            ("[2001:db8::7]:80", "leave: CIDR excluded"),
        ] {
            assert_eq!(explained(&node, to), rule, "{to} after {restarts} restarts");
        }
        assert!(!explained(&node, "10.1.1.1:7011").contains("excluded"));
        node.host.watcher.as_ref().expect("watcher").signal(Signal::SIGKILL);
        node.host.kill_watcher();
        node.host.start(&["--rescan", "1"]);
        let _told = node.tunnel().take_all();
        node.wait_state("deleted", "open", "object_gone");
    }
}

/// Kubelet and container runtime with different cgroup drivers, for instance.
#[test]
#[ignore = "needs root: make test"]
fn a_pod_that_runs_where_no_program_reaches_it_is_bypassed_and_not_closed() {
    let mut node = ApiNode::new(&json!({AMBIENT: "ambient"}));
    let running = json!({"containerStatuses": [{
        "name": "main", "image": "i", "imageID": "i", "ready": true, "restartCount": 0,
        "state": {"running": {}},
    }]});
    let waiting = json!({"containerStatuses": [{
        "name": "main", "image": "i", "imageID": "i", "ready": false, "restartCount": 0,
        "state": {"waiting": {"reason": "ContainerCreating"}},
    }]});
    for (name, cgroup, status) in [
        ("elsewhere", Some("system-cri-1"), &running),
        ("empty", None, &running),
        ("starting", None, &waiting),
    ] {
        let uid = node.api.pod(&node.namespace, name, &node.host.name, &json!({}));
        if let Some(cgroup) = cgroup {
            node.host.pod_in(name, cgroup);
        } else {
            fs::create_dir_all(node.host.cgroup.join(format!("pods/pod{uid}"))).expect("cgroup");
        }
        node.api.set_status(&node.namespace, name, status);
    }
    let (normal, _) = node.pod("normal", &json!({}));
    node.api.set_status(&node.namespace, "normal", &running);
    node.host.start(&[]);
    let _told = node.tunnel().take_all();
    node.wait_state("normal", "open", "");
    for name in ["elsewhere", "empty"] {
        node.wait_state(name, "bypassed", "runs_elsewhere");
    }
    node.wait_state("starting", "closed", "no_process");
    node.wait_state("normal", "open", "");
    for name in ["elsewhere", "empty"] {
        wait_for("an Event", || {
            let api = kube::Api::<k8s_openapi::api::events::v1::Event>::namespaced(
                node.api.client(),
                &node.namespace,
            );
            let events = node.api.block_on(api.list(&kube::api::ListParams::default())).ok()?;
            events.items.into_iter().find(|event| {
                event.reason.as_deref() == Some("RunsElsewhere")
                    && event.regarding.as_ref().is_some_and(|pod| pod.name.as_deref() == Some(name))
            })
        });
    }
    // A process that comes where it belongs is seen, and closed.
    let pod = &node.host.pods[normal];
    let uid = node.find("empty").expect("the pod")["uid"].as_str().expect("a uid").to_owned();
    let dir = node.host.cgroup.join(format!("pods/pod{uid}"));
    let command = Placement::in_cgroup(&dir).in_netns(&pod.netns).command(&["sleep", "1000"]);
    let _process = Process::spawn("late", command, &node.host.dir.path().join("late.log"));
    node.wait_state("empty", "refused", "netns_taken");
}

/// A virtual machine, or containers of its own.
#[test]
#[ignore = "needs root: make test"]
fn a_guest_behind_a_pods_netns_is_told() {
    let mut node = ApiNode::new(&json!({AMBIENT: "ambient"}));
    let (vm, _) = node.pod("vm", &json!({}));
    let (gateway, _) = node.pod("gateway", &json!({}));
    let (normal, _) = node.pod("normal", &json!({}));
    node.host.start(&["--rescan", "1"]);
    let _told = node.tunnel().take_all();
    for name in ["vm", "gateway", "normal"] {
        node.wait_state(name, "open", "");
    }
    node.host.pods[vm].netns.run("ip tuntap add tap0 mode tap");
    node.host.pods[gateway].netns.run(
        "sysctl -qw net.ipv4.ip_forward=1
         nft add table ip guest
         nft \"add chain ip guest out { type nat hook postrouting priority 100; }\"
         nft add rule ip guest out masquerade",
    );
    for name in ["vm", "gateway"] {
        node.wait_state(name, "bypassed", "guest_behind_pod");
        wait_for("an Event", || {
            let api = kube::Api::<k8s_openapi::api::events::v1::Event>::namespaced(
                node.api.client(),
                &node.namespace,
            );
            let events = node.api.block_on(api.list(&kube::api::ListParams::default())).ok()?;
            events.items.into_iter().find(|event| {
                event.reason.as_deref() == Some("GuestBehindPod")
                    && event.regarding.as_ref().is_some_and(|pod| pod.name.as_deref() == Some(name))
            })
        });
    }
    node.wait_state("normal", "open", "");
    assert!(node.host.pods[normal].is_prepared());
    node.host.pods[vm].netns.run("ip link del tap0");
    node.wait_state("vm", "open", "");
}
