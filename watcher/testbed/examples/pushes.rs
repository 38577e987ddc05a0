//! `make bench-pushes`: what the pushes of a control plane cost a tunnel because of the connections
//! that it carries.
//!
//! 10,000 connections go through real tunnels, over HBONE, to two pods that a policy protects: from
//! four nodes to one, since a tunnel leaves most of its descriptors to others than one pod.
//! The control plane pushes a workload and a policy 10 times a second, as in a mesh that never rests.
//! None of it could change what was decided about a connection, so none of it may cost anything for
//! each connection. In the last line each push changes the pods' own policy: then every connection is
//! asked again, which shows that the measurement would see it.
//!
//! `CONNECTIONS` (10000), `PUSHES` (10 a second) and `SECONDS` (20) size it.

#![expect(clippy::disallowed_methods, reason = "options of make bench-pushes")]

use std::{
    env, fs,
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    process::{ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use base64::Engine as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Map, Value, json};
use testbed::{
    fakes::FakeControlPlane,
    interrupt,
    mesh_pod::MeshPod,
    process::KillOnDrop,
    tunnel_mesh::{TunnelMesh, TunnelNode},
};

/// Other pods of the mesh.
const OTHERS: u32 = 1000;
const PORT: u16 = 8080;
const CLIENTS: usize = 4;
const SERVERS: usize = 2;

/// What the control plane changes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pushed {
    Nothing,
    /// A workload, and a policy of another namespace.
    Elsewhere,
    /// A workload, and the policy of the pods.
    OwnPolicy,
}

fn main() -> ExitCode {
    if let Some(address) = env::args().nth(1) {
        return keep_all(&address);
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("The benchmark makes network namespaces: run it as root.");
        return ExitCode::FAILURE;
    }
    interrupt::watch();
    let number = |name: &str, default: u32| {
        env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
    };
    let (count, pushes, seconds) =
        (number("CONNECTIONS", 10_000), number("PUSHES", 10), number("SECONDS", 20));
    // Of this process, which has one end of each connection. No other one has more.
    let needed = u64::from(count) * 3 / 2 + 1000;
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard.max(needed), hard.max(needed)) {
        eprintln!("{count} connections need {needed} open files: {error}");
        return ExitCode::FAILURE;
    }

    let mut measured = Measured::new();
    println!(
        "{count} connections over HBONE to two pods; {pushes} pushes a second, each with a workload and"
    );
    println!(
        "a policy; a mesh of {OTHERS} pods. Processor time of the server's tunnel, % of a core, {seconds} s each\n"
    );
    let (mut connections, mut pushed_to) = (Vec::new(), Vec::new());
    for (what, connected, pushed) in [
        ("no connections, no pushes", 0, Pushed::Nothing),
        ("no connections, pushes", 0, Pushed::Elsewhere),
        ("connections, no pushes", count, Pushed::Nothing),
        ("connections, pushes", count, Pushed::Elsewhere),
        ("connections, pushes of their pods' own policy", count, Pushed::OwnPolicy),
    ] {
        if connections.is_empty() && connected > 0 {
            connections = measured.connect(connected);
        }
        let Some(share) = measured.processor(pushed, pushes, seconds) else {
            println!("\nInterrupted. Removed everything it made.");
            return ExitCode::from(130);
        };
        println!("{what:<46}{:>6.2} %", share * 100.0);
        if pushed == Pushed::Elsewhere {
            pushed_to.push(share);
        }
    }
    if let [none, all] = *pushed_to {
        println!("\nwith pushes, the connections cost {:.2} % of a core", (all - none) * 100.0);
    }
    let open = connections.iter().filter(|connection| is_open(connection)).count();
    println!(
        "{open} of {count} connections are open; the server's tunnel has {} open files",
        measured.files()
    );
    ExitCode::SUCCESS
}

struct Measured {
    clients: Vec<MeshPod>,
    servers: Vec<MeshPod>,
    control: FakeControlPlane,
    _client_nodes: Vec<TunnelNode>,
    server_node: TunnelNode,
    /// Versions of what is pushed.
    version: u32,
    _applications: Vec<KillOnDrop>,
    _mesh: TunnelMesh,
}

impl Measured {
    fn new() -> Self {
        let mut mesh = TunnelMesh::new();
        let clients: Vec<_> =
            (0..CLIENTS).map(|n| mesh.enrolled(&format!("client-{n}"), &format!("client-{n}"))).collect();
        let servers: Vec<_> = (0..SERVERS).map(|n| mesh.enrolled("b", &format!("server-{n}"))).collect();
        let applications = servers.iter().map(application).collect();
        let quiet = ("RUST_LOG", "warn");
        let client_nodes =
            clients.iter().map(|client| mesh.node_with(&client.name, &[client], &[quiet])).collect();

        let netns = mesh.netns("b");
        let mut control = FakeControlPlane::start(mesh.dir.path(), &netns, 0);
        let mut workloads: Map<String, Value> = (0..OTHERS).map(|number| other(number, 0)).collect();
        for pod in clients.iter().chain(&servers) {
            let node = if pod.name.starts_with("server") { "b" } else { &pod.name };
            workloads.insert(uid(&pod.name), workload(&pod.name, node, pod.ip.octets(), 0));
        }
        control.send(&json!({"hold": "address", "set": workloads}));
        let policies = json!({"demo/own": own_policy(0), "other/policy": other_policy(0)});
        control.send(&json!({"hold": "authorization", "set": policies}));
        let address = format!("https://localhost:{}", control.port);
        let root = mesh.dir.path().join("xds-root.pem").display().to_string();
        let variables = [("LOCAL_XDS_PATH", ""), ("XDS_ADDRESS", &address), ("XDS_ROOT_CA", &root), quiet];
        let mut server_node = TunnelNode::start_with(&mesh, "b", netns, &variables);
        for server in &servers {
            assert_eq!(server_node.agent().add(server), "");
        }
        assert_eq!(server_node.agent().snapshot(), "");
        server_node.wait_ready();
        Self {
            clients,
            servers,
            control,
            _client_nodes: client_nodes,
            server_node,
            version: 0,
            _applications: applications,
            _mesh: mesh,
        }
    }

