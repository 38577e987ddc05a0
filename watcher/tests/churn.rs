//! Pods that come and go: what their first connection meets, and what is left of them.

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

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_wrong_address_takes_a_pod_out_of_the_mesh_and_is_said() {
    let mut bed = Bed::new();
    let network = Network::new(&bed, 0);
    let dir = pods_dir(&bed).join(format!("pod{}/main", uid(0)));
    let _process = Reaped(start_in(&network, &dir, "exec sleep infinity"));
    publish(&bed, &[uid(0)], true, "");
    bed.start(&[]);
    let told = answer_all(bed.tunnel());
    bed.wait_state(0, "open", "");
    // The source comes to know the address: it is another one.
    publish(&bed, &[uid(0)], true, "  addresses: [10.9.9.9]\n");
    bed.wait_state(0, "refused", "address_not_held");
    publish(&bed, &[uid(0)], true, "  addresses: [10.100.0.1]\n");
    bed.wait_state(0, "open", "");
    drop(bed);
    let told = told.join().unwrap();
    let kinds: Vec<bool> = told
        .iter()
        .filter(|told| matches!(told, Told::Add(..) | Told::Del(_)))
        .map(|told| matches!(told, Told::Add(..)))
        .collect();
    assert_eq!(kinds, [true, false, true], "{told:?}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_visit_to_another_pods_netns_changes_nothing() {
    let mut bed = Bed::new();
    let networks = [Network::new(&bed, 0), Network::new(&bed, 1)];
    let pods = pods_dir(&bed);
    let dir = |number| pods.join(format!("pod{}/main", uid(number)));
    let _processes: Vec<Reaped> = (0..2)
        .map(|number| Reaped(start_in(&networks[number], &dir(number), "exec sleep infinity")))
        .collect();
    publish(&bed, &[uid(0), uid(1)], true, "");
    bed.start(&[]);
    let told = answer_all(bed.tunnel());
    bed.wait_state(0, "open", "");
    bed.wait_state(1, "open", "");
    let before = bed.status()["pods"].clone();
    // A process of the first pod enters the second one's netns, and one that never was anywhere else does.
    let enter = format!("nsenter --net=/run/netns/{} sleep 1000 & exec sleep 1000", networks[1].name);
    let visitor = Reaped(start_in(&networks[0], &dir(0).with_file_name("visitor"), &enter));
    let second = Reaped(start_in(&networks[1], &dir(0).with_file_name("second"), "exec sleep 1000"));
    let cgroups = |status: &serde_json::Value| status["cgroups"].as_object().map_or(0, serde_json::Map::len);
    wait_for("the new containers to be seen", || {
        (cgroups(&bed.status()["pods"][0]) == cgroups(&before[0]) + 2).then_some(())
    });
    for number in 0..2 {
        let now = bed.status()["pods"][number].clone();
        for key in ["state", "netns", "addresses"] {
            assert_eq!(now[key], before[number][key], "{key} of pod {number}");
        }
    }
    drop((visitor, second));
    drop(bed);
    let told = told.join().unwrap();
    assert!(!told.iter().any(|told| matches!(told, Told::Del(_))), "{told:?}");
}

/// Whether the kernel would answer a LISTEN from here.
fn connector_is_there() -> bool {
    let root = watcher::observed::cgroups::find_root().expect("cgroup2");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async { watcher::observed::events::connector::Connector::open(&root, &root).is_ok() })
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_reused_address_is_the_new_pods_from_the_first_moment_on() {
    let mut bed = Bed::new();
    let rounds = count("ADIT_REUSED_ADDRESSES", 40);
    publish(&bed, &[], true, "");
    bed.start(&[]);
    let told = answer_all(bed.tunnel());
    for round in 0..rounds {
        // The same address in a new netns, for a new uid.
        let network = Network::new(&bed, 0);
        publish(&bed, &[uid(round)], true, "  addresses: [10.100.0.1]\n");
        let pod = pods_dir(&bed).join(format!("pod{}", uid(round)));
        let process = start_in(&network, &pod.join("main"), "exec sleep infinity");
        wait_for("the pod to be open", || {
            let status = bed.status();
            let pod = &status["pods"][0];
            (pod["uid"] == uid(round) && pod["state"] == "open").then_some(())
        });
        end(process);
        remove(&pod);
    }
    drop(bed);
    let told = told.join().unwrap();
    let added: Vec<&String> = told
        .iter()
        .filter_map(|told| match told {
            Told::Add(uid, _) => Some(uid),
            _ => None,
        })
        .collect();
    let expected: Vec<String> = (0..rounds).map(uid).collect();
    assert_eq!(added, expected.iter().collect::<Vec<_>>());
}

/// What a watcher holds: fds, and kilobytes of memory.
fn holds(bed: &Bed) -> (usize, u64) {
    let pid = bed.status()["pid"].as_u64().expect("a pid");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let rss = rss.trim().trim_end_matches(" kB").parse().expect("a number");
    (fs::read_dir(format!("/proc/{pid}/fd")).expect("fds").count(), rss)
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn pods_that_came_and_went_leave_nothing() {
    let mut bed = Bed::new();
    let (pods, at_once) = (count("ADIT_CHURN_PODS", 120), 10);
    publish(&bed, &[], true, "");
    bed.start(&[]);
    let told = answer_all(bed.tunnel());
    let networks: Vec<Network> = (0..at_once).map(|number| Network::new(&bed, number)).collect();
    let pins = bed.pins();
    let mut before = None;
    for batch in 0..pods / at_once {
        let uids: Vec<String> = (0..at_once).map(|i| uid(batch * at_once + i)).collect();
        let dirs: Vec<PathBuf> =
            uids.iter().map(|uid| pods_dir(&bed).join(format!("besteffort/pod{uid}"))).collect();
        publish(&bed, &uids, true, "");
        let processes: Vec<Child> = networks
            .iter()
            .zip(&dirs)
            .map(|(network, dir)| start_in(network, &dir.join("main"), "exec sleep infinity"))
            .collect();
        wait_for("the pods to be open", || {
            let status = bed.status();
            let pods = status["pods"].as_array().unwrap();
            let open = pods.iter().filter(|pod| pod["state"] == "open").count();
            (open == at_once && pods.iter().all(|pod| uids.iter().any(|uid| pod["uid"] == **uid)))
                .then_some(())
        });
        processes.into_iter().for_each(end);
        for dir in &dirs {
            remove(dir);
        }
        publish(&bed, &[], true, "");
        wait_for("everything to be put back", || {
            let status = bed.status();
            let gone = |key: &str| status[key].as_array().is_some_and(Vec::is_empty);
            (gone("pods") && gone("lingering") && bed.pins().len() <= pins.len() + 6).then_some(())
        });
        // After the first batch, which fills caches.
        before.get_or_insert_with(|| holds(&bed));
    }
    for network in &networks {
        let rules = run(&format!("ip -n {} rule", network.name));
        assert!(!rules.contains("0x539"), "{rules}");
    }
    let (before, after) = (before.unwrap(), holds(&bed));
    // One more may have been open for a moment when it was counted first.
    assert!(after.0 <= before.0, "{} fds, {} before", after.0, before.0);
    assert!(after.1 < before.1 + 8192, "{} kB after {pods} pods, {} kB before", after.1, before.1);
    assert_eq!(bed.status()["events"]["lost"], 0);
    let links = bed.pins().into_iter().filter(|pin| pin.to_string_lossy().contains("links/netns-")).count();
    assert_eq!(links, 0, "links of netns");
    assert!(!bed.dir.path().join("run").join(&bed.name).join("records.json").exists() || links == 0);
    drop(bed);
    told.join().unwrap();
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn killed_at_any_moment_the_watcher_comes_back_to_the_right_state() {
    let mut bed = Bed::new();
    let (kills, pods) = (count("ADIT_KILLS", 6), 8);
    let uids: Vec<String> = (0..pods).map(uid).collect();
    let networks: Vec<Network> = (0..pods).map(|number| Network::new(&bed, number)).collect();
    let _processes: Vec<Reaped> = networks
        .iter()
        .zip(&uids)
        .map(|(network, uid)| {
            let dir = pods_dir(&bed).join(format!("pod{uid}/main"));
            Reaped(start_in(network, &dir, "exec sleep infinity"))
        })
        .collect();
    for round in 0..kills {
        // Half of the pods change with every round, and the watcher dies somewhere in the middle of it.
        publish(&bed, &uids[round % 2 * pods / 2..][..pods / 2], true, "");
        bed.start(&[]);
        let told = answer_all(bed.tunnel());
        publish(&bed, &uids[(round + 1) % 2 * pods / 2..][..pods / 2], true, "");
        thread::sleep(Duration::from_millis((round as u64 * 7) % 40));
        bed.watcher.as_ref().unwrap().signal(Signal::SIGKILL);
        assert!(!bed.watcher.as_mut().unwrap().wait());
        bed.watcher = None;
        told.join().unwrap();
    }
    publish(&bed, &uids[..1], true, "");
    bed.start(&["--detach"]);
    let told = answer_all(bed.tunnel());
    bed.wait_state(0, "open", "");
    wait_for("what the killed ones left to be put back", || {
        let status = bed.status();
        let others = networks[1..]
            .iter()
            .any(|network| run(&format!("ip -n {} rule", network.name)).contains("0x539"));
        (status["lingering"].as_array().is_some_and(Vec::is_empty) && !others).then_some(())
    });
    let links = bed.pins().into_iter().filter(|pin| pin.to_string_lossy().contains("links/netns-")).count();
    assert_eq!(links, 1);
    drop(bed);
    told.join().unwrap();
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
    let _processes: Vec<Reaped> = networks
        .iter()
        .zip(&uids)
        .map(|(network, uid)| {
            let dir = pods_dir(&bed).join(format!("pod{uid}/main"));
            Reaped(start_in(network, &dir, "exec sleep infinity"))
        })
        .collect();
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
            bed.status()["lingering"].as_array().is_some_and(Vec::is_empty).then_some(())
        });
    }
}

