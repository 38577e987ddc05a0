//! What belongs to a pod is decided by its netns: every address of it is captured, and a pod that
//! is closed is closed both ways.

use testbed::{
    cluster::{Cluster, ClusterPod, Enrol, STRICT},
    command::run,
    netns::TestNetns,
    process::Process,
    wait::{LIMIT, try_wait, wait_for},
};

/// An entry of the pods file; `more` are further lines.
pub fn entry(pod: &ClusterPod, more: &str) -> String {
    format!(
        "- uid: {}\n  name: {name}\n  namespace: demo\n  serviceAccount: {name}\n  cgroup: {}\n  \
         labels: {{istio.io/dataplane-mode: ambient}}\n{more}",
        pod.uid(),
        pod.cgroup.parent().expect("pod cgroup").display(),
        name = pod.name,
    )
}

pub fn addresses(of: &[&str]) -> String {
    let list: Vec<String> = of.iter().map(|address| format!("\"{address}\"")).collect();
    format!("  addresses: [{}]\n", list.join(", "))
}

pub fn publish_entries(cluster: &Cluster, node: usize, entries: &[String]) {
    cluster.nodes[node].write_pods(&entries.concat());
}

/// Starts the watcher and the tunnel of a node, and waits for nothing.
pub fn start_node(cluster: &mut Cluster, node: usize) {
    let (cgroup2, bpffs, mesh, ca) =
        (cluster.cgroup2.clone(), cluster.bpffs(), cluster.mesh_file(), cluster.ca_dir());
    cluster.nodes[node].start_watcher(&cgroup2, &bpffs, &["--detach"]);
    cluster.nodes[node].start_tunnel(&mesh, &ca);
}

/// The state and the reason that the watcher of `node` gives for a pod.
fn state(cluster: &Cluster, node: usize, name: &str) -> (String, String) {
    let status = cluster.nodes[node].status();
    let value: serde_json::Value = serde_json::from_str(&status).unwrap_or_default();
    let pods = value["pods"].as_array().cloned().unwrap_or_default();
    let word = |pod: &serde_json::Value, pointer: &str| {
        pod.pointer(pointer).and_then(|v| v.as_str()).unwrap_or_default().to_owned()
    };
    let found = pods.iter().find(|pod| word(pod, "/name") == name);
    found.map(|pod| (word(pod, "/state"), word(pod, "/reason/code"))).unwrap_or_default()
}

pub fn wait_for_state(cluster: &Cluster, node: usize, name: &str, wanted: (&str, &str)) {
    let mut seen = Default::default();
    let reached = try_wait(LIMIT, || {
        seen = state(cluster, node, name);
        (seen.0.as_str(), seen.1.as_str()) == wanted
    });
    assert!(reached.is_some(), "{name}: wanted {wanted:?}, found {seen:?}\n{}", cluster.nodes[node].story());
}

/// The link-local address of a pod's eth0, as a URL of its neighbours has it.
fn link_local_url(pod: &ClusterPod) -> String {
    let address = wait_for("a link-local address", || {
        let said = run(&format!("ip -n {} -6 -o addr show dev eth0 scope link -tentative", pod.netns));
        let address = said.split_whitespace().find(|word| word.starts_with("fe80:"))?;
        Some(address.split('/').next()?.to_owned())
    });
    format!("http://[{address}%25eth0]:8080/")
}

