//! Pods with more than one interface, with addresses that the API does not tell, and programs that
//! choose an interface: all of it works as without the mesh, and through the tunnel.

use testbed::{
    cluster::{Cluster, Enrol},
    wait::wait_for,
};

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
    let serves = server.spawn("server", &["python3", "-c", SERVER], &log);
    cluster.keep(serves);
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
