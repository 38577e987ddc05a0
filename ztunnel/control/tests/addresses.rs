//! Where it listens.

use std::{
    fs::{self, File},
    process::{Command, Stdio},
};

use testbed::{
    api_server::ApiServer,
    process::{KillOnDrop, WITHOUT_IPV6},
    program::binary,
    wait::wait_for,
};

use crate::rig::kubeconfig;

#[test]
#[ignore = "needs an API server: make test"]
fn on_a_kernel_without_ipv6_it_listens_by_ipv4() {
    let api = ApiServer::shared();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let output = File::create(&log).unwrap();
    let child = Command::new(WITHOUT_IPV6[0])
        .args(&WITHOUT_IPV6[1..])
        .arg(binary("ztunnel-control"))
        .args(["--listen", "[::]:0", "--http-listen", "[::]:0"])
        .env("KUBECONFIG", kubeconfig(&api))
        .stdin(Stdio::null())
        .stderr(output.try_clone().unwrap())
        .stdout(output)
        .spawn()
        .unwrap();
    let mut process = KillOnDrop(child);
    let said = wait_for("the control plane to listen, or to end", || {
        let ended = process.0.try_wait().unwrap().is_some();
        fs::read_to_string(&log).ok().filter(|log| ended || log.contains("listening"))
    });
    assert!(said.contains("grpc=0.0.0.0:") && said.contains("http=0.0.0.0:"), "{said}");
}