/// Plain neighbours on the bridge, strict policy: no address of the pod is a way around it.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn every_address_of_a_pods_netns_meets_the_pods_policy() {
    let mut cluster = Cluster::new();
    let near = cluster.pod("near", 1, Enrol::Plain);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    // A second interface, as Multus adds.
    run(&format!(
        "ip -n {near} link add net1 type veth peer name net1 netns {server}
         ip -n {near} addr add 192.168.9.1/24 dev net1
         ip -n {server} addr add 192.168.9.2/24 dev net1
         ip -n {near} link set net1 up
         ip -n {server} link set net1 up",
        near = near.netns,
        server = server.netns,
    ));
    cluster.start();
    publish_entries(&cluster, 1, &[entry(&server, &addresses(&[&server.v4, &server.v6]))]);
    wait_for_state(&cluster, 1, "server", ("open", ""));
    // Added when the pod is open already.
    run(&format!("ip -n {} addr add 10.77.2.200/24 dev eth0", server.netns));
    let urls = [
        format!("http://{}:8080/", server.v4),
        format!("http://[{}]:8080/", server.v6),
        "http://10.77.2.200:8080/".to_owned(),
        "http://192.168.9.2:8080/".to_owned(),
        link_local_url(&server),
    ];
    for url in &urls {
        wait_for(url, || near.curl(url).ok());
    }
    cluster.policies = STRICT.into();
    cluster.publish_mesh();
    wait_for("the policy to hold", || near.curl(&urls[0]).is_err().then_some(()));
    let answered: Vec<_> = urls.iter().filter_map(|url| near.curl(url).ok().map(|_| url)).collect();
    assert!(answered.is_empty(), "past the policy: {answered:?}");
}

/// Its cgroup is certainly the pod's and its addresses are not what they should be.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_that_cannot_be_enrolled_is_closed_both_ways() {
    let mut cluster = Cluster::new();
    let near = cluster.pod("near", 1, Enrol::Plain);
    let wrong = cluster.pod("wrong", 1, Enrol::Mesh);
    let open = cluster.pod("open", 1, Enrol::Mesh);
    for pod in [&near, &wrong, &open] {
        cluster.serve_web(pod, "hello");
    }
    cluster.publish();
    let entries = [
        entry(&wrong, &addresses(&["10.9.9.9"])),
        entry(&open, "  addresses: [\"10.9.9.8\"]\n  failMode: open\n"),
    ];
    publish_entries(&cluster, 1, &entries);
    start_node(&mut cluster, 1);
    for name in ["wrong", "open"] {
        wait_for_state(&cluster, 1, name, ("refused", "address_not_held"));
    }
    wrong.curl(&format!("http://{}:8080/", near.v4)).expect_err("closed outbound");
    for host in [&wrong.v4, &format!("[{}]", wrong.v6)] {
        near.curl(&format!("http://{host}:8080/")).expect_err("closed inbound");
    }
    near.curl(&link_local_url(&wrong)).expect_err("closed inbound");
    wrong.curl("http://127.0.0.1:8080/").expect("it reaches itself");
    near.curl(&format!("http://{}:8080/", open.v4)).expect("fail mode open");
    // In order again, it opens; without the label it is left alone.
    publish_entries(&cluster, 1, &[entry(&wrong, &addresses(&[&wrong.v4]))]);
    wait_for_state(&cluster, 1, "wrong", ("open", ""));
    let url = format!("http://{}:8080/", wrong.v4);
    wait_for("the pod to be served", || near.curl(&url).ok());
    publish_entries(&cluster, 1, &[entry(&wrong, &addresses(&["10.9.9.9"]))]);
    wait_for_state(&cluster, 1, "wrong", ("refused", "address_not_held"));
    near.curl(&url).expect_err("closed inbound once more");
    publish_entries(&cluster, 1, &[entry(&open, "")]);
    wait_for("the label to be off", || near.curl(&url).ok());
}

/// An interface that goes down and up loses its IPv6 addresses.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn an_address_that_is_lost_for_a_while_opens_no_other_one() {
    let mut cluster = Cluster::new();
    let near = cluster.pod("near", 1, Enrol::Plain);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    cluster.policies = STRICT.into();
    cluster.start();
    publish_entries(&cluster, 1, &[entry(&server, &addresses(&[&server.v4, &server.v6]))]);
    let url = format!("http://{}:8080/", server.v4);
    let closed = |when: &str| {
        for _ in 0..20 {
            near.curl(&url).expect_err(when);
        }
    };
    wait_for_state(&cluster, 1, "server", ("open", ""));
    closed("by policy");
    for _ in 0..3 {
        run(&format!("ip -n {} addr del {}/64 dev eth0", server.netns, server.v6));
        wait_for_state(&cluster, 1, "server", ("refused", "address_not_held"));
        closed("without its IPv6 address");
        run(&format!("ip -n {} addr add {}/64 dev eth0 nodad", server.netns, server.v6));
        wait_for_state(&cluster, 1, "server", ("open", ""));
        closed("by policy again");
    }
}

