//! The real binary on a node of its own.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{Bed, FakeAgent, Pod, Space, wait_for};

pub struct Tunnel {
    pub space: Space,
    /// None of a dedicated tunnel.
    agent: Option<FakeAgent>,
    pub hello: Vec<u8>,
    child: Child,
    log: PathBuf,
}

impl Tunnel {
    pub fn start(bed: &Bed, node: &str, space: Space) -> Self {
        Self::start_with(bed, node, space, &[])
    }

    /// With more variables.
    pub fn start_with(bed: &Bed, node: &str, space: Space, variables: &[(&str, &str)]) -> Self {
        let socket = bed.dir.path().join(format!("{}.sock", space.name));
        let mut agent = FakeAgent::listen(&socket);
        let mut variables = variables.to_vec();
        let path = socket.display().to_string();
        variables.push(("INPOD_UDS", &path));
        let (child, log) = Self::spawn(bed, node, &space, &variables);
        let hello = agent.accept();
        Self { space, agent: Some(agent), hello, child, log }
    }

    /// One that serves `pod` alone, in its netns.
    pub fn dedicated(bed: &Bed, pod: &Pod) -> Self {
        let info = format!("demo/{0}/{0}", pod.name);
        let space = pod.space.alias();
        let variables =
            [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", &info), ("PACKET_MARK", "1337")];
        let (child, log) = Self::spawn(bed, &pod.node, &space, &variables);
        Self { space, agent: None, hello: Vec::new(), child, log }
    }

    fn spawn(bed: &Bed, node: &str, space: &Space, variables: &[(&str, &str)]) -> (Child, PathBuf) {
        let log = bed.dir.path().join(format!("{}.log", space.name));
        let output = File::create(&log).expect("log");
        let child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", space.name))
            .arg(env!("CARGO_BIN_EXE_ztunnel"))
            .env("LOCAL_XDS_PATH", bed.mesh_file())
            .env("DEVELOPMENT_CA_DIR", bed.ca_dir())
            .env("NODE_NAME", node)
            .env("DNS_UPSTREAM", super::resolver::ADDRESSES.join(","))
            .env("ZTUNNEL_WORKER_THREADS", "2")
            .env("CONNECTION_TERMINATION_DEADLINE", "5s")
            .env("LOG_FORMAT", "json")
            .env("RUST_LOG", "info,ztunnel=debug,access=debug")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stderr(output.try_clone().expect("log"))
            .stdout(output)
            .spawn()
            .expect("the tunnel starts");
        (child, log)
    }

    pub fn agent(&mut self) -> &mut FakeAgent {
        self.agent.as_mut().expect("a shared tunnel")
    }

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
        let end = Instant::now() + super::LIMIT;
        while found().len() < count {
            assert!(Instant::now() < end, "no {count} records with {parts:?} in\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        found()
    }

    pub fn readiness(&self) -> io::Result<String> {
        self.space.http("GET", local(15021), "/healthz/ready")
    }

    pub fn is_ready(&self) -> bool {
        self.readiness().is_ok_and(|answer| answer.starts_with("HTTP/1.0 200"))
    }

    pub fn wait_ready(&self) {
        wait_for("the tunnel to be ready", || self.is_ready().then_some(()));
    }

    pub fn metrics(&self) -> String {
        self.space.http("GET", local(15020), "/metrics").expect("metrics")
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

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("kill");
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().expect("pid"))
    }

    pub fn wait_exit(&mut self) -> ExitStatus {
        wait_for("the tunnel to end", || self.child.try_wait().expect("wait"))
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }
}

pub fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the tunnel in {}\n{}", self.space.name, self.log());
        }
    }
}
