//! Pods of one node, which the tunnel connects to each other without HBONE: what anybody can see is as if
//! there were a tunnel between them, and what may not pass through one does not pass.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    time::{Duration, Instant},
};

use serde_json::Value;
use testbed::{
    mesh_pod::{MeshPod, read_all, read_line},
    tunnel_mesh::{TunnelMesh, TunnelNode},
    wait::wait_for,
};

const PORT: u16 = 8080;
const NOBODY: u16 = 8081;
/// The time within which the tunnel notices that a pod was deleted, and some more.
const NOTICED: Duration = Duration::from_secs(20);

/// A client, a client that no policy allows, and a server, all of one node.
struct Rig {
    node: TunnelNode,
    client: MeshPod,
    other: MeshPod,
    server: MeshPod,
    mesh: TunnelMesh,
}

impl Rig {
    fn new(direct: bool) -> Self {
        Self::with(direct, &[])
    }

    fn with(direct: bool, variables: &[(&str, &str)]) -> Self {
        let mut mesh = TunnelMesh::new();
        let [client, other, server] = ["client", "other", "server"].map(|name| mesh.enrolled("a", name));
        server.serve_double_echo(PORT);
        let direct = ("SAME_NODE_DIRECT", if direct { "true" } else { "false" });
        let variables = [&[direct], variables].concat();
        let node = mesh.node_with("a", &[&client, &other, &server], &variables);
        Self { node, client, other, server, mesh }
    }

    fn connect(&self) -> std::net::TcpStream {
        let mut stream = self.client.netns.connect(self.server.at(PORT));
        assert_eq!(read_line(&mut stream).expect("greeting"), self.client.ip.to_string());
        stream
    }

    fn allow(&mut self, account: &str) {
        self.mesh.policies = format!(
            "- name: one\n  namespace: demo\n  scope: Namespace\n  action: Allow\n  \
             rules: [[[{{principals: [cluster.local/ns/demo/sa/{account}]}}]]]\n"
        );
        self.mesh.publish();
    }
}

/// A record without what differs from one connection to the next.
fn comparable(record: &Value) -> Value {
    let mut record = record.clone();
    let fields = record.as_object_mut().expect("fields");
    for changing in ["time", "duration", "timestamp"] {
        fields.remove(changing);
    }
    // The client's port, or that of a tunnel.
    if let Some(from) = fields.get_mut("src.addr") {
        let address = from.as_str().and_then(|from| from.rsplit_once(':')).expect("an address").0.to_owned();
        *from = Value::from(address);
    }
    record
}

/// What is recorded of connections that pass, that nobody listens for, that policy refuses, and that a
/// change of it ends.
fn story(direct: bool) -> Vec<Value> {
    let mut rig = Rig::new(direct);
    let mut stream = rig.connect();
    stream.write_all(b"hello").expect("write");
    stream.read_exact(&mut [0; 10]).expect("the echo");
    drop(stream);
    assert_eq!(rig.client.netns.refusal(rig.server.at(NOBODY)), ErrorKind::ConnectionReset);
    rig.allow("client");
    wait_for("policy to refuse the other client", || {
        let mut stream = rig.other.netns.try_connect(rig.server.at(PORT)).ok()?;
        read_all(&mut stream).is_err().then_some(())
    });
    let mut open = rig.connect();
    rig.allow("nobody");
    assert_eq!(open.read_exact(&mut [0]).expect_err("cut").kind(), ErrorKind::ConnectionReset);
    let mut all = Vec::new();
    for direction in ["outbound", "inbound"] {
        let direction = format!("\"direction\":\"{direction}\"");
        for about in [
            &["\"bytes_sent\":5"][..],
            &[":8081", "\"reason\""],
            &["/sa/other", "\"reason\""],
            &["/sa/client", "\"reason\"", ":8080"],
        ] {
            let parts: Vec<&str> = about.iter().copied().chain([direction.as_str()]).collect();
            all.extend(rig.node.records(1, &parts).first().map(comparable));
        }
    }
    all
}

#[test]
#[ignore = "needs root: make test"]
fn records_are_those_of_a_tunnel() {
    let (direct, through_a_tunnel) = (story(true), story(false));
    assert_eq!(direct.len(), 8);
    for (one, other) in direct.iter().zip(&through_a_tunnel) {
        assert_eq!(one, other);
    }
}