/// Processes that the machine has started, and the CPU time of a process, in ticks of 10 ms.
fn started_and_spent(pid: u64) -> (u64, u64) {
    let stat = fs::read_to_string("/proc/stat").expect("stat");
    let started = stat.lines().find_map(|line| line.strip_prefix("processes ")).expect("processes");
    let own = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    // What follows the name, which may hold anything: state, …; the 14th and 15th are user and system time.
    let fields: Vec<&str> = own.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks = |i: usize| fields[i].parse::<u64>().expect("ticks");
    (started.trim().parse().expect("a number"), ticks(11) + ticks(12))
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_storm_of_processes_hides_no_pod() {
    let storm = std::env::var("ADIT_STORM").unwrap_or_else(|_| "while :; do /bin/true; (:); done".to_owned());
    let mut bed = Bed::new();
    let networks: Vec<Network> = (0..6).map(|number| Network::new(&bed, number)).collect();
    let dir = |bed: &Bed, number| pods_dir(bed).join(format!("pod{}/main", uid(number)));
    let uids: Vec<String> = (0..networks.len()).map(uid).collect();
    publish(&bed, &uids, true, "");
    bed.start(&[]);
    let told = answer_all(bed.tunnel());
    let pid = bed.status()["pid"].as_u64().expect("a pid");
    let mut running = Vec::new();
    for (place, stormy) in [("a pod", dir(&bed, 0)), ("elsewhere", bed.cgroup.join("watcher/storm"))] {
        let storms: Vec<Reaped> = (0..2).map(|_| Reaped(start_in(&networks[0], &stormy, &storm))).collect();
        if place == "a pod" {
            bed.wait_state(0, "open", "");
        }
        let (since, before) = (Instant::now(), started_and_spent(pid));
        let second = usize::from(place != "a pod") * 2;
        let new: Vec<Reaped> = (1..3)
            .map(|number| {
                let dir = dir(&bed, number + second);
                Reaped(start_in(&networks[number + second], &dir, "exec sleep 1000"))
            })
            .collect();
        for number in 1..3 {
            bed.wait_state(number + second, "open", "");
        }
        // For a while, so that the rate says something.
        wait_for("three seconds of storm", || (since.elapsed() > Duration::from_secs(3)).then_some(()));
        let after = started_and_spent(pid);
        let seconds = since.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let (rate, cpu) = ((after.0 - before.0) as f64 / seconds, (after.1 - before.1) as f64 / seconds);
        eprintln!(
            "storm in {place}: {rate:.0} processes a second, watcher {cpu:.1} % of a core, {}",
            bed.status()["events"]
        );
        drop(storms);
        running.extend(new);
    }
    drop(running);
    drop(bed);
    told.join().unwrap();
}
