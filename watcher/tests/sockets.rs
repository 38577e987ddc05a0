//! What applications do with their sockets works as without a mesh.

use testbed::{
    cluster::{Cluster, Enrol},
    command::text,
};

/// `dial` returns a connected socket; its port is free again some time after it closed.
const DIAL: &str = r#"
import errno, socket, sys, time
def dial(to, source=None):
    s = socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.settimeout(20)
    if source: s.bind(("::" if ":" in to else "0.0.0.0", source))
    s.connect((to, 8080))
    return s
def ask(s):
    s.sendall(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
    answer = b""
    while chunk := s.recv(4096): answer += chunk
    return answer.decode().split("\r\n\r\n")[1].split(",")[0]
"#;

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn one_source_port_reaches_two_servers_and_ports_come_back_after_a_second() {
    let mut cluster = Cluster::new();
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let servers = ["first", "second"].map(|name| {
        let server = cluster.pod(name, 1, Enrol::Mesh);
        cluster.serve_web(&server, name);
        server
    });
    cluster.start();
    let [first, second] = &servers;
    for (first, second) in [(&first.v4, &second.v4), (&first.v6, &second.v6)] {
        let open = "a, b = dial(sys.argv[1], 43000), dial(sys.argv[2], 43000)\nprint(ask(a), ask(b))";
        let output = client.exec(&["python3", "-c", &format!("{DIAL}{open}"), first, second]);
        assert_eq!(text(&output).trim(), "first second", "{first} {second}");
    }
    // Whoever closes first keeps the port for a minute, unless it may be used again.
    let again = r#"
open("/proc/sys/net/ipv4/ip_local_port_range", "w").write("44000 44003")
done, start = 0, time.monotonic()
while done < 24 and time.monotonic() < start + 40:
    try:
        dial(sys.argv[1]).close()
        done += 1
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL: raise
        time.sleep(0.05)
print(done)
"#;
    let output = client.exec(&["python3", "-c", &format!("{DIAL}{again}"), &first.v4]);
    assert_eq!(text(&output).trim(), "24", "connections by four ports in 40 s");
}