/// Between their netns, as a CNI plugin does it by a NetworkPolicy.
#[test]
#[ignore = "needs root: make test"]
fn who_decides_about_packets_decides_about_pods_of_one_node_too() {
    // Each worker has tunnels of its own.
    let rig = Rig::with(true, &[("ZTUNNEL_WORKER_THREADS", "1")]);
    let forward = |rule: &str| {
        let rules = format!(
            "add table inet np; delete table inet np;
             table inet np {{ chain forward {{ type filter hook forward priority 0\n{rule}\n}}\n}}"
        );
        let file = rig.mesh.dir.path().join("np.nft");
        fs::write(&file, rules).expect("write");
        rig.mesh.router.run(&format!("nft -f {}", file.display()));
    };
    forward("tcp dport 15008 reject with tcp reset");
    assert_eq!(rig.client.netns.refusal(rig.server.at(PORT)), ErrorKind::ConnectionReset);
    forward("");
    rig.connect();
    // What is direct needs nobody between them. That nobody is there shows a little later.
    let (client, server) = (rig.client.ip, rig.server.ip);
    forward(&format!("ip saddr {{ {client}, {server} }} drop"));
    rig.connect();
    wait_for("connections to be refused", || {
        let mut stream = rig.client.netns.try_connect(rig.server.at(PORT)).ok()?;
        read_line(&mut stream).is_err().then_some(())
    });
    forward("");
    wait_for("connections to pass", || {
        let mut stream = rig.client.netns.try_connect(rig.server.at(PORT)).ok()?;
        read_line(&mut stream).ok()
    });
}

#[test]
#[ignore = "needs root: make test"]
fn a_client_is_not_taken_for_who_has_the_address_that_it_chose() {
    let rig = Rig::new(true);
    let chosen = "10.9.9.9";
    rig.client.netns.run(&format!("ip addr add {chosen}/32 dev eth0"));
    let server = rig.server.at(PORT);
    let mut stream = rig.client.netns.enter(|| {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket");
        socket
            .bind(&format!("{chosen}:0").parse::<std::net::SocketAddr>().expect("address").into())
            .expect("bind");
        socket.connect(&server.into()).expect("connect");
        std::net::TcpStream::from(socket)
    });
    stream.set_read_timeout(Some(testbed::wait::LIMIT)).expect("a limit");
    assert_eq!(read_line(&mut stream).expect("greeting"), rig.client.ip.to_string());
}

/// The mesh may be behind. A tunnel would meet another certificate there.
#[test]
#[ignore = "needs root: make test"]
fn nothing_goes_to_who_has_the_address_of_a_pod_that_has_it_no_more() {
    // From the client's address the thief would not be answered.
    let mut rig = Rig::with(true, &[("ENABLE_ORIG_SRC", "false")]);
    let thief = rig.mesh.plain("a", "thief");
    let (heard, hear) = std::sync::mpsc::channel();
    thief.serve(PORT, move |mut stream, _| {
        let _ = heard.send(stream.read(&mut [0; 10]));
    });
    let (router, ip) = (rig.mesh.router.name(), rig.server.ip);
    rig.server.netns.run(&format!("ip addr add 10.77.0.99/32 dev eth0; ip addr del {ip}/32 dev eth0"));
    let was = ip.octets()[3];
    testbed::command::run(&format!("ip -n {router} route add 10.77.0.99 dev p{was}"));
    thief.netns.run(&format!("ip addr add {ip}/32 dev eth0"));
    let link = thief.ip.octets()[3];
    testbed::command::run(&format!("ip -n {router} route replace {ip} dev p{link}"));
    if let Ok(mut stream) = rig.client.netns.try_connect((ip, PORT)) {
        // Whichever call finds the reset, the one after it does not.
        let answer = stream.write_all(b"a secret").and_then(|()| read_all(&mut stream));
        assert!(answer.is_err(), "nobody is who is asked for");
    }
    rig.node.records(1, &["\"direction\":\"outbound\"", "\"reason\""]);
    assert!(hear.try_recv().is_err(), "what was said reached somebody else");
}

#[test]
#[ignore = "needs root: make test"]
fn a_pod_that_left_keeps_its_connections_until_it_is_deleted() {
    let mut rig = Rig::new(true);
    let mut stream = rig.connect();
    assert_eq!(rig.node.agent().delete("server"), "");
    let left = Instant::now();
    while left.elapsed() < Duration::from_secs(1) {
        stream.write_all(b"still here").expect("write");
        stream.read_exact(&mut [0; 20]).expect("the echo");
    }
    rig.server.netns.run("ip link del eth0");
    let deleted = Instant::now();
    assert_eq!(read_all(&mut stream).expect_err("cut").kind(), ErrorKind::ConnectionReset);
    assert!(deleted.elapsed() < NOTICED, "after {:?}", deleted.elapsed());
    for direction in ["outbound", "inbound"] {
        rig.node.records(1, &[&format!("\"direction\":\"{direction}\""), "\"reason\""]);
    }
    wait_for("the netns to be let go", || {
        let held = fs::read_dir(format!("/proc/{}/fd", rig.node.pid())).expect("descriptors");
        let inode = format!("net:[{}]", rig.server.netns.inode());
        let links = held.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
        (!links.into_iter().any(|link| link.to_string_lossy() == inode)).then_some(())
    });
}
