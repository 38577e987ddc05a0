//! Pods and nodes made of network namespaces, a fake node agent, and the real tunnel between them.
//!
//! nftables in the netns of the pods capture their traffic, as Istio's CNI plugin does. So these
//! tests cover that pairing and need no kernel programs. Everything is removed on drop.

mod tunnel;

use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

pub use self::tunnel::{TunnelNode, local};

use crate::{command::run, mesh_pod::MeshPod, netns::TestNetns};

/// The mark of the tunnel's own sockets, which the capture leaves alone.
pub const TUNNEL_MARK: u32 = 1337;

/// Pods on one network, and the mesh file that the tunnels read.
#[derive(Debug)]
pub struct TunnelMesh {
    id: String,
    /// The router between the pods, outside the mesh.
    pub router: TestNetns,
    pods: u8,
    workloads: String,
    /// `services:` of the mesh file, as YAML.
    pub services: String,
    /// `policies:` of the mesh file, as YAML.
    pub policies: String,
    /// For its files.
    pub dir: tempfile::TempDir,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl TunnelMesh {
    /// A network without pods.
    pub fn new() -> Self {
        let id = format!("zt{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let router = TestNetns::new(format!("{id}r"));
        router.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let dir = tempfile::Builder::new().prefix(&id).tempdir().expect("temporary folder");
        let mesh = Self {
            id,
            router,
            pods: 0,
            workloads: String::new(),
            services: String::new(),
            policies: String::new(),
            dir,
        };
        mesh.publish();
        mesh
    }

    /// A pod whose traffic is captured.
    pub fn enrolled(&mut self, node: &str, name: &str) -> MeshPod {
        let pod = self.pod(node, name, true);
        // As Istio's CNI prepares a pod: redirects, from which the tunnel's mark is exempt, and
        // what brings the application's answers to the tunnel although they go to the client's
        // address.
        pod.netns.run(
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
        pod.netns.run(&format!("nft -f {}", file.display()));
        pod
    }

    /// A pod that is prepared as by our watcher. Its kernel programs know the tunnel's flows by
    /// cgroup; here the redirects leave 15008 and the last hop alone instead.
    pub fn prepared_by_watcher(&mut self, node: &str, name: &str) -> MeshPod {
        let pod = self.pod(node, name, true);
        pod.netns.run(
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
        pod.netns.run(&format!("nft -f {}", file.display()));
        pod
    }

    /// Redirects the DNS queries of `pod` to the tunnel, as Istio's CNI plugin does.
    pub fn capture_dns(&self, pod: &MeshPod) {
        let rules = "table inet dns {
            chain out {
                type nat hook output priority -101
                meta mark != 0x539 udp dport 53 redirect to :15053
                meta mark != 0x539 tcp dport 53 redirect to :15053
            }
        }";
        let file = self.dir.path().join("dns.nft");
        fs::write(&file, rules).expect("write");
        pod.netns.run(&format!("nft -f {}", file.display()));
    }

    /// A pod that speaks HBONE itself, such as the tunnel's own. It is not captured.
    pub fn own(&mut self, node: &str, name: &str) -> MeshPod {
        self.pod(node, name, true)
    }

    /// A pod that is not captured.
    pub fn plain(&mut self, node: &str, name: &str) -> MeshPod {
        self.pod(node, name, false)
    }

    fn pod(&mut self, node: &str, name: &str, enrolled: bool) -> MeshPod {
        self.pods += 1;
        let ip = Ipv4Addr::new(10, 77, 0, self.pods);
        let ip6 = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, self.pods.into());
        let netns = TestNetns::new(format!("{}p{}", self.id, self.pods));
        let (pod, router, link) = (netns.name(), self.router.name(), format!("p{}", self.pods));
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
        MeshPod { netns, name: name.to_owned(), ip, ip6, node: node.to_owned() }
    }

    /// Adds lines to the workload of the last pod.
    pub fn add_to_last_workload(&mut self, lines: &str) {
        self.workloads.push_str(lines);
        self.publish();
    }

    /// Writes the mesh file.
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

    /// What the tunnels read.
    pub fn mesh_file(&self) -> PathBuf {
        self.dir.path().join("mesh.yaml")
    }

    /// The development CA that all nodes share.
    pub fn ca_dir(&self) -> PathBuf {
        self.dir.path().join("ca")
    }

    /// A node with its agent and tunnel, serving `pods`.
    pub fn node(&self, name: &str, pods: &[&MeshPod]) -> TunnelNode {
        self.node_with(name, pods, &[])
    }

    /// The same, with more variables of its environment.
    pub fn node_with(&self, name: &str, pods: &[&MeshPod], more: &[(&str, &str)]) -> TunnelNode {
        let mut tunnel = TunnelNode::start_with(self, name, self.netns(name), more);
        for pod in pods {
            assert_eq!(tunnel.agent().add(pod), "", "the tunnel refuses {}", pod.name);
        }
        assert_eq!(tunnel.agent().snapshot(), "");
        tunnel.wait_ready();
        tunnel
    }

    /// A node with its agent and tunnel, which have not exchanged a message yet.
    pub fn node_without_pods(&self, name: &str) -> TunnelNode {
        TunnelNode::start(self, name, self.netns(name))
    }

    /// A netns for the tunnel of a node.
    pub fn netns(&self, node: &str) -> TestNetns {
        TestNetns::new(format!("{}n{node}{}", self.id, COUNT.fetch_add(1, Ordering::Relaxed)))
    }
}
