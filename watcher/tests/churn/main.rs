//! Pods that come and go: what their first connection meets, and what is left of them.

mod identity;
mod load;
#[path = "../support/mod.rs"]
mod support;

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use support::{Bed, FakeTunnel, Told, run, wait_for};

/// How many of something: what is told by the environment, or a number that takes a few seconds.
fn count(variable: &str, few: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(few)
}

/// A uid as the API server makes them.
fn uid(number: usize) -> String {
    format!("{:08x}-0000-4000-8000-{:012x}", std::process::id(), number)
}

fn pods_dir(bed: &Bed) -> PathBuf {
    bed.cgroup.join("pods")
}

/// Writes a pods file of these uids, which names no cgroup.
fn publish(bed: &Bed, uids: &[String], enrolled: bool, more: &str) {
    let mut text = String::from(if uids.is_empty() { "pods: []\n" } else { "pods:\n" });
    let label = if enrolled { "ambient" } else { "none" };
    for (i, uid) in uids.iter().enumerate() {
        let _ = write!(
            text,
            "- uid: {uid}\n  name: p{i}\n  labels: {{istio.io/dataplane-mode: {label}}}\n{more}"
        );
    }
    let next = bed.dir.path().join("pods.next");
    fs::write(&next, text).expect("pods file");
    fs::rename(next, bed.dir.path().join("pods.yaml")).expect("pods file");
}

/// A netns with an address and a way to somewhere, where nobody is.
#[derive(Debug)]
struct Network {
    name: String,
}

