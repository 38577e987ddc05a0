//! A task that must not end, and dies: the process goes down in order and says why.

use std::{
    fs,
    io::{Read, Write},
};

use serde_json::json;
use testbed::{
    fakes::FakeControlPlane,
    mesh_pod::read_line,
    task_limit::TaskLimit,
    tunnel_mesh::{TunnelMesh, TunnelNode},
    wait::wait_for,
};

use crate::control_plane::{name, tunnel, workload};

/// The names of its threads.
fn threads(node: &TunnelNode) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", node.pid())).expect("tasks");
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
    tasks.flatten().filter_map(name).collect()
}

/// The process may start no more threads, and what the control plane says next is applied by one.
#[test]
#[ignore = "needs root: make test"]
fn a_task_that_must_not_end_takes_the_process_down_in_order_when_it_dies() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let netns = mesh.netns("a");
    let mut control = FakeControlPlane::start(mesh.dir.path(), &netns, 0);
    control.send(&json!({"hold": "address", "set":
        {name(&client): workload(&client, "1", 1), name(&server): workload(&server, "1", 1)}}));
    let mut node = tunnel(&mesh, netns, control.port, &[&client, &server]);
    node.wait_ready();
    let mut open = client.netns.connect(server.at(8080));
    read_line(&mut open).expect("greeting");
    wait_for("idle threads of the runtimes to end", || {
        threads(&node).iter().all(|name| !name.starts_with("tokio-r")).then_some(())
    });
    let limit = TaskLimit::no_more(node.pid());
    control.send(&json!({"push": "address", "set": {name(&client): workload(&client, "2", 1)}}));

    wait_for("its end to be noticed", || node.log().contains("discovery panicked").then_some(()));
    let readiness = node.readiness().expect("an answer");
    assert!(readiness.contains("not ready") && readiness.contains("state manager"), "{readiness}");
    open.write_all(b"ab").expect("written");
    let mut echo = [0; 4];
    open.read_exact(&mut echo).expect("what is open goes on");
    drop(open);
    assert_eq!(node.wait_exit().code(), Some(1));
    let log = node.log();
    for said in
        ["\"error\":\"OS can't spawn worker thread", "without which this process cannot work", "\"stopped\""]
    {
        assert!(log.contains(said), "{said}\n{log}");
    }
    drop(limit);
}
