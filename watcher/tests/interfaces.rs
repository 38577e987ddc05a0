//! Pods with more than one interface, with addresses that the API does not tell, and programs that
//! choose an interface: all of it works as without the mesh, and through the tunnel.

use testbed::{
    cluster::{Cluster, ClusterPod, Enrol},
    command::run,
    wait::{LIMIT, try_wait, wait_for},
};

use crate::capture::{addresses, entry, publish_entries, wait_for_state};

/// An address that is on no link: who has it is found by routes only.
const FAR: &str = "198.51.100.7";
const FAR_V6: &str = "2001:db8:7::7";

/// GETs `url` as `interface`, which curl takes for a device, an address or both.
fn curl_as(pod: &ClusterPod, interface: &str, url: &str) -> Result<String, String> {
    let output = pod.exec(&["curl", "-sS", "-m", "5", "--interface", interface, url]);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// Waits until the tunnel of node `a` recorded a connection to `to`.
fn assert_recorded(cluster: &Cluster, to: &str) {
    let recorded = || cluster.nodes[0].access_log().iter().any(|line| line.contains(to));
    let story = || format!("no record of {to}: {:#?}", cluster.nodes[0].access_log());
    assert!(try_wait(LIMIT, recorded).is_some(), "{}", story());
}

/// Its answers leave by that device only.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn an_application_that_listens_on_a_device_is_reached_through_the_tunnel() {
    const SERVER: &str = "
import socket
s = socket.socket(socket.AF_INET6)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0')
s.bind(('::', 8080))
s.listen()
while True:
    c, a = s.accept()
    c.recv(4096)
    peer = a[0].removeprefix('::ffff:')
    c.sendall(f'HTTP/1.0 200 OK\\r\\n\\r\\nhello, client {peer}\\n'.encode())
    c.close()
";
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let far = cluster.pod("far", 0, Enrol::Plain);
    let server = cluster.pod("server", 1, Enrol::Mesh);
    let log = cluster.dir.path().join("server.log");
    let process = server.spawn("server", &["python3", "-c", SERVER], &log);
    cluster.keep(process);
    let urls = [format!("http://{}:8080/", server.v4), format!("http://[{}]:8080/", server.v6)];
    for url in &urls {
        wait_for("the server without a mesh", || far.curl(url).ok());
    }
    cluster.start();
    for client in [&client, &far] {
        for (url, own) in urls.iter().zip([&client.v4, &client.v6]) {
            let reply = client.curl(url);
            assert_eq!(reply.as_deref(), Ok(&*format!("hello, client {own}\n")), "{} {url}", client.name);
        }
    }
    let records = || cluster.nodes[1].access_log().iter().filter(|line| line.contains("inbound")).count();
    wait_for("a record of each connection", || records() == 4);
}

/// A second interface, as Multus adds: with routes by source address.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_client_that_chose_its_source_keeps_it() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let near = cluster.pod("near", 0, Enrol::Plain);
    cluster.serve_web(&near, "hello");
    run(&format!(
        "ip -n {near} link add net1 type veth peer name net1 netns {client}
         ip -n {near} addr add 192.168.9.1/24 dev net1
         ip -n {near} addr add fd19::1/64 dev net1 nodad
         ip -n {near} addr add {FAR}/32 dev net1
         ip -n {near} addr add {FAR_V6}/128 dev net1 nodad
         ip -n {client} addr add 192.168.9.2/24 dev net1
         ip -n {client} addr add fd19::2/64 dev net1 nodad
         ip -n {near} link set net1 up
         ip -n {client} link set net1 up
         ip -n {client} rule add from 192.168.9.2 lookup 200
         ip -n {client} -6 rule add from fd19::2 lookup 200
         ip -n {client} route add default via 192.168.9.1 dev net1 table 200
         ip -n {client} -6 route add default via fd19::1 dev net1 table 200",
        near = near.netns,
        client = client.netns,
    ));
    let cases = [
        ("host!192.168.9.2", format!("http://{FAR}:8080/"), "192.168.9.2"),
        ("host!fd19::2", format!("http://[{FAR_V6}]:8080/"), "fd19::2"),
    ];
    for (interface, url, own) in &cases {
        let reply = curl_as(&client, interface, url);
        assert_eq!(reply.as_deref(), Ok(&*format!("hello, client {own}")), "without a mesh");
    }
    cluster.publish();
    cluster.start();
    publish_entries(&cluster, 0, &[entry(&client, &addresses(&[&client.v4, &client.v6]))]);
    wait_for_state(&cluster, 0, "client", ("open", ""));
    for (interface, url, own) in &cases {
        let reply = curl_as(&client, interface, url);
        assert_eq!(reply.as_deref(), Ok(&*format!("hello, client {own}")), "{interface} {url}");
    }
    assert_recorded(&cluster, FAR);
    assert_recorded(&cluster, FAR_V6);
}

/// An IPv6 cluster whose network plugin gives pods an IPv4 address for what is outside of it.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn an_address_that_the_api_does_not_tell_carries_the_pods_connections() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let near = cluster.pod("near", 0, Enrol::Plain);
    cluster.serve_web(&near, "hello");
    run(&format!(
        "ip -n {near} addr add 169.254.172.1/22 dev eth0
         ip -n {near} addr add {FAR}/32 dev eth0
         ip -n {client} addr del {v4}/24 dev eth0
         ip -n {client} addr add 169.254.172.10/22 dev eth0
         ip -n {client} route add default via 169.254.172.1",
        near = near.netns,
        client = client.netns,
        v4 = client.v4,
    ));
    let url = format!("http://{FAR}:8080/");
    assert_eq!(client.curl(&url).as_deref(), Ok("hello, client 169.254.172.10\n"), "without a mesh");
    cluster.publish();
    publish_entries(&cluster, 0, &[entry(&client, &addresses(&[&client.v6]))]);
    crate::capture::start_node(&mut cluster, 0);
    wait_for_state(&cluster, 0, "client", ("open", ""));
    assert_eq!(client.curl(&url).as_deref(), Ok("hello, client 169.254.172.10\n"));
    assert_recorded(&cluster, FAR);
}
