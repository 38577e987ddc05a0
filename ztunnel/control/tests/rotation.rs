//! A rotation of the root: two control planes at one API server, of which one is killed at each
//! step, and two tunnels of theirs that open connections to each other all the time. None fails.

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kube::Api;
use serde_json::Value;
use testbed::{
    api_server::ApiServer,
    process::KillOnDrop,
    program::binary,
    wait::{try_wait, wait_at_most},
};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use crate::{
    replica::Replica,
    rig::{LIMIT, kubeconfig},
    tunnels::{Tunnel, connect},
};

/// Of certificates. A step of the rotation takes a little longer.
const LIFE: Duration = Duration::from_secs(10);

/// Runs `ztunnel-control rotate-root`, with the chart's rights.
fn rotate(kubeconfig: &PathBuf, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary("ztunnel-control"));
    command.arg("rotate-root").args(arguments).env("KUBECONFIG", kubeconfig).stdin(Stdio::null());
    command
}

fn progress(kubeconfig: &PathBuf, arguments: &[&str]) -> Value {
    let output = rotate(kubeconfig, &[arguments, &["-o", "json"]].concat()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one object")
}

/// Copies the ConfigMap into a file, as kubelets do, until it is stopped.
fn kubelet(api: &Arc<ApiServer>, file: PathBuf, stop: CancellationToken) -> JoinHandle<()> {
    let api = Arc::clone(api);
    std::thread::spawn(move || {
        let maps: Api<k8s_openapi::api::core::v1::ConfigMap> = Api::namespaced(api.client(), "adit-system");
        while !stop.is_cancelled() {
            let found = api.block_on(maps.get_opt("adit-root-cert")).unwrap();
            if let Some(root) = found.and_then(|map| map.data?.remove("root-cert.pem")) {
                let next = file.with_extension("next");
                fs::write(&next, root).unwrap();
                fs::rename(&next, &file).unwrap();
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    })
}

#[test]
#[ignore = "needs an API server: make test"]
fn no_connection_fails_while_the_root_is_replaced() {
    let api = Arc::new(ApiServer::start());
    let kubeconfig = kubeconfig(&api);
    let ports = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
    let mut replicas = ports.map(|port| Some(Replica::start(&kubeconfig, port, LIFE)));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root-cert.pem");
    let stop = CancellationToken::new();
    let copying = kubelet(&api, file.clone(), stop.clone());
    wait_at_most(LIMIT, "a root", || file.exists().then_some(()));
    let runtime = Runtime::new().unwrap();
    let tunnels = ports.map(|port| Tunnel::start(&api, &runtime, port, file.to_str().unwrap()));

    let began = progress(&kubeconfig, &[]);
    let old = began["signing"]["sha256"].clone();
    assert_eq!(began["step"], "trust", "{began}");
    let new = began["next"]["sha256"].clone();
    assert_ne!(old, new);
    // Run again, it begins no second one.
    assert_eq!(progress(&kubeconfig, &[])["next"]["sha256"], new);
    // Whoever waits is killed, and another waits to the end.
    let mut waiting = KillOnDrop(rotate(&kubeconfig, &["--wait"]).stdout(Stdio::null()).spawn().unwrap());

    let (mut connections, mut steps) = (0, Vec::new());
    let deadline = Instant::now() + LIFE * 10;
    loop {
        for (from, to) in [(0, 1), (1, 0)].repeat(5) {
            let connected = runtime.block_on(connect(&tunnels[from], &tunnels[to]));
            assert_eq!(connected, Ok(()), "after {connections} connections, steps {steps:?}");
            connections += 1;
        }
        let now = progress(&kubeconfig, &["--status"]);
        if steps.last() != Some(&now["step"]) {
            steps.push(now["step"].clone());
            if now["step"] == "retire" {
                let again = progress(&kubeconfig, &[]);
                assert_eq!((&again["step"], &again["signing"]["sha256"]), (&now["step"], &new));
            }
            // One of them is killed at each step, and comes back.
            let one = steps.len() % 2;
            drop(replicas[one].take());
            replicas[one] = Some(Replica::start(&kubeconfig, ports[one], LIFE));
            if steps.len() == 1 {
                drop(waiting);
                waiting = KillOnDrop(rotate(&kubeconfig, &["--wait"]).stdout(Stdio::null()).spawn().unwrap());
            }
        }
        if now["step"] == "idle" {
            assert_eq!(now["signing"]["sha256"], new);
            assert_eq!(now["previous"].as_array().map(Vec::len), Some(0));
            break;
        }
        assert!(Instant::now() < deadline, "still {now}");
    }
    assert_eq!(steps, ["trust", "retire", "idle"]);
    assert!(connections >= 30, "{connections}");
    let ended = try_wait(LIMIT, || waiting.0.try_wait().unwrap().is_some());
    assert!(ended.is_some(), "the command that waits does not see the end");
    // When all certificates were renewed once more, nobody knows the old root.
    for tunnel in &tunnels {
        wait_at_most(LIMIT, "one root", || {
            (runtime.block_on(tunnel.credentials()).roots().len() == 1).then_some(())
        });
    }
    stop.cancel();
    copying.join().unwrap();
}
