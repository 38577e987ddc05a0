//! The real tunnel on a node of its own.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::TunnelMesh;
use crate::{
    fakes::{FakeAgent, RESOLVER_ADDRESSES},
    mesh_pod::MeshPod,
    netns::TestNetns,
    process::KillOnDrop,
    program::binary,
    wait::{LIMIT, try_wait, wait_for},
};

/// A tunnel and its node agent.
#[derive(Debug)]
pub struct TunnelNode {
    /// The netns of the node.
    pub netns: TestNetns,
    /// `None` for a dedicated tunnel.
    agent: Option<FakeAgent>,
    /// The tunnel's first message to its agent.
    pub hello: Vec<u8>,
    child: KillOnDrop,
    log: PathBuf,
}

impl TunnelNode {
    /// Starts the tunnel in `netns` and waits for its hello.
    pub fn start(mesh: &TunnelMesh, node: &str, netns: TestNetns) -> Self {
        Self::start_with(mesh, node, netns, &[])
    }

    /// With more variables.
    pub fn start_with(mesh: &TunnelMesh, node: &str, netns: TestNetns, variables: &[(&str, &str)]) -> Self {
        let mut started = Self::start_unheard(mesh, node, netns, variables);
        started.hello = started.agent().accept();
        started
    }

    /// The same, without waiting for its hello.
    pub fn start_unheard(
        mesh: &TunnelMesh,
        node: &str,
        netns: TestNetns,
        variables: &[(&str, &str)],
    ) -> Self {
        let socket = mesh.dir.path().join(format!("{netns}.sock"));
        let agent = FakeAgent::listen(&socket);
        let mut variables = variables.to_vec();
        let path = socket.display().to_string();
        variables.push(("INPOD_UDS", &path));
        let (child, log) = Self::spawn(mesh, node, &netns, &variables);
        Self { netns, agent: Some(agent), hello: Vec::new(), child, log }
    }

    /// One that serves `pod` alone, in its netns.
    pub fn dedicated(mesh: &TunnelMesh, pod: &MeshPod) -> Self {
        let info = format!("demo/{0}/{0}", pod.name);
        let netns = pod.netns.alias();
        let variables =
            [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", &info), ("PACKET_MARK", "1337")];
        let (child, log) = Self::spawn(mesh, &pod.node, &netns, &variables);
        Self { netns, agent: None, hello: Vec::new(), child, log }
    }

    /// One in a container's place: with nothing but `environment`, in a folder and with a
    /// `/etc/hosts` and a `/run/ztunnel` of its own, and with the arguments of Istio's DaemonSet.
    /// Its agent's socket is where Istio's is.
    pub fn daemonset(
        mesh: &TunnelMesh,
        netns: TestNetns,
        folder: &Path,
        hosts: &str,
        environment: &[(&str, &str)],
    ) -> Self {
        let sockets = folder.join("sockets");
        std::fs::create_dir_all(&sockets).expect("folder");
        std::fs::write(folder.join("hosts"), hosts).expect("hosts");
        let mut agent = FakeAgent::listen(&sockets.join("ztunnel.sock"));
        let log = mesh.dir.path().join(format!("{netns}.log"));
        let output = File::create(&log).expect("log");
        let script = format!(
            "mount --bind {folder}/hosts /etc/hosts; mkdir {folder}/run; mount --bind {folder}/run /run; \
             mkdir /run/ztunnel; mount --bind {sockets} /run/ztunnel; cd {folder}; exec {tunnel} proxy ztunnel",
            folder = folder.display(),
            sockets = sockets.display(),
            tunnel = binary("ztunnel").display()
        );
        let mut command = netns.command("unshare");
        command
            .args(["-m", "sh", "-ec", &script])
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stderr(output.try_clone().expect("log"))
            .stdout(output);
        let child = KillOnDrop(command.spawn().expect("the tunnel starts"));
        let hello = agent.accept();
        Self { netns, agent: Some(agent), hello, child, log }
    }

    fn spawn(
        mesh: &TunnelMesh,
        node: &str,
        netns: &TestNetns,
        variables: &[(&str, &str)],
    ) -> (KillOnDrop, PathBuf) {
        let log = mesh.dir.path().join(format!("{netns}.log"));
        let output = File::create(&log).expect("log");
        let mut command = netns.command(binary("ztunnel").to_str().expect("UTF-8 path"));
        command
            .env("LOCAL_XDS_PATH", mesh.mesh_file())
            .env("DEVELOPMENT_CA_DIR", mesh.ca_dir())
            .env("NODE_NAME", node)
            .env("DNS_UPSTREAM", RESOLVER_ADDRESSES.join(","))
            .env("ZTUNNEL_WORKER_THREADS", "2")
            .env("CONNECTION_TERMINATION_DEADLINE", "5s")
            .env("LOG_FORMAT", "json")
            .env("RUST_LOG", "info,ztunnel=debug,access=debug")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stderr(output.try_clone().expect("log"))
            .stdout(output);
        (KillOnDrop(command.spawn().expect("the tunnel starts")), log)
    }

    /// Its node agent.
    pub fn agent(&mut self) -> &mut FakeAgent {
        self.agent.as_mut().expect("a shared tunnel")
    }

    /// What the tunnel has written so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).expect("log")
    }