impl Network {
    fn new(bed: &Bed, number: usize) -> Self {
        let name = format!("{}-n{number}", bed.name);
        let (a, b) = (number / 250, number % 250 + 1);
        run(&format!("ip netns add {name}"));
        run(&format!("ip -n {name} link add e0 type veth peer name e1"));
        run(&format!("ip -n {name} addr add 10.{}.{a}.{b}/32 dev e0", 100 + number % 2));
        run(&format!("ip -n {name} link set e0 up"));
        run(&format!("ip -n {name} route add default dev e0"));
        Self { name }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Starts a process in a cgroup that is made right before; the first thing it does in it is `then`.
fn start_in(network: &Network, container: &Path, then: &str) -> Child {
    let script = format!("mkdir -p {0}; echo $$ > {0}/cgroup.procs; {then}", container.display());
    Command::new("nsenter")
        .arg(format!("--net=/run/netns/{}", network.name))
        .args(["bash", "-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nsenter")
}

/// A pod that lasts in each of these.
fn start_each(bed: &Bed, networks: &[Network], uids: &[String]) -> Vec<Reaped> {
    let start = |(network, uid): (&Network, &String)| {
        let dir = pods_dir(bed).join(format!("pod{uid}/main"));
        Reaped(start_in(network, &dir, "exec sleep infinity"))
    };
    networks.iter().zip(uids).map(start).collect()
}

fn remove(pod: &Path) {
    for dir in [pod.join("main"), pod.to_owned()] {
        wait_for("a cgroup to be empty", || (!dir.exists() || fs::remove_dir(&dir).is_ok()).then_some(()));
    }
}

fn end(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Takes everything that a tunnel is told, until the watcher hangs up.
fn answer_all(tunnel: FakeTunnel) -> thread::JoinHandle<Vec<Told>> {
    thread::spawn(move || {
        let mut told = Vec::new();
        loop {
            match tunnel.hear() {
                Told::Closed => return told,
                heard => told.push(heard),
            }
            tunnel.answer("");
        }
    })
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_first_connect_of_a_new_pod_is_never_in_clear() {
    let mut bed = Bed::new();
    let pods = count("ADIT_NEW_PODS", 100);
    let uids: Vec<String> = (0..pods).map(uid).collect();
    publish(&bed, &uids, true, "");
    bed.start(&["--events", "lifecycle"]);
    wait_for("the watcher to know the pods", || bed.status()["ready"].as_bool().filter(|ready| *ready));
    let network = Network::new(&bed, 0);
    let mut escaped = Vec::new();
    for uid in &uids {
        let pod = pods_dir(&bed).join(format!("burstable/pod{uid}"));
        // Nobody is there: whoever gets out of the pod waits in vain, and says something else.
        let connect = "exec 3<>/dev/tcp/192.0.2.1/80";
        let output =
            start_in(&network, &pod.join("main"), &format!("timeout 2 bash -c '{connect}'; {connect}"))
                .wait_with_output()
                .expect("nsenter");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if said.matches("connect: Operation not permitted").count() != 2 {
            escaped.push(said);
        }
        remove(&pod);
    }
    assert!(escaped.is_empty(), "{} of {pods} escaped: {}\n{}", escaped.len(), escaped[0], bed.log());
    // And what was closed in the kernel is opened there, too.
    publish(&bed, &[], true, "");
    wait_for("the maps to be empty", || bed.status()["pods"].as_array().unwrap().is_empty().then_some(()));
    assert_eq!(bed.status()["events"]["lost"], 0);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn every_source_of_events_finds_a_new_pod() {
    for source in ["lifecycle", "scan", "connector"] {
        let mut bed = Bed::new();
        publish(&bed, &[uid(0)], true, "");
        if source == "connector" && !connector_is_there() {
            assert!(bed.refuses(&["--events", source]).contains("LISTEN"));
            continue;
        }
        bed.start(&["--events", source]);
        let told = answer_all(bed.tunnel());
        let network = Network::new(&bed, 0);
        let pod = pods_dir(&bed).join(format!("pod{}", uid(0)));
        let process = start_in(&network, &pod.join("main"), "exec sleep infinity");
        bed.wait_state(0, "open", "");
        assert_eq!(bed.status()["events"]["source"], source);
        // Its only process ends, and its cgroup goes: it leaves the mesh long before the next scan.
        end(process);
        remove(&pod);
        bed.wait_state(0, "closed", "no_cgroup");
        drop(bed);
        let told = told.join().unwrap();
        let adds = told.iter().filter(|told| matches!(told, Told::Add(..))).count();
        assert!(adds == 1 && told.last() == Some(&Told::Del(uid(0))), "{source}: {told:?}");
    }
}

/// GETs a path of the watcher's own port, which it chose by itself.
fn http(bed: &Bed, path: &str) -> String {
    let log = bed.log();
    let at = log.split("address=").nth(1).expect("the address in the log");
    let mut stream = TcpStream::connect(at.split_whitespace().next().unwrap()).expect("connect");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: w\r\nConnection: close\r\n\r\n").expect("request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    answer
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn ready_means_that_every_pod_of_the_source_was_looked_at() {
    let mut bed = Bed::new();
    let network = Network::new(&bed, 0);
    let _process =
        Reaped(start_in(&network, &pods_dir(&bed).join(format!("pod{}/main", uid(0))), "sleep 1000"));
    // A source that cannot say anything yet.
    fs::write(bed.dir.path().join("pods.yaml"), "pods: [").expect("pods file");
    bed.start(&["--metrics-address", "127.0.0.1:0"]);
    assert!(http(&bed, "/healthz/ready").starts_with("HTTP/1.1 503"));
    assert_eq!(bed.status()["ready"], false);
    publish(&bed, &[uid(0)], true, "");
    wait_for("the watcher to be ready", || {
        http(&bed, "/healthz/ready").starts_with("HTTP/1.1 200").then_some(())
    });
    // By then the pod is found, and closed.
    assert!(http(&bed, "/metrics").contains("adit_watcher_pods{state=\"closed\"} 1"));
    let told = answer_all(bed.tunnel());
    bed.wait_state(0, "open", "");
    let metrics = http(&bed, "/metrics");
    for line in [
        "adit_watcher_pods{state=\"open\"} 1",
        "adit_watcher_pods{state=\"closed\"} 0",
        "adit_watcher_tunnels 1",
        "adit_watcher_enrolment_duration_seconds_count 1",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    drop(bed);
    told.join().unwrap();
}

/// Whether the kernel would answer a LISTEN from here.
fn connector_is_there() -> bool {
    let root = watcher::observe::cgroups::find_root().expect("cgroup2");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async { watcher::observe::events::connector::Connector::open(&root, &root).is_ok() })
}

/// Ends with its owner.
#[derive(Debug)]
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn sixty_labels_at_once_take_milliseconds() {
    let mut bed = Bed::new();
    let pods = count("ADIT_LABELS", 60);
    let uids: Vec<String> = (0..pods).map(uid).collect();
    let networks: Vec<Network> = (0..pods).map(|number| Network::new(&bed, number)).collect();
    let _processes = start_each(&bed, &networks, &uids);
    publish(&bed, &uids, false, "");
    bed.start(&[]);
    let tunnel = bed.tunnel();
    assert!(tunnel.take_snapshot().is_empty());
    for some in [1, 20, pods] {
        let since = Instant::now();
        publish(&bed, &uids[..some], true, "");
        let mut first = None;
        for _ in 0..some {
            assert!(matches!(tunnel.take(), Told::Add(..)));
            first.get_or_insert_with(|| since.elapsed());
        }
        let last = since.elapsed();
        eprintln!("{some} pods: first handed over after {:?}, last after {last:?}", first.unwrap());
        // What is measured is printed; this only says that nobody waits for a scan or a timeout.
        assert!(last < Duration::from_secs(5));
        publish(&bed, &uids, false, "");
        for _ in 0..some {
            assert!(matches!(tunnel.take(), Told::Del(_)));
        }
        wait_for("the netns to be put back", || {
            bed.status()["draining"].as_array().is_some_and(Vec::is_empty).then_some(())
        });
    }
}
