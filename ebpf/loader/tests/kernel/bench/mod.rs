//! A node in small: a private bpffs, private cgroups, a pod's netns joined by veth to the rest of the world.
//!
//! ```text
//! cgroups   pods/mesh/container   the enrolled pod's application      netns pod    10.99.0.1 fd99::1
//!           pods/plain            a pod that is not enrolled          netns world  10.99.0.2 fd99::2
//!           world                 another node
//!           tunnel                the node tunnel                     netns pod
//! ```

pub mod agent;
pub mod sys;

use std::os::unix::fs::MetadataExt;
use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED},
    pods::{CgroupInfo, PodRecord, flag},
    settings::Settings,
    trace::{Hook, Rule},
};
use adit_ebpf_loader::{Kernel, Trace};
use agent::Agent;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

pub const OUTBOUND: u16 = 15001;
pub const INBOUND: u16 = 15006;
pub const HBONE: u16 = 15008;
pub const NAMES: u16 = 15053;
pub const READY: u32 = flag::IN_MESH | flag::READY;

pub struct Bench {
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
    pub cgroups: Cgroups,
    pub bpffs: Bpffs,
}

impl Bench {
    /// Everything attached, the pod enrolled and ready, no listener yet.
    pub fn new() -> Self {
        let (cgroups, bpffs) = (Cgroups::new(), Bpffs::new());
        let mut kernel = Kernel::open(&bpffs.pins()).unwrap();
        kernel.attach_pods(&cgroups.dir("pods")).unwrap();
        kernel.attach_tunnel(&cgroups.dir("tunnel")).unwrap();

        let [mut app, mut plain, mut world, mut tunnel] = [(); 4].map(|()| Agent::start());
        app.enter_cgroup(&cgroups.dir("pods/mesh/container"));
        plain.enter_cgroup(&cgroups.dir("pods/plain"));
        world.enter_cgroup(&cgroups.dir("world"));
        tunnel.enter_cgroup(&cgroups.dir("tunnel"));
        app.new_netns();
        world.new_netns();
        tunnel.enter_netns_of(&app);
        plain.enter_netns_of(&world);
        join(&app, &world);
        let cookie = app.cookie();
        let netns = fs::File::open(format!("/proc/{}/ns/net", app.task())).unwrap();
        kernel.steer(cookie, std::os::fd::AsFd::as_fd(&netns)).unwrap();

        let trace = kernel.trace().unwrap();
        let resolvers = [UNSPECIFIED; 3];
        let mut bench = Self { app, plain, world, tunnel, cookie, resolvers, kernel, trace, cgroups, bpffs };
        bench.set(READY, true);
        let info = CgroupInfo { flags: flag::TUNNEL, ..empty() };
        let tunnel_id = bench.cgroups.id("tunnel");
        bench.kernel.set_cgroup(tunnel_id, &info).unwrap();
        bench
    }

    /// Writes the pod's flags, and whether a tunnel is connected.
    pub fn set(&mut self, flags: u32, tunnel_up: bool) {
        let (v4, v6) = (address("10.99.0.1"), address("fd99::1"));
        let info = CgroupInfo {
            v4,
            v6,
            redirect_v4: v4,
            redirect_v6: v6,
            flags,
            policy_id: 7,
            netns_cookie: self.cookie,
            redirect_port: OUTBOUND,
            ..empty()
        };
        self.kernel.set_cgroup(self.cgroups.id("pods/mesh"), &info).unwrap();
        for own in [v4, v6] {
            let record = PodRecord { netns_cookie: self.cookie, flags, policy_id: 7 };
            self.kernel.set_pod(own, &record).unwrap();
        }
        let settings = Settings {
            outbound_port: OUTBOUND,
            inbound_port: INBOUND,
            hbone_port: HBONE,
            tunnel_up: u16::from(tunnel_up),
            debug: 1,
            debug_port: 0,
            debug_address: UNSPECIFIED,
            resolvers: self.resolvers,
            names_port: NAMES,
            pad: 0,
        };
        self.kernel.set_settings(&settings).unwrap();
    }

    /// The rules given since the last call about `port` of the far end (connect) or of the pod (arrival).
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
        redirect_v4: UNSPECIFIED,
        redirect_v6: UNSPECIFIED,
        netns_cookie: 0,
        flags: 0,
        detected: 0,
        policy_id: 0,
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
        // Usable at once: nobody else can have it.
        ip(pid, &["addr", "add", &format!("fd99::{last}/64"), "dev", "eth0", "nodad"]);
        ip(pid, &["link", "set", "eth0", "up"]);
    }
}

fn ip(pid: &str, args: &[&str]) {
    let output = Command::new("nsenter")
        .args([&format!("--net=/proc/{pid}/ns/net"), "ip"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// How often, of `times`: in an emulated machine, which is slow and there for function alone, a fifth of it.
pub fn repeated(times: u16) -> u16 {
    if adit_vm::is_inside() { times / 5 } else { times }
}

/// Debian's 5.10, for one, is built without.
pub fn has_mptcp() -> bool {
    Path::new("/proc/sys/net/mptcp").exists()
}

/// Waits until `ready` holds.
pub fn eventually(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !ready() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}

static COUNTER: AtomicU32 = AtomicU32::new(0);

fn unique() -> String {
    format!("adit-loader-test-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// Private cgroups below the machine's cgroup v2 mount.
pub struct Cgroups(PathBuf);

impl Cgroups {
    pub fn new() -> Self {
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .find(|dir| Path::new(dir).join("cgroup.procs").exists())
            .expect("a cgroup v2 mount");
        let cgroups = Self(Path::new(root).join(unique()));
        for name in ["pods/mesh/container", "pods/plain", "world", "tunnel"] {
            fs::create_dir_all(cgroups.dir(name)).unwrap();
        }
        cgroups
    }

    pub fn root(&self) -> &Path {
        &self.0
    }

    pub fn dir(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn id(&self, name: &str) -> u64 {
        fs::metadata(self.dir(name)).unwrap().ino()
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        /// A killed process leaves its cgroup a moment after it was waited for.
        fn remove(dir: &Path) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    remove(&entry.path());
                }
            }
            let deadline = Instant::now() + Duration::from_secs(5);
            while fs::remove_dir(dir).is_err_and(|error| error.kind() == std::io::ErrorKind::ResourceBusy)
                && Instant::now() < deadline
            {
                std::thread::yield_now();
            }
        }
        remove(&self.0);
    }
}

/// A private bpffs. What is still pinned in it goes with it.
pub struct Bpffs(tempfile::TempDir);

impl Bpffs {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix(&unique()).tempdir().unwrap();
        mount(Some("bpf"), dir.path(), Some("bpf"), MsFlags::empty(), None::<&str>).expect("a bpffs");
        Self(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn pins(&self) -> PathBuf {
        self.0.path().join("adit/node")
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}
