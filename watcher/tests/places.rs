//! Where the node is not a machine of its own: it is a container, or crowded with others' cgroups.

mod bed;

use std::{
    fs,
    time::{Duration, Instant},
};

use bed::{Bed, Enrol, wait_for};

/// As in Kind: pid, mount, cgroup and network namespaces per node, two such nodes on one kernel.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn nodes_that_are_containers_serve_their_own_pods_and_do_not_see_each_other() {
    let mut bed = Bed::new();
    let cgroup2 = bed.cgroup2.clone();
    for node in &mut bed.nodes {
        node.contain(&cgroup2);
    }
    let client = bed.pod("client", 0, Enrol::Mesh);
    let server = bed.pod("server", 1, Enrol::Mesh);
    bed.serve_web(&server, "hello");
    bed.start();

    for url in [format!("http://{}:8080/", server.v4), format!("http://[{}]:8080/", server.v6)] {
        let reply = client.curl(&url).expect(&url);
        assert!(reply.contains("hello"), "{reply}");
    }
    for (node, direction) in [(0, "outbound"), (1, "inbound")] {
        wait_for("a record with both identities", Duration::from_secs(10), || {
            bed.nodes[node]
                .access_log()
                .into_iter()
                .find(|line| [direction, "/sa/client", "/sa/server"].iter().all(|part| line.contains(part)))
        });
    }
    // The label acts there as well, and each node knows its own pod alone.
    bed.label(&["client"], Enrol::Plain);
    assert!(client.curl(&format!("http://{}:8080/", server.v4)).is_ok());
    bed.label(&["client"], Enrol::Mesh);
    for (node, own, other) in [(0, "client", "server"), (1, "server", "client")] {
        let status = bed.nodes[node].status();
        assert!(status.contains(own) && !status.contains(other), "{status}");
    }
}

/// 5,000 cgroups that are nobody's pods: none of ours is lost among them, or late.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn foreign_cgroups_hide_no_pod() {
    const FOREIGN: usize = 5_000;
    let mut bed = Bed::new();
    let first = bed.pod("first", 0, Enrol::Mesh);
    let server = bed.pod("server", 1, Enrol::Mesh);
    bed.serve_web(&server, "hello");
    let pods = bed.nodes[0].pods_cgroup();
    let foreign = |number: usize| pods.join(format!("podforeign{number}")).join("main");
    for number in 0..FOREIGN / 2 {
        fs::create_dir_all(foreign(number)).expect("cgroup");
    }
    bed.start();
    // More come while the watcher runs, and a pod of ours in their midst.
    for number in FOREIGN / 2..FOREIGN {
        fs::create_dir_all(foreign(number)).expect("cgroup");
    }
    let second = bed.pod("second", 0, Enrol::Mesh);
    let since = Instant::now();
    bed.publish();
    bed.wait_settled();
    let took = since.elapsed();
    let url = format!("http://{}:8080/", server.v4);
    bed.wait_mesh_read();
    for pod in [&first, &second] {
        assert!(pod.curl(&url).is_ok());
        let identity = format!("/sa/{}", pod.name);
        wait_for("its identity at the server", Duration::from_secs(10), || {
            bed.nodes[1].access_log().into_iter().find(|line| line.contains(&identity))
        });
    }
    println!("among {FOREIGN} foreign cgroups a new pod was open {took:?} after its entry");
}
