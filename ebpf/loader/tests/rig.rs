//! A node in small: a private bpffs, private cgroups, a pod's netns joined by veth to the rest of
//! the world.
//!
//! ```text
//! cgroups   pods/mesh/container   the enrolled pod's application      netns pod    10.99.0.1 fd99::1
//!           pods/plain            a pod that is not enrolled          netns world  10.99.0.2 fd99::2
//!           world                 another node
//!           tunnel                the node tunnel                     netns pod
//! ```

pub mod agent;
pub mod sys;

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED},
    enrolment::{CgroupInfo, NetnsInfo, PodRecord, flag},
    settings::Settings,
    trace::{Hook, Rule},
};
use adit_ebpf_loader::{Kernel, Trace};
use agent::Agent;
use testbed::{cgroup::Cgroup, mount::Mount};

pub const OUTBOUND: u16 = 15001;
pub const INBOUND: u16 = 15006;
pub const HBONE: u16 = 15008;
pub const DNS: u16 = 15053;
/// As the watcher writes it for a pod that is served.
pub const READY: u32 = flag::IN_MESH | flag::READY | flag::SPREAD;

pub struct Rig {
    // Dropped in this order: processes before the cgroups that they are in.
    pub app: Agent,
    pub plain: Agent,
    pub world: Agent,
    pub tunnel: Agent,
    pub cookie: u64,
    /// Whose queries are captured; all unspecified: everybody's.
    pub resolvers: [Address; 3],
    pub kernel: Kernel,
    pub trace: Trace,
    pub cgroups: Cgroup,
    pub bpffs: Bpffs,
}

impl Rig {
    /// Everything attached, the pod enrolled and ready, no listener yet.
    pub fn new() -> Self {
        let (cgroups, bpffs) = (cgroups(), Bpffs::new());
        let mut kernel = Kernel::open(&bpffs.pins()).unwrap();
        kernel.attach_pods(&cgroups.join("pods")).unwrap();
        kernel.attach_tunnel(&cgroups.join("tunnel")).unwrap();

        let [mut app, mut plain, mut world, mut tunnel] = [(); 4].map(|()| Agent::start());
        app.enter_cgroup(&cgroups.join("pods/mesh/container"));
        plain.enter_cgroup(&cgroups.join("pods/plain"));
        world.enter_cgroup(&cgroups.join("world"));
        tunnel.enter_cgroup(&cgroups.join("tunnel"));
        app.new_netns();
        world.new_netns();
        tunnel.enter_netns_of(&app);
        plain.enter_netns_of(&world);
        join(&app, &world);
        let cookie = app.cookie();
        let trace = kernel.trace().unwrap();
        let resolvers = [UNSPECIFIED; 3];
        let mut rig = Self { app, plain, world, tunnel, cookie, resolvers, kernel, trace, cgroups, bpffs };
        rig.set(READY, true);
        rig.steer();
        let info = CgroupInfo { flags: flag::TUNNEL, ..empty() };
        let tunnel_id = rig.cgroups.id("tunnel");
        rig.kernel.set_cgroup(tunnel_id, &info).unwrap();
        rig
    }

    /// Steers what arrives in the pod's netns.
    pub fn steer(&mut self) {
        let netns = fs::File::open(format!("/proc/{}/ns/net", self.app.task())).unwrap();
        self.kernel.steer(&[(self.cookie, netns.as_fd())]).remove(0).unwrap();
    }

    /// Writes the pod's flags, and whether a tunnel is connected.
    pub fn set(&mut self, flags: u32, tunnel_up: bool) {
        let (v4, v6) = (address("10.99.0.1"), address("fd99::1"));
        let info = CgroupInfo {
            v4,
            v6,
            flags,
            exclusion_id: 7,
            netns_cookie: self.cookie,
            redirect_port: OUTBOUND,
            ..empty()
        };
        self.kernel.set_cgroup(self.cgroups.id("pods/mesh"), &info).unwrap();
        for own in [v4, v6] {
            let record = PodRecord { netns_cookie: self.cookie, flags, device: interface_index(&self.app) };
            self.kernel.set_pod(own, &record).unwrap();
        }
        self.set_netns(flags, 7);
        let settings = Settings {
            outbound_port: OUTBOUND,
            inbound_port: INBOUND,
            hbone_port: HBONE,
            tunnel_up: u16::from(tunnel_up),
            debug: 1,
            debug_port: 0,
            debug_address: UNSPECIFIED,
            resolvers: self.resolvers,
            dns_port: DNS,
            trace_filter: 0,
        };
        self.kernel.set_settings(&settings).unwrap();
    }

