//! Where the node is not a machine of its own: it is a container, or crowded with others' cgroups.

use std::{fs, time::Instant};

use testbed::{
    cluster::{Cluster, Enrol},
    wait::wait_for,
};

/// As in Kind: pid, mount, cgroup and network namespaces per node, two such nodes on one kernel.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn nodes_that_are_containers_serve_their_own_pods_and_do_not_see_each_other() {
    let mut cluster = Cluster::new();
    let cgroup2 = cluster.cgroup2.clone();
    for node in &mut cluster.nodes {
        node.contain(&cgroup2);
    }
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    cluster.start();

    for url in [format!("http://{}:8080/", server.v4), format!("http://[{}]:8080/", server.v6)] {
        let reply = client.curl(&url).expect(&url);
        assert!(reply.contains("hello"), "{reply}");
    }
    for (node, direction) in [(0, "outbound"), (1, "inbound")] {
        wait_for("a record with both identities", || {
            cluster.nodes[node]
                .access_log()
                .into_iter()
                .find(|line| [direction, "/sa/client", "/sa/server"].iter().all(|part| line.contains(part)))
        });
    }
    // The label acts there as well, and each node knows its own pod alone.
    cluster.label(&["client"], Enrol::Plain);
    assert!(client.curl(&format!("http://{}:8080/", server.v4)).is_ok());
    cluster.label(&["client"], Enrol::Mesh);
    for (node, own, other) in [(0, "client", "server"), (1, "server", "client")] {
        let status = cluster.nodes[node].status();
        assert!(status.contains(own) && !status.contains(other), "{status}");
    }
}

/// Among 5,000 cgroups that belong to no known pod, our pods are found, and in time.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn foreign_cgroups_hide_no_pod() {
    const FOREIGN: usize = 5_000;
    let mut cluster = Cluster::new();
    let first = cluster.pod("first", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    let pods = cluster.nodes[0].pods_cgroup();
    let foreign = |number: usize| pods.join(format!("podforeign{number}")).join("main");
    for number in 0..FOREIGN / 2 {
        fs::create_dir_all(foreign(number)).expect("cgroup");
    }
    cluster.start();
    // More come while the watcher runs, and a pod of ours in their midst.
    for number in FOREIGN / 2..FOREIGN {
        fs::create_dir_all(foreign(number)).expect("cgroup");
    }
    let second = cluster.pod("second", 0, Enrol::Mesh);
    let since = Instant::now();
    cluster.publish();
    cluster.wait_settled();
    let took = since.elapsed();
    let url = format!("http://{}:8080/", server.v4);
    cluster.wait_mesh_read();
    for pod in [&first, &second] {
        assert!(pod.curl(&url).is_ok());
        let identity = format!("/sa/{}", pod.name);
        wait_for("its identity at the server", || {
            cluster.nodes[1].access_log().into_iter().find(|line| line.contains(&identity))
        });
    }
    println!("among {FOREIGN} foreign cgroups a new pod was open {took:?} after its entry");
}
