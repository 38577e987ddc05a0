//! DNS end to end: the resolver library of an application, the kernel programs, the tunnel, an
//! upstream resolver.

use std::fs;

use testbed::{
    cluster::{Cluster, ClusterPod, Enrol, WEB_V4},
    command::text,
    process::{Placement, Process},
    wait::wait_for,
};

/// Answers every query by UDP with one address, 192.0.2.7.
const RESOLVER: &str = "
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 53))
print('bound', flush=True)
while True:
    q, client = s.recvfrom(4096)
    end = q.index(b'\\0', 12) + 5
    s.sendto(q[:2] + b'\\x81\\x80\\0\\1\\0\\1\\0\\0\\0\\0' + q[12:end] + b'\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4\\xc0\\0\\2\\7', client)
";

/// The node's own address, which its pods reach.
const ADDRESS: &str = "10.77.1.1";

/// The addresses that the C library's resolver finds.
fn lookup(pod: &ClusterPod, resolv_conf: &str, name: &str) -> String {
    let script = format!("mount --bind {resolv_conf} /etc/resolv.conf && getent ahostsv4 {name}");
    let output = pod.exec(&["unshare", "-m", "sh", "-ec", &script]);
    text(&output).split_whitespace().next().unwrap_or_default().to_owned()
}

fn dig(pod: &ClusterPod, name: &str, arguments: &[&str]) -> String {
    let server = format!("@{ADDRESS}");
    let line = [&["dig", "+short", "+tries=1", "+timeout=10", &server, name], arguments].concat();
    text(&pod.exec(&line)).trim().to_owned()
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn captured_queries_are_answered_by_the_tunnel_and_by_the_resolver_when_it_is_gone() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let plain = cluster.pod("plain", 0, Enrol::Plain);
    cluster.publish();
    let (cgroup2, bpffs, mesh, ca) =
        (cluster.cgroup2.clone(), cluster.bpffs(), cluster.mesh_file(), cluster.ca_dir());

    let log = cluster.dir.path().join("resolver.log");
    let node = &mut cluster.nodes[0];
    let command = Placement::in_cgroup(&node.cgroup.join("watcher"))
        .in_netns(&node.netns)
        .command(&["python3", "-c", RESOLVER, ADDRESS]);
    let resolver = Process::spawn("resolver", command, &log);
    wait_for("the resolver", || fs::read_to_string(&log).is_ok_and(|log| log.contains("bound")));
    node.start_watcher(&cgroup2, &bpffs, &["--detach", "--dns-capture", "--dns-resolver", ADDRESS]);
    // Nobody is there: what is forwarded goes to the resolver that the application asked.
    let environment = [("ISTIO_META_DNS_CAPTURE", "true"), ("DNS_UPSTREAM", "192.0.2.99")];
    node.tunnel = Some(node.spawn_tunnel(&mesh, &ca, &environment));
    node.wait_tunnel_ready();
    let netns = node.netns.alias();
    cluster.keep(resolver);

    let resolv_conf = cluster.dir.path().join("resolv.conf");
    let words = format!("nameserver {ADDRESS}\nsearch demo.svc.cluster.local\noptions ndots:5 timeout:10\n");
    fs::write(&resolv_conf, words).expect("write");
    let resolv_conf = resolv_conf.to_str().expect("UTF-8 path");

    wait_for("the pod's queries to be captured", || {
        (dig(&client, "web.demo.svc.cluster.local", &[]) == WEB_V4).then_some(())
    });
    assert_eq!(dig(&client, "web.demo.svc.cluster.local", &["+tcp"]), WEB_V4);
    assert_eq!(lookup(&client, resolv_conf, "web"), WEB_V4);
    assert_eq!(lookup(&client, resolv_conf, "www.example.org"), "192.0.2.7");
    assert_eq!(dig(&client, "www.example.org", &[]), "192.0.2.7");
    assert_eq!(dig(&plain, "web.demo.svc.cluster.local", &[]), "192.0.2.7", "not enrolled, not captured");
    let (_, metrics) = netns.curl("http://127.0.0.1:15020/metrics");
    let counted = |line: &&str| {
        line.starts_with("istio_dns_upstream_requests_total") && line.contains("canonical_service=\"client\"")
    };
    assert!(metrics.lines().any(|line| counted(&line)), "{metrics}");

    cluster.nodes[0].tunnel.take().expect("a tunnel").kill();
    assert_eq!(lookup(&client, resolv_conf, "web"), "192.0.2.7", "the resolver itself answers");
}
