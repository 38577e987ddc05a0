//! Pods and nodes made of network namespaces, a node agent, and the real tunnel between them.
//!
//! Capture is by nftables in the pods' netns, as Istio's CNI does it: so these tests hold for that pairing,
//! and need no kernel programs. Everything is removed on drop.
#![allow(dead_code, reason = "each test file uses its own part")]

pub mod agent;
pub mod resolver;
pub mod tunnel;

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use ztunnel::socket::{Netns, Options};

pub use agent::FakeAgent;
pub use tunnel::Tunnel;

/// Long enough for a loaded machine; nothing waits for it when all is well.
pub const LIMIT: Duration = Duration::from_secs(20);

pub fn run(line: &str) {
    let output = Command::new("sh").args(["-ec", line]).output().expect("sh");
    assert!(output.status.success(), "{line}\n{}", String::from_utf8_lossy(&output.stderr));
}

/// Waits until `condition` gives something.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "gave up waiting for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A named netns, deleted on drop.
pub struct Space {
    pub name: String,
    pub netns: Netns,
    /// Whether this is the one that deletes it.
    owned: bool,
}

impl Space {
    fn new(name: String) -> Self {
        run(&format!("ip netns add {name}; ip -n {name} link set lo up"));
        let netns = Netns::new(open(&name)).expect("netns");
        Self { name, netns, owned: true }
    }

    /// The same, for somebody else.
    pub fn alias(&self) -> Self {
        let netns = Netns::new(self.fd()).expect("netns");
        Self { name: self.name.clone(), netns, owned: false }
    }

    pub fn fd(&self) -> OwnedFd {
        open(&self.name)
    }

    pub fn run(&self, line: &str) {
        run(&format!("nsenter --net=/run/netns/{} sh -ec '{line}'", self.name));
    }

    pub fn output(&self, program: &str, arguments: &[&str]) -> String {
        let netns = format!("--net=/run/netns/{}", self.name);
        let output = Command::new("nsenter").arg(netns).arg(program).args(arguments).output().expect(program);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub fn try_connect(&self, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let to = to.into();
        let stream = self.netns.enter(|| TcpStream::connect_timeout(&to, LIMIT))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(stream)
    }

    pub fn connect(&self, to: impl Into<SocketAddr>) -> TcpStream {
        self.try_connect(to).expect("connect")
    }

    /// Accepts connections for ever, each in a thread of its own. The socket, and so the thread, ends with the
    /// test process.
    pub fn serve(&self, port: u16, each: impl Fn(TcpStream, IpAddr) + Send + Clone + 'static) {
        let listener = self.netns.enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))).expect("listen");
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (each, peer) = (each.clone(), stream.peer_addr());
                thread::spawn(move || peer.map(|peer| each(stream, peer.ip().to_canonical())));
            }
        });
    }

    /// How a connection that must come to nothing ends: the reset may be there before connect(2) looks.
    pub fn refusal(&self, to: impl Into<SocketAddr>) -> io::ErrorKind {
        match self.try_connect(to).and_then(|mut stream| stream.read_exact(&mut [0])) {
            Ok(()) => panic!("served"),
            Err(error) => error.kind(),
        }
    }

    /// The answer to an HTTP/1.0 request.
    pub fn http(&self, method: &str, to: impl Into<SocketAddr>, path: &str) -> io::Result<String> {
        let mut stream = self.try_connect(to)?;
        write!(stream, "{method} {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if self.owned {
            let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
        }
    }
}

fn open(name: &str) -> OwnedFd {
    File::open(format!("/run/netns/{name}")).expect("netns").into()
}

pub struct Pod {
    pub space: Space,
    pub name: String,
    pub ip: Ipv4Addr,
    pub ip6: Ipv6Addr,
    enrolled: bool,
    node: String,
}

impl Pod {
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.ip, port).into()
    }

    pub fn serve(&self, port: u16, each: impl Fn(TcpStream, IpAddr) + Send + Clone + 'static) {
        self.space.serve(port, each);
    }

    /// Sends every byte back twice, after the client's address in a line of its own.
    pub fn serve_double_echo(&self, port: u16) {
        self.serve(port, |mut stream, peer| {
            let mut buffer = [0; 16 << 10];
            if writeln!(stream, "{peer}").is_err() {
                return;
            }
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..n].repeat(2)).is_err() {
                    return;
                }
            }
        });
    }
}