/// Whoever may change its own netns may add any address there, before the API tells which is whose.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_neighbour_that_adds_a_pods_addresses_gets_nothing() {
    let mut cluster = Cluster::new();
    let near = cluster.pod("near", 1, Enrol::Plain);
    let thief = cluster.pod("thief", 1, Enrol::Mesh);
    let victim = cluster.pod("victim", 1, Enrol::Mesh);
    cluster.serve_web(&victim, "hello from victim");
    cluster.serve_web(&thief, "hello from thief");
    // One that the API tells, and one that it does not.
    run(&format!("ip -n {} addr add 10.77.2.201/24 dev eth0", victim.netns));
    for address in [&victim.v4, "10.77.2.201"] {
        run(&format!("ip -n {} addr add {address}/32 dev eth0", thief.netns));
    }
    // On the bridge the victim answers for its addresses.
    run(&format!("ip netns exec {} sysctl -qw net.ipv4.conf.all.arp_ignore=8", thief.netns));
    cluster.publish();
    let entries = [entry(&thief, ""), entry(&victim, &addresses(&[&victim.v4, &victim.v6]))];
    publish_entries(&cluster, 1, &entries[..1]);
    start_node(&mut cluster, 1);
    wait_for_state(&cluster, 1, "thief", ("open", ""));
    publish_entries(&cluster, 1, &entries);
    wait_for_state(&cluster, 1, "victim", ("open", ""));
    for address in [&victim.v4, "10.77.2.201"] {
        let reply = near.curl(&format!("http://{address}:8080/"));
        assert!(reply.as_ref().is_ok_and(|reply| reply.contains("victim")), "{address}: {reply:?}");
    }
    wait_for_state(&cluster, 1, "thief", ("refused", "address_taken"));
}

/// A browser's renderers, docker in docker: processes of the pod in netns of their own.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn what_a_pod_does_in_a_netns_of_its_own_is_left_alone_and_keeps_no_pod_closed() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    cluster.serve_web(&server, "hello");
    // Two netns that only the pod's own processes know.
    let nested = [0, 1].map(|n| TestNetns::new(format!("{}-nested{n}", cluster.id)));
    run(&format!(
        "ip -n {a} link add n0 type veth peer name n0 netns {b}
         ip -n {a} addr add 172.30.0.1/24 dev n0
         ip -n {b} addr add 172.30.0.2/24 dev n0
         ip -n {a} link set n0 up
         ip -n {b} link set n0 up",
        a = nested[0],
        b = nested[1],
    ));
    let log = cluster.dir.path().join("nested.log");
    let inside = |netns: &TestNetns| client.placement().in_netns(netns);
    for netns in &nested {
        let sleep = Process::spawn("sleep", inside(netns).command(&["sleep", "infinity"]), &log);
        cluster.keep(sleep);
    }
    let listen = ["python3", "-m", "http.server", "8080", "--bind", "172.30.0.2"];
    let other = Process::spawn("nested server", inside(&nested[1]).command(&listen), &log);
    cluster.keep(other);
    cluster.publish();
    publish_entries(&cluster, 0, &[entry(&client, &addresses(&[&client.v4, &client.v6]))]);
    start_node(&mut cluster, 0);
    start_node(&mut cluster, 1);
    wait_for_state(&cluster, 0, "client", ("open", ""));
    let url = format!("http://{}:8080/", server.v4);
    let reply = wait_for("the server", || client.curl(&url).ok());
    assert_eq!(reply, format!("hello, client {}\n", client.v4));
    let dial = ["curl", "-sS", "-m", "5", "-o", "/dev/null", "http://172.30.0.2:8080/"];
    wait_for("the nested server", || {
        let output = inside(&nested[0]).command(&dial).output().expect("sh");
        output.status.success()
    });
}
