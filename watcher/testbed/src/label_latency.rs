//! How long a label takes at a real API server: the time until the connections of a pod are of the
//! new kind, and which connections the change breaks.
//!
//! Each pod runs a probe that makes one connection after another to a server outside the mesh. The
//! server reports the client port that it sees: the application's own if the connection is direct,
//! the tunnel's if it goes through the mesh. So each connection shows its kind. The probe also
//! keeps connections of both kinds open and talks on them.
//!
//! There are two measurements. [`LabelLatency::flip`]: each probe hurries, that is, it connects
//! again and again until the kind is new. That shows whether any connection fails, but many
//! hurrying pods take CPU time from the node, and their pace is part of the result.
//! [`LabelLatency::sample`]: each probe connects once, at a time of its own after the request. Many
//! rounds together give the share of connections that are of the new kind as a function of time;
//! [`Samples`] fits it.

mod isotonic;
pub(crate) mod probe;

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::{Child, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use crate::{
    api_server::ApiServer,
    cluster::{Cluster, ClusterPod, Enrol},
    helper,
    process::KillOnDrop,
};

pub use self::isotonic::Samples;

/// Connections of all probes in a second while they hurry.
const HURRIED: usize = 2000;
const PORT: u16 = 8080;
/// How long a container runtime takes, at the very least, from the sandbox of a pod (its netns and
/// its first process) to the first program of its first container.
pub const SANDBOX_TO_CONTAINER: Duration = Duration::from_millis(100);
/// New pods that the tunnel knows before they start, as from a control plane.
const NEW_PODS: usize = 1000;
/// Longer than anything here should take.
const LIMIT: Duration = Duration::from_secs(10);
const MODE: &str = "istio.io/dataplane-mode";
/// From giving the probes their times until the first of them connects.
const NOTICE: Duration = Duration::from_millis(20);

/// A node with talking pods, and an API server.
#[derive(Debug)]
pub struct LabelLatency {
    // In the order in which they may end.
    probes: Vec<Probe>,
    cluster: Cluster,
    api: Arc<ApiServer>,
    namespace: String,
    server: SocketAddr,
    new_pods: usize,
}

#[derive(Debug)]
struct Probe {
    process: KillOnDrop,
    said: mpsc::Receiver<String>,
}

/// What a change of labels led to.
#[derive(Debug, Default)]
pub struct Flip {
    /// From the request to each pod's first connection of the new kind.
    pub took: Vec<Duration>,
    /// From the request until the API server had answered it.
    pub requested: Duration,
    /// The errors of the connections, new or held, that failed.
    pub failures: Vec<String>,
}

impl LabelLatency {
    /// A node with `count` pods that talk, none of them in the mesh.
    pub fn new(count: usize) -> Self {
        let api = ApiServer::shared();
        let mut cluster = Cluster::new();
        let namespace = format!("{}-demo", cluster.id);
        api.namespace(&namespace, &json!({}));
        let server = cluster.pod("server", 0, Enrol::Plain);
        let address = SocketAddr::new(server.v4.parse().expect("an address"), PORT);
        serve(&server);
        let pods: Vec<ClusterPod> =
            (0..count).map(|number| cluster.pod_of_api(&api, &namespace, &format!("p{number}"), 0)).collect();
        let names = pods.iter().map(|pod| pod.name.clone()).chain((0..NEW_PODS).map(new_pod));
        let workload = |name| json!({"uid": name, "name": name, "namespace": namespace, "serviceAccount": "default", "protocol": "TCP"});
        let mesh: Vec<Value> = names.map(workload).collect();
        fs::write(cluster.mesh_file(), json!({"workloads": mesh}).to_string()).expect("mesh file");
        let (cgroup2, bpffs, mesh, ca) =
            (cluster.cgroup2.clone(), cluster.bpffs(), cluster.mesh_file(), cluster.ca_dir());
        cluster.follow_api(0, &api);
        let on = &mut cluster.nodes[0];
        on.start_watcher(&cgroup2, &bpffs, &["--detach"]);
        on.start_tunnel(&mesh, &ca);
        let period = (count * 1_000_000 / HURRIED).max(1000);
        let probes = pods.iter().map(|pod| Probe::start(pod, address, period)).collect();
        let mut measured = Self { probes, cluster, api, namespace, server: address, new_pods: 0 };
        let all = measured.wait_kind("direct", Instant::now());
        assert_eq!(all.failures, Vec::<String>::new());
        measured
    }

    /// Labels the namespace, whatever pods there are.
    pub fn flip_all(&mut self, on: bool) -> Flip {
        self.flip_by(on, false)
    }

    /// Labels all pods (the one, or their namespace), or takes the label off, and waits until all
    /// are of that kind.
    pub fn flip(&mut self, on: bool) -> Flip {
        self.flip_by(on, self.probes.len() == 1)
    }

    fn flip_by(&mut self, on: bool, by_pod: bool) -> Flip {
        for probe in &mut self.probes {
            probe.send("hurry");
        }
        let began = Instant::now();
        self.label(on, by_pod);
        let requested = began.elapsed();
        Flip { requested, ..self.wait_kind(kind(on), began) }
    }

    /// Labels the namespace, or takes the label off. Each pod connects once, at a time of its own,
    /// all of them spread evenly over the time `within` that begins with the request.
    pub fn sample(&mut self, on: bool, within: Duration, sampled: &mut Samples) -> Vec<String> {
        let began = micros() + NOTICE.as_micros();
        let times = isotonic::spread(self.probes.len(), within);
        for (probe, after) in self.probes.iter_mut().zip(times) {
            probe.send(&format!("once {}", began + after.as_micros()));
        }
        sleep_until(began);
        self.label(on, false);
        let mut failures = Vec::new();
        for (number, probe) in self.probes.iter().enumerate() {
            let (mut once, mut settled) = (false, false);
            while !(once && settled) {
                let Ok(line) = probe.said.recv_timeout(LIMIT) else {
                    panic!("p{number} does not become {}\n{}", kind(on), self.cluster.nodes[0].story());
                };
                let (at, said) = line.split_once(' ').expect("a time");
                if let Some(said) = said.strip_prefix("once ") {
                    let after = at.parse::<u128>().expect("a time").saturating_sub(began);
                    sampled.add(after, said == kind(on));
                    once = true;
                } else {
                    settled |= said == kind(on);
                }
                if said.contains("failed") {
                    failures.push(format!("p{number}: {said}"));
                }
            }
        }
        failures
    }

    fn label(&self, on: bool, by_pod: bool) {
        let labels = json!({MODE: if on { json!("ambient") } else { Value::Null }});
        if by_pod {
            self.api.patch_pod(&self.namespace, "p0", &json!({"metadata": {"labels": labels}}));
        } else {
            self.api.label_namespace(&self.namespace, &labels);
        }
    }

    fn wait_kind(&mut self, kind: &str, began: Instant) -> Flip {
        let began = micros() - began.elapsed().as_micros();
        let mut flip = Flip::default();
        for (number, probe) in self.probes.iter().enumerate() {
            let deadline = Instant::now() + LIMIT;
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                let Ok(line) = probe.said.recv_timeout(left) else {
                    panic!("p{number} has no connection that is {kind}\n{}", self.cluster.nodes[0].story());
                };
                let (at, said) = line.split_once(' ').expect("a time");
                if said == kind {
                    let took = at.parse::<u128>().expect("a time").saturating_sub(began);
                    flip.took.push(Duration::from_micros(u64::try_from(took).unwrap_or(u64::MAX)));
                    break;
                }
                if said.starts_with("failed") {
                    flip.failures.push(format!("p{number}: {said}"));
                }
            }
        }
        flip
    }

    /// Starts `count` pods at once, as a kubelet does; how long the first connection of each took,
    /// and its kind.
    pub fn arrive(&mut self, count: usize) -> Vec<(Duration, String)> {
        let node = self.cluster.nodes[0].pins_name.clone();
        let names: Vec<String> = (self.new_pods..).take(count).map(new_pod).collect();
        self.new_pods += count;
        let uids: Vec<String> =
            names.iter().map(|name| self.api.pod(&self.namespace, name, &node, &json!({}))).collect();
        let pods: Vec<ClusterPod> = names
            .iter()
            .zip(&uids)
            .map(|(name, uid)| self.cluster.pod_as(name, 0, Enrol::Plain, &format!("pod{uid}")))
            .collect();
        // Not to wait for the watcher: a runtime does not either.
        thread::sleep(SANDBOX_TO_CONTAINER);
        let role = format!("connect {}", self.server);
        let started: Vec<Child> = pods
            .iter()
            .map(|pod| {
                let mut command = helper::command(&pod.placement(), &role);
                command.stdout(Stdio::piped()).spawn().expect("a pod's program")
            })
            .collect();
        let said = started.into_iter().map(|process| {
            let output = process.wait_with_output().expect("its output");
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let line = text.lines().find(|line| line.starts_with(|first: char| first.is_ascii_digit()));
            let (took, kind) = line.and_then(|line| line.split_once(' ')).expect("a time");
            (Duration::from_micros(took.parse().expect("a number")), kind.to_owned())
        });
        let said = said.collect();
        for pod in pods {
            self.api.delete_pod(&self.namespace, &pod.name);
            pod.end();
        }
        said
    }

    /// What failed since the last change.
    pub fn failures(&self) -> Vec<String> {
        self.probes
            .iter()
            .flat_map(|probe| probe.said.try_iter())
            .filter(|line| line.contains("failed"))
            .collect()
    }

    /// The last lines of the logs, for the message when something failed.
    pub fn story(&self) -> String {
        self.cluster.nodes[0].story()
    }
}