/// The bytes until the end; an error if there was a reset.
pub fn read_all(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).map(|_| all)
}

pub fn read_line(stream: &mut TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            return String::from_utf8(line).map_err(io::Error::other);
        }
        line.push(byte[0]);
    }
}

/// Two nodes, pods on one network, and what the tunnels are told of them.
pub struct Bed {
    id: String,
    /// Between the pods; outside the mesh.
    pub router: Space,
    pods: u8,
    workloads: String,
    pub services: String,
    pub policies: String,
    pub dir: tempfile::TempDir,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Bed {
    pub fn new() -> Self {
        let id = format!("zt{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let router = Space::new(format!("{id}r"));
        router.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let dir = tempfile::Builder::new().prefix(&id).tempdir().expect("temporary folder");
        let bed = Self {
            id,
            router,
            pods: 0,
            workloads: String::new(),
            services: String::new(),
            policies: String::new(),
            dir,
        };
        bed.publish();
        bed
    }

    /// A pod whose traffic is captured.
    pub fn enrolled(&mut self, node: &str, name: &str) -> Pod {
        let pod = self.pod(node, name, true);
        // As Istio's CNI prepares a pod: redirects, from which the tunnel's mark is exempt, and what brings the
        // application's answers to the tunnel although they go to the client's address.
        pod.space.run(
            "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.lo.route_localnet=1; \
             \
             for f in -4 -6; do ip $f rule add fwmark 0x111/0xfff lookup 100; \
             ip $f route add local default dev lo table 100; done",
        );
        let rules = "table inet capture {
            chain note {
                type filter hook prerouting priority mangle
                meta mark & 0xfff == 0x539 ct mark set 0x111
            }
            chain answer {
                type route hook output priority mangle
                ct mark & 0xfff == 0x111 meta mark set ct mark
            }
            chain out {
                type nat hook output priority -100
                meta l4proto tcp meta mark != 0x539 fib daddr type != local redirect to :15001
            }
            chain in {
                type nat hook prerouting priority -100
                iifname != \"lo\" tcp dport != 15008 meta l4proto tcp redirect to :15006
            }
        }";
        let file = self.dir.path().join("capture.nft");
        fs::write(&file, rules).expect("write");
        pod.space.run(&format!("nft -f {}", file.display()));
        pod
    }

    /// A pod prepared as our watcher does it. In place of its kernel programs, which know the tunnel's flows by
    /// cgroup, the redirects leave 15008 and the last hop alone.
    pub fn prepared_by_watcher(&mut self, node: &str, name: &str) -> Pod {
        let pod = self.pod(node, name, true);
        pod.space.run(
            "sysctl -qw net.ipv4.tcp_fwmark_accept=1 net.ipv4.fwmark_reflect=1 net.ipv6.fwmark_reflect=1 net.ipv4.conf.all.rp_filter=0; \
             \
             for f in -4 -6; do ip $f rule add fwmark 0x539 lookup 1337; \
             ip $f route add local default dev lo table 1337; done",
        );
        let rules = "table inet capture {
            chain out {
                type nat hook output priority -100
                tcp dport != 15008 fib daddr type != local redirect to :15001
            }
            chain in {
                type nat hook prerouting priority -100
                iifname != \"lo\" tcp dport != 15008 meta l4proto tcp redirect to :15006
            }
        }";
        let file = self.dir.path().join("capture.nft");
        fs::write(&file, rules).expect("write");
        pod.space.run(&format!("nft -f {}", file.display()));
        pod
    }