    /// Each has carried a byte, and is kept at both ends.
    fn connect(&self, count: u32) -> Vec<TcpStream> {
        let connect = |to| {
            let mut stream = TcpStream::connect(to).expect("connect");
            stream.read_exact(&mut [0]).expect("a byte of the application");
            stream
        };
        let of = |(n, client): (usize, &MeshPod)| -> Vec<TcpStream> {
            let to = self.servers[n % SERVERS].at(PORT);
            let own = count as usize / CLIENTS;
            client.netns.enter(|| (0..own).map(|_| connect(to)).collect())
        };
        self.clients.iter().enumerate().flat_map(of).collect()
    }

    /// How much of a core the server's tunnel took. `None`: interrupted.
    fn processor(&mut self, pushed: Pushed, rate: u32, seconds: u32) -> Option<f64> {
        // What was before comes to its end.
        thread::sleep(Duration::from_secs(2));
        let (before, began) = (self.processor_time(), Instant::now());
        for number in 1..=rate * seconds {
            if interrupt::interrupted() {
                return None;
            }
            self.push(pushed);
            let due = Duration::from_secs(1) * number / rate;
            thread::sleep(due.saturating_sub(began.elapsed()));
        }
        let took = self.processor_time().saturating_sub(before);
        Some(took.as_secs_f64() / began.elapsed().as_secs_f64())
    }

    fn push(&mut self, pushed: Pushed) {
        self.version += 1;
        let version = self.version;
        let (name, policy) = match pushed {
            Pushed::Nothing => return,
            Pushed::Elsewhere => ("other/policy", other_policy(version)),
            Pushed::OwnPolicy => ("demo/own", own_policy(version)),
        };
        let (changed, workload) = other(version % OTHERS, version);
        self.control.send(&json!({"push": "address", "set": {changed: workload}}));
        self.control.send(&json!({"push": "authorization", "set": {name: policy}}));
        // Its acknowledgement: the tunnel has taken the policy.
        while self.control.request("authorization")["nonce"] == "" {}
    }

    /// User and system time so far (proc(5), fields 14 and 15 of `stat`; a tick is 10 ms on Linux).
    fn processor_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.server_node.pid())).expect("stat");
        // The name, in parentheses, may hold spaces.
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let ticks = fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("ticks"));
        Duration::from_millis(10 * ticks.sum::<u64>())
    }

    fn files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.server_node.pid())).map_or(0, Iterator::count)
    }
}

/// The application of a pod, once it listens: this program once more.
fn application(pod: &MeshPod) -> KillOnDrop {
    let own = env::current_exe().expect("the path of this executable");
    let mut command = pod.netns.command(own.to_str().expect("UTF-8 path"));
    command.arg(pod.at(PORT).to_string()).stdout(Stdio::piped());
    let mut child = KillOnDrop(command.spawn().expect("the application starts"));
    let said = child.0.stdout.as_mut().expect("piped").read_exact(&mut [0]);
    said.expect("the application listens");
    child
}

/// The application: sends a byte over each connection, and keeps it.
fn keep_all(address: &str) -> ExitCode {
    let listener = TcpListener::bind(address).expect("listen");
    println!();
    let mut kept = Vec::new();
    for mut stream in listener.incoming().flatten() {
        if stream.write_all(b"\n").is_ok() {
            kept.push(stream);
        }
    }
    ExitCode::SUCCESS
}

fn is_open(connection: &TcpStream) -> bool {
    connection.set_nonblocking(true).is_ok()
        && connection.peek(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

fn uid(name: &str) -> String {
    format!("Kubernetes//Pod/demo/{name}")
}

fn workload(name: &str, node: &str, ip: [u8; 4], version: u32) -> Value {
    json!([version.to_string(), {"workload": {
        "uid": uid(name), "name": name, "namespace": "demo", "tunnelProtocol": 1, "serviceAccount": name,
        "addresses": [base64::engine::general_purpose::STANDARD.encode(ip)], "node": node, "canonicalName": name,
        "canonicalRevision": format!("v{version}"), "workloadName": name, "clusterId": "Kubernetes",
    }}])
}

fn other(number: u32, version: u32) -> (String, Value) {
    let name = format!("other-{number}");
    let [.., high, low] = number.to_be_bytes();
    (uid(&name), workload(&name, "elsewhere", [10, 78, high, low], version))
}

/// Lets the clients in, by their identities. Each version has another rule besides.
fn own_policy(version: u32) -> Value {
    let clients = (0..CLIENTS).map(|n| format!("client-{n}"));
    let accounts = clients.chain([format!("v{version}")]);
    let principals: Vec<_> = accounts.map(|account| format!("cluster.local/ns/demo/sa/{account}")).collect();
    policy("own", "demo", &principals, version)
}

fn other_policy(version: u32) -> Value {
    policy("policy", "other", &[format!("cluster.local/ns/other/sa/v{version}")], version)
}

/// Of a whole namespace: those `principals` alone are allowed.
fn policy(name: &str, namespace: &str, principals: &[String], version: u32) -> Value {
    let principals: Vec<Value> = principals.iter().map(|principal| json!({"exact": principal})).collect();
    let rules = json!([{"clauses": [{"matches": [{"principals": principals}]}]}]);
    json!([version.to_string(), {"name": name, "namespace": namespace, "scope": 1, "action": 0, "rules": rules}])
}