    /// The access records that contain all of `parts`, once there are `count`.
    pub fn records(&self, count: usize, parts: &[&str]) -> Vec<serde_json::Value> {
        let found = || -> Vec<serde_json::Value> {
            let log = self.log();
            let closed = log.lines().filter(|line| {
                line.contains("\"target\":\"access\"")
                    && !line.contains("connection opened")
                    && parts.iter().all(|part| line.contains(part))
            });
            closed.map(|line| serde_json::from_str(line).expect("JSON")).collect()
        };
        let enough = try_wait(LIMIT, || Some(found()).filter(|records| records.len() >= count));
        enough.unwrap_or_else(|| panic!("no {count} records with {parts:?} in\n{}", self.log()))
    }

    /// The answer of its readiness probe.
    ///
    /// # Errors
    /// When there is none.
    pub fn readiness(&self) -> io::Result<String> {
        self.netns.http("GET", local(15021), "/healthz/ready")
    }

    /// Whether it reports ready.
    pub fn is_ready(&self) -> bool {
        self.readiness().is_ok_and(|answer| answer.starts_with("HTTP/1.0 200"))
    }

    /// Waits until it reports ready.
    pub fn wait_ready(&self) {
        wait_for("the tunnel to be ready", || self.is_ready().then_some(()));
    }

    /// Its metrics.
    pub fn metrics(&self) -> String {
        self.netns.http("GET", local(15020), "/metrics").expect("metrics")
    }

    /// The value of the one sample of `name` that has all of `labels`.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Option<u64> {
        let metrics = self.metrics();
        let mut samples = metrics.lines().filter(|line| {
            line.starts_with(&format!("{name}{{")) && labels.iter().all(|label| line.contains(label))
        });
        let sample = samples.next()?;
        assert!(samples.next().is_none(), "several samples of {name} with {labels:?}");
        sample.rsplit(' ').next()?.parse().ok()
    }

    /// Waits until that is `value`: who was answered may be counted a moment later, and a scrape may
    /// show what was true a moment ago.
    pub fn wait_metric(&self, name: &str, labels: &[&str], value: u64) {
        wait_for(&format!("{name} with {labels:?} to be {value}"), || {
            self.metric(name, labels) == Some(value)
        });
    }

    /// Sends it `signal`.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("kill");
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.0.id().try_into().expect("pid"))
    }

    /// Waits until it has ended by itself.
    pub fn wait_exit(&mut self) -> ExitStatus {
        wait_for("the tunnel to end", || self.child.0.try_wait().expect("wait"))
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.child.0.try_wait().expect("wait").is_none()
    }
}

/// `port` of loopback.
pub fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

impl Drop for TunnelNode {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of the tunnel in {}\n{}", self.netns, self.log());
        }
    }
}