    /// Writes what holds for arrivals in the pod's netns.
    pub fn set_netns(&mut self, flags: u32, exclusion_id: u32) {
        let cgroup_id = self.cgroups.id("pods/mesh");
        self.kernel.set_netns(self.cookie, &NetnsInfo { cgroup_id, flags, exclusion_id }).unwrap();
    }

    /// The rules given since the last call about `port` of the far end (connect) or of the pod
    /// (arrival).
    pub fn rules(&mut self, port: u16) -> Vec<(Hook, Rule)> {
        let mut rules = Vec::new();
        while let Some(record) = self.trace.next() {
            let hook = Hook::from_number(record.hook).unwrap();
            let about = if hook == Hook::SkLookup { record.local_port } else { record.remote_port };
            if about == port {
                rules.push((hook, Rule::from_number(record.rule).unwrap()));
            }
        }
        rules
    }
}

pub const fn empty() -> CgroupInfo {
    CgroupInfo {
        v4: UNSPECIFIED,
        v6: UNSPECIFIED,
        netns_cookie: 0,
        flags: 0,
        detected: 0,
        exclusion_id: 0,
        redirect_port: 0,
        pad: 0,
    }
}

/// The maps' form of an address.
pub fn address(text: &str) -> Address {
    match text.parse().unwrap() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

pub fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// A veth pair between the netns of two agents, with the addresses of this module's picture.
fn join(pod: &Agent, world: &Agent) {
    let (pod, world) = (pod.task().to_string(), world.task().to_string());
    ip(&pod, &["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", &world]);
    for (pid, last) in [(&pod, "1"), (&world, "2")] {
        ip(pid, &["link", "set", "lo", "up"]);
        ip(pid, &["addr", "add", &format!("10.99.0.{last}/24"), "dev", "eth0"]);
        // Usable at once: no other host can have it.
        ip(pid, &["addr", "add", &format!("fd99::{last}/64"), "dev", "eth0", "nodad"]);
        ip(pid, &["link", "set", "eth0", "up"]);
    }
}

/// One more address on the interface of the pod.
pub fn add_address(pod: &Agent, ip_address: &str) {
    let is_v6 = ip_address.contains(':');
    let (length, nodad) = if is_v6 { (64, &["nodad"][..]) } else { (24, &[][..]) };
    let address = format!("{ip_address}/{length}");
    ip(&pod.task().to_string(), &[&["addr", "add", &address, "dev", "eth0"], nodad].concat());
}

/// The number of an agent's `eth0`, which link-local addresses need.
pub fn interface_index(agent: &Agent) -> u32 {
    let said = ip(&agent.task().to_string(), &["-o", "link", "show", "dev", "eth0"]);
    said.split(':').next().and_then(|number| number.trim().parse().ok()).expect("a number")
}

/// What it printed.
fn ip(pid: &str, args: &[&str]) -> String {
    let output = Command::new("nsenter")
        .args([&format!("--net=/proc/{pid}/ns/net"), "ip"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// How often, of `times`: in an emulated machine, which is slow and there for function alone, a
/// fifth of it.
pub fn repeated(times: u16) -> u16 {
    if adit_vm::is_inside() { times / 5 } else { times }
}

/// Debian's 5.10, for one, is built without.
pub fn has_mptcp() -> bool {
    Path::new("/proc/sys/net/mptcp").exists()
}

static COUNTER: AtomicU32 = AtomicU32::new(0);

fn unique() -> String {
    format!("adit-loader-test-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// The cgroups of the picture above, for this test alone.
pub fn cgroups() -> Cgroup {
    let cgroups = Cgroup::new(&unique());
    for name in ["pods/mesh/container", "pods/plain", "world", "tunnel"] {
        cgroups.create(name);
    }
    cgroups
}

/// A private bpffs.
#[derive(Debug)]
pub struct Bpffs {
    mount: Mount,
    _dir: tempfile::TempDir,
}

impl Bpffs {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix(&unique()).tempdir().unwrap();
        Self { mount: Mount::bpffs(dir.path()), _dir: dir }
    }

    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// Where the loader keeps its pins.
    pub fn pins(&self) -> PathBuf {
        self.path().join("adit/node")
    }
}