    /// Redirects what `pod` asks port 53 of anybody to the tunnel, as Istio's CNI does it.
    pub fn capture_names(&self, pod: &Pod) {
        let rules = "table inet names {
            chain out {
                type nat hook output priority -101
                meta mark != 0x539 udp dport 53 redirect to :15053
                meta mark != 0x539 tcp dport 53 redirect to :15053
            }
        }";
        let file = self.dir.path().join("names.nft");
        fs::write(&file, rules).expect("write");
        pod.space.run(&format!("nft -f {}", file.display()));
    }

    /// A pod that speaks HBONE itself, such as the tunnel's own: nobody captures it.
    pub fn own(&mut self, node: &str, name: &str) -> Pod {
        self.pod(node, name, true)
    }

    /// A pod that nobody captures.
    pub fn plain(&mut self, node: &str, name: &str) -> Pod {
        self.pod(node, name, false)
    }

    fn pod(&mut self, node: &str, name: &str, enrolled: bool) -> Pod {
        self.pods += 1;
        let ip = Ipv4Addr::new(10, 77, 0, self.pods);
        let ip6 = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, self.pods.into());
        let space = Space::new(format!("{}p{}", self.id, self.pods));
        let (pod, router, link) = (&space.name, &self.router.name, format!("p{}", self.pods));
        run(&format!(
            "ip link add {link} netns {router} type veth peer name eth0 netns {pod}; \
             ip -n {router} addr add 169.254.1.1/32 dev {link}; ip -n {router} link set {link} up; \
             ip -n {pod} addr add {ip}/32 dev eth0; ip -n {pod} link set eth0 up; \
             ip -n {pod} route add 169.254.1.1 dev eth0; ip -n {pod} route add default via 169.254.1.1; \
             ip -n {router} route add {ip} dev {link}; \
             ip -n {router} addr add fd77::ffff/128 dev {link} nodad; ip -n {pod} addr add {ip6}/128 dev eth0 nodad; \
             ip -n {pod} route add fd77::ffff dev eth0; ip -n {pod} route add default via fd77::ffff; \
             ip -n {router} route add {ip6} dev {link}"
        ));
        let protocol = if enrolled { "HBONE" } else { "TCP" };
        let _ = write!(
            self.workloads,
            "- uid: Kubernetes//Pod/demo/{name}\n  name: {name}\n  namespace: demo\n  serviceAccount: {name}\n  \
             workloadIps: [\"{ip}\", \"{ip6}\"]\n  protocol: {protocol}\n  node: {node}\n  canonicalName: {name}\n  \
             canonicalRevision: v1\n  workloadName: {name}\n  workloadType: deployment\n  clusterId: Kubernetes\n"
        );
        self.publish();
        Pod { space, name: name.to_owned(), ip, ip6, enrolled, node: node.to_owned() }
    }

    /// More lines of the workload that was made last.
    pub fn add_to_last_workload(&mut self, lines: &str) {
        self.workloads.push_str(lines);
        self.publish();
    }

    /// Writes what the tunnels are told.
    pub fn publish(&self) {
        let list = |items: &str| if items.is_empty() { " []\n".to_owned() } else { format!("\n{items}") };
        let text = format!(
            "workloads:{}services:{}policies:{}",
            list(&self.workloads),
            list(&self.services),
            list(&self.policies)
        );
        let next = self.dir.path().join("mesh.next");
        fs::write(&next, text).expect("write");
        fs::rename(next, self.mesh_file()).expect("rename");
    }

    pub fn mesh_file(&self) -> PathBuf {
        self.dir.path().join("mesh.yaml")
    }

    /// The development CA that all nodes share.
    pub fn ca_dir(&self) -> PathBuf {
        self.dir.path().join("ca")
    }

    /// A node with its agent and tunnel, serving `pods`.
    pub fn node(&self, name: &str, pods: &[&Pod]) -> Tunnel {
        self.node_with(name, pods, &[])
    }

    /// The same, with more variables of its environment.
    pub fn node_with(&self, name: &str, pods: &[&Pod], more: &[(&str, &str)]) -> Tunnel {
        let mut tunnel = Tunnel::start_with(self, name, self.space(name), more);
        for pod in pods {
            assert_eq!(tunnel.agent().add(pod), "", "the tunnel refuses {}", pod.name);
        }
        assert_eq!(tunnel.agent().snapshot(), "");
        tunnel.wait_ready();
        tunnel
    }

    pub fn node_without_pods(&self, name: &str) -> Tunnel {
        Tunnel::start(self, name, self.space(name))
    }

    /// For a node's tunnel to live in.
    pub fn space(&self, node: &str) -> Space {
        Space::new(format!("{}n{node}{}", self.id, COUNT.fetch_add(1, Ordering::Relaxed)))
    }
}

/// Sockets of a test that should look like the tunnel's own.
pub fn marked() -> Options {
    Options { mark: 1337, ..Options::default() }
}