impl Probe {
    fn start(pod: &ClusterPod, server: SocketAddr, period: usize) -> Self {
        let mut command = helper::command(&pod.placement(), &format!("talk {server} {period}"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = KillOnDrop(command.spawn().expect("a probe"));
        let output = BufReader::new(process.0.stdout.take().expect("piped"));
        let (sender, said) = mpsc::channel();
        thread::spawn(move || {
            // What the test harness prints around it has no time in front.
            let lines = output.lines().map_while(Result::ok);
            for line in lines.filter(|line| line.starts_with(|first: char| first.is_ascii_digit())) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { process, said }
    }

    fn send(&mut self, what: &str) {
        writeln!(self.process.0.stdin.as_ref().expect("piped"), "{what}").expect("a probe");
    }
}

/// Tells each client in `pod`'s netns the port that it comes from, then echoes.
fn serve(pod: &ClusterPod) {
    let bind = || TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT));
    let listener = pod.netns.enter(bind).expect("bind");
    // It ends with this process. Once the links of the netns are gone, no client can reach it.
    listener.set_nonblocking(true).expect("non-blocking");
    let serve = async move {
        let listener = tokio::net::TcpListener::from_std(listener).expect("registered");
        while let Ok((mut stream, client)) = listener.accept().await {
            tokio::spawn(async move {
                stream.write_all(&client.port().to_be_bytes()).await?;
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await
            });
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    thread::spawn(move || runtime.block_on(serve));
}

/// What connections are of pods that are in the mesh, or not.
fn kind(on: bool) -> &'static str {
    if on { "tunnel" } else { "direct" }
}

fn sleep_until(time: u128) {
    let left = time.saturating_sub(micros());
    thread::sleep(Duration::from_micros(left.try_into().unwrap_or(u64::MAX)));
}

fn micros() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_micros()
}

fn new_pod(number: usize) -> String {
    format!("new{number}")
}
