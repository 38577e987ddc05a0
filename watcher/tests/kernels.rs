//! Two nodes with real watchers and real tunnels on every kernel of the support range. The tests
//! boot the other kernels (`adit_vm`) and run this binary there.

use std::path::Path;

use testbed::{
    cluster::{Cluster, Enrol},
    program::binary,
    wait::wait_for,
};

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn pods_are_enrolled_and_let_go_again() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    cluster.start();
    let recorded = |cluster: &Cluster| {
        cluster.nodes[1].access_log().iter().filter(|line| line.contains("sa/client")).count()
    };
    for (url, source) in [
        (format!("http://{}:8080/", server.v4), &client.v4),
        (format!("http://[{}]:8080/", server.v6), &client.v6),
    ] {
        assert_eq!(
            client.curl(&url),
            Ok(format!("hello, client {source}\n")),
            "{}",
            cluster.nodes[1].story()
        );
    }
    wait_for("two records with the client's identity", || (recorded(&cluster) == 2).then_some(()));
    cluster.label(&["client", "server"], Enrol::Plain);
    let url = format!("http://{}:8080/", server.v4);
    assert_eq!(client.curl(&url), Ok(format!("hello, client {}\n", client.v4)));
    assert_eq!(recorded(&cluster), 2, "past the tunnels");
}

fn enrolment_on(kernel: &str) {
    if adit_vm::is_inside() {
        return;
    }
    let own = std::env::current_exe().expect("our own path");
    let (watcher, ztunnel) = (binary("watcher"), binary("ztunnel"));
    let mut programs = vec![own.as_path(), &watcher, &ztunnel];
    programs.extend(["ip", "nsenter", "bash", "curl", "nginx"].map(Path::new));
    let command = format!(
        "{} --include-ignored --nocapture --exact kernels::pods_are_enrolled_and_let_go_again",
        own.display()
    );
    let said = adit_vm::run(kernel, &programs, &command).unwrap_or_else(|error| panic!("{error:#}"));
    assert!(said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "boots a kernel: make test"]
fn linux_5_10() {
    enrolment_on("5.10");
}

#[test]
#[ignore = "boots a kernel: make test"]
fn linux_6_1() {
    enrolment_on("6.1");
}

#[test]
#[ignore = "boots a kernel: make test"]
fn linux_6_12() {
    enrolment_on("6.12");
}

#[test]
#[ignore = "boots a kernel: make test"]
fn linux_7_2() {
    enrolment_on("7.2");
}
