//! A node whose pods are labelled at a real API server while they talk: how long until a pod's connections are of the
//! new kind, and what the change breaks.
//!
//! Each pod runs a [`probe`]: connections one after the other to a server outside the mesh that says which port it sees. It
//! is the application's own, or else the tunnel's: so every connection tells its kind by itself. Besides, the probe holds
//! connections of both kinds open and talks on them.
//!
//! When a pod changed is asked in two ways. A probe that is in a hurry connects again and again until its kind is new: that
//! shows whether any connection fails, but many pods that do so leave the node little time for its own work, and their
//! pace is in the result. Or each connects once ([`Labelled::sample`]), at a time of its own after the request; of many rounds the share of
//! connections that are of the new kind by a time is known.

#![allow(dead_code, reason = "each program that includes this uses its own part")]

mod probe;
mod sampled;

use std::{
    env, fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    process::{Child, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use crate::{
    api_server::ApiServer,
    bed::{Bed, Enrol, Pod, process::placed},
};

pub use probe::probe;
pub use sampled::Sampled;

/// Connections of all probes in a second while they are in a hurry.
const HURRIED: usize = 2000;
const PORT: u16 = 8080;
/// How long a container runtime takes, at the very least, from a pod's sandbox (its netns and its first process) to the first
/// program of its first container.
const SANDBOX_TO_CONTAINER: Duration = Duration::from_millis(100);
/// New pods that the tunnel knows of, as a control plane would tell it.
const NEW_PODS: usize = 1000;
/// Longer than anything here should take.
const LIMIT: Duration = Duration::from_secs(10);
const MODE: &str = "istio.io/dataplane-mode";
/// From telling the probes when to connect until the first of them does.
const TOLD_AHEAD: Duration = Duration::from_millis(20);

pub struct Labelled {
    // In the order in which they may end.
    probes: Vec<Probe>,
    bed: Bed,
    api: Arc<ApiServer>,
    namespace: String,
    server: SocketAddr,
    new_pods: usize,
}

struct Probe {
    process: Child,
    said: mpsc::Receiver<String>,
}

/// What a change of labels came to.
#[derive(Debug, Default)]
pub struct Flip {
    /// From the request to each pod's first connection of the new kind.
    pub took: Vec<Duration>,
    /// From the request until the API server had answered it.
    pub requested: Duration,
    /// What a connection, new or held, said that failed.
    pub failures: Vec<String>,
}

impl Labelled {
    /// `count` pods that talk, none of them in the mesh. `probe`: the arguments that make this program call [`probe`].
    pub fn new(count: usize, probe: &[&str]) -> Self {
        let api = ApiServer::shared();
        let mut bed = Bed::new();
        let namespace = format!("{}-demo", bed.id);
        api.namespace(&namespace, &json!({}));
        let server = bed.pod("server", 0, Enrol::Plain);
        let address = SocketAddr::new(server.v4.parse().expect("an address"), PORT);
        serve(&server);
        let node = bed.nodes[0].pins_name.clone();
        let pods: Vec<Pod> = (0..count)
            .map(|number| {
                let name = format!("p{number}");
                let uid = api.pod(&namespace, &name, &node, &json!({}));
                let pod = bed.pod_as(&name, 0, Enrol::Plain, &format!("pod{uid}"));
                let ips = [&pod.v4, &pod.v6].map(|ip| json!({"ip": ip}));
                let status = json!({"phase": "Running", "podIP": pod.v4, "podIPs": ips});
                api.set_status(&namespace, &name, &status);
                pod
            })
            .collect();
        let names = pods.iter().map(|pod| pod.name.clone()).chain((0..NEW_PODS).map(new_pod));
        let workload = |name| json!({"uid": name, "name": name, "namespace": namespace, "serviceAccount": "default", "protocol": "TCP"});
        let mesh: Vec<Value> = names.map(workload).collect();
        fs::write(bed.mesh_file(), json!({"workloads": mesh}).to_string()).expect("mesh file");
        let (cgroup2, bpffs, mesh, ca) = (bed.cgroup2.clone(), bed.bpffs(), bed.mesh_file(), bed.ca_dir());
        let on = &mut bed.nodes[0];
        on.kubeconfig = Some(api.watcher_kubeconfig());
        forward(&on.netns, api.port());
        on.start_watcher(&cgroup2, &bpffs, &["--detach"]);
        on.start_tunnel(&mesh, &ca);
        let period = (count * 1_000_000 / HURRIED).max(1000);
        let probes = pods.iter().map(|pod| Probe::start(pod, probe, address, period)).collect();
        let mut labelled = Self { probes, bed, api, namespace, server: address, new_pods: 0 };
        let all = labelled.wait_kind("direct", Instant::now());
        assert_eq!(all.failures, Vec::<String>::new());
        labelled
    }

    /// Labels the namespace, whatever pods there are.
    pub fn flip_all(&mut self, on: bool) -> Flip {
        self.flip_by(on, false)
    }

    /// Labels all pods (the one, or their namespace), or takes the label off, and waits until all are of that kind.
    pub fn flip(&mut self, on: bool) -> Flip {
        self.flip_by(on, self.probes.len() == 1)
    }

    fn flip_by(&mut self, on: bool, by_pod: bool) -> Flip {
        for probe in &mut self.probes {
            probe.tell("hurry");
        }
        let began = Instant::now();
        self.label(on, by_pod);
        let requested = began.elapsed();
        Flip { requested, ..self.wait_kind(kind(on), began) }
    }

    /// Labels the namespace, or takes the label off. Each pod connects once, at a time of its own, all of them spread
    /// evenly over the time `within` that begins with the request.
    pub fn sample(&mut self, on: bool, within: Duration, sampled: &mut Sampled) -> Vec<String> {
        let began = micros() + TOLD_AHEAD.as_micros();
        let times = sampled::spread(self.probes.len(), within);
        for (probe, after) in self.probes.iter_mut().zip(times) {
            probe.tell(&format!("once {}", began + after.as_micros()));
        }
        sleep_until(began);
        self.label(on, false);
        let mut failures = Vec::new();
        for (number, probe) in self.probes.iter().enumerate() {
            let (mut once, mut settled) = (false, false);
            while !(once && settled) {
                let Ok(line) = probe.said.recv_timeout(LIMIT) else {
                    panic!("p{number} does not become {}\n{}", kind(on), self.bed.nodes[0].story());
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
                    panic!("p{number} has no connection that is {kind}\n{}", self.bed.nodes[0].story());
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

    /// Starts `count` pods at once, as a kubelet does; how long the first connection of each took, and its kind.
    pub fn arrive(&mut self, count: usize, arguments: &[&str]) -> Vec<(Duration, String)> {
        let node = self.bed.nodes[0].pins_name.clone();
        let names: Vec<String> = (self.new_pods..).take(count).map(new_pod).collect();
        self.new_pods += count;
        let uids: Vec<String> =
            names.iter().map(|name| self.api.pod(&self.namespace, name, &node, &json!({}))).collect();
        let pods: Vec<Pod> = names
            .iter()
            .zip(&uids)
            .map(|(name, uid)| self.bed.pod_as(name, 0, Enrol::Plain, &format!("pod{uid}")))
            .collect();
        // Not to wait for the watcher: a runtime does not either.
        thread::sleep(SANDBOX_TO_CONTAINER);
        let program = env::current_exe().expect("own path");
        let words = [&[program.to_str().expect("UTF-8 path")], arguments].concat();
        let started: Vec<Child> = pods
            .iter()
            .map(|pod| {
                let mut command = placed(&pod.cgroup, &pod.netns, &words);
                command.env(probe::FIRST, self.server.to_string()).stdout(Stdio::piped());
                command.spawn().expect("a pod's program")
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

    /// What somebody needs to see when something failed.
    pub fn story(&self) -> String {
        self.bed.nodes[0].story()
    }
}

impl Probe {
    fn start(pod: &Pod, arguments: &[&str], server: SocketAddr, period: usize) -> Self {
        let program = env::current_exe().expect("own path");
        let words = [&[program.to_str().expect("UTF-8 path")], arguments].concat();
        let mut command = placed(&pod.cgroup, &pod.netns, &words);
        command.env(probe::TALKS, format!("{server},{period}")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("a probe");
        let output = BufReader::new(process.stdout.take().expect("piped"));
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

    fn tell(&mut self, what: &str) {
        writeln!(self.process.stdin.as_ref().expect("piped"), "{what}").expect("a probe");
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A socket that listens in another netns.
fn listen(netns: &str, address: (Ipv4Addr, u16)) -> TcpListener {
    let netns = fs::File::open(format!("/run/netns/{netns}")).expect("netns");
    let bind = move || {
        setns(&netns, CloneFlags::CLONE_NEWNET).expect("setns");
        TcpListener::bind(address).expect("bind")
    };
    thread::spawn(bind).join().expect("bound")
}

/// Carries what is sent to `port` of the node's loopback to the same port of ours, where the API server is.
fn forward(netns: &str, port: u16) {
    let listener = listen(netns, (Ipv4Addr::LOCALHOST, port));
    thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            // Who is away is away through this, too.
            let Ok(far) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { continue };
            for (from, to) in [(&near, &far), (&far, &near)] {
                let (mut from, mut to) = (from.try_clone().expect("clone"), to.try_clone().expect("clone"));
                thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Write);
                });
            }
        }
    });
}

/// Tells each client in `pod`'s netns the port that it comes from, then echoes.
fn serve(pod: &Pod) {
    let listener = listen(&pod.netns, (Ipv4Addr::UNSPECIFIED, PORT));
    // Ends with this process; it serves nobody any more once the netns' links are gone.
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
