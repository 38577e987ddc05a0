//! What one pod does, and what an error does, costs no other pod its place in the mesh.

use std::{
    fmt::Write as _,
    fs,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::json;
use testbed::{
    process::{Placement, Process},
    wait::{wait_at_most, wait_for},
    watcher_node::WatcherNode,
};

/// Connects again and again to an address that nobody has, and prints each change of what
/// connect(2) says at once, and every thousandth attempt. `EPERM`: the programs refuse it.
/// `EINPROGRESS`: it is on its way in clear.
const DIAL: &str = "
import errno, socket, sys, time
last, count = None, 0
while True:
    s = socket.socket(); s.setblocking(False)
    said = s.connect_ex((sys.argv[1], 80)); s.close(); count += 1
    if said != last:
        print(errno.errorcode.get(said, said), flush=True); last = said
    if count % 1000 == 0:
        print('thousand', flush=True)
    time.sleep(0.001)
";

/// A process of pod `number` that dials until it is dropped. The fake tunnel has no listeners, so
/// every connection of an enrolled pod is refused.
fn dialler(node: &WatcherNode, number: usize) -> Process {
    let log = node.dir.path().join(format!("dial-{number}.log"));
    let to = format!("10.88.{number}.99");
    Process::spawn("dialler", in_pod(node, number).command(&["python3", "-c", DIAL, &to]), &log)
}

fn in_pod(node: &WatcherNode, number: usize) -> Placement {
    let pod = &node.pods[number];
    Placement::in_cgroup(&pod.cgroup.join("container")).in_netns(&pod.netns)
}

/// What connect(2) said so far, in order.
fn verdicts(dialler: &Process) -> Vec<String> {
    dialler.output().lines().filter(|line| *line != "thousand").map(str::to_owned).collect()
}

/// Waits for so many thousand attempts more.
fn wait_thousands(dialler: &Process, more: usize) {
    let count = || dialler.output().lines().filter(|line| *line == "thousand").count();
    let until = count() + more;
    wait_for("the dialler to go on", || count() >= until);
}

/// Starts `script` in the container of pod `number`, and waits until its cgroup has `processes`.
fn run_in_pod(node: &WatcherNode, number: usize, script: &str, processes: usize) -> Process {
    let log = node.dir.path().join(format!("script-{number}.log"));
    let process = Process::spawn("script", in_pod(node, number).command(&["sh", "-c", script]), &log);
    let procs = node.pods[number].cgroup.join("container/cgroup.procs");
    wait_for("the pod's processes", || {
        fs::read_to_string(&procs).is_ok_and(|text| text.lines().count() >= processes)
    });
    process
}

fn wait_open(node: &WatcherNode, pods: &[usize]) {
    for pod in pods {
        node.wait_state(*pod, "open", "");
    }
}

fn assert_nobody_left(node: &WatcherNode) {
    let log = node.log();
    let left: Vec<&str> = log.lines().filter(|line| line.contains("pod left the mesh")).collect();
    assert!(left.is_empty(), "{left:#?}\n{log}");
}

/// A pod of 300 processes and 300 netns, and a watcher that may have 256 descriptors.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_of_many_processes_and_netns_takes_nobody_out_of_the_mesh() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    node.write_pods(&[true, true], "");
    node.start_under(&["prlimit", "--nofile=256:256"], &["--rescan", "1"]);
    let _told = node.tunnel().take_all();
    wait_open(&node, &[a, b]);
    let dialler = dialler(&node, b);
    wait_for("the first refusal", || !verdicts(&dialler).is_empty());
    let many = "for i in $(seq 300); do sleep 1000 & unshare -n sleep 1000 & done; wait";
    let _many = run_in_pod(&node, a, many, 600);
    // Some scans of everything.
    wait_thousands(&dialler, 5);
    assert_eq!(verdicts(&dialler), ["EPERM"], "a connection in clear\n{}", node.log());
    assert_nobody_left(&node);
    wait_open(&node, &[a, b]);
    // The pod is found again by a watcher that has never seen it with fewer processes.
    node.kill_watcher();
    node.start_under(&["prlimit", "--nofile=256:256"], &["--rescan", "1"]);
    let _told = node.tunnel().take_all();
    wait_open(&node, &[a, b]);
    assert_eq!(verdicts(&dialler), ["EPERM"], "a connection in clear\n{}", node.log());
}

/// While the watcher has no descriptor left, it can look at nothing. What it knew holds.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_that_cannot_be_looked_at_stays_as_it_was() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    node.write_pods(&[true, true], "");
    node.start(&["--rescan", "1"]);
    let _told = node.tunnel().take_all();
    wait_open(&node, &[a, b]);
    let dialler = dialler(&node, b);
    wait_for("the first refusal", || !verdicts(&dialler).is_empty());
    let watcher = node.watcher.as_ref().expect("watcher").pid();
    let limit = |soft: &str| {
        let words = ["--pid", &watcher.to_string(), &format!("--nofile={soft}:")];
        assert!(Command::new("prlimit").args(words).status().expect("prlimit").success());
    };
    // The lowest number that is free decides, so that no new descriptor fits.
    limit("3");
    let said = |what: &str| node.log().lines().filter(|line| line.contains(what)).count();
    wait_for("the watcher to notice", || said("os error 24") >= 1);
    // A process that comes makes it look at once, as the scans do.
    wait_thousands(&dialler, 3);
    assert_nobody_left(&node);
    limit("4096");
    assert_eq!(verdicts(&dialler), ["EPERM"], "a connection in clear\n{}", node.log());
    wait_open(&node, &[a, b]);
    wait_for("the doubt to end", || node.status()["pods"][b]["not_observed"].is_null());
    assert_nobody_left(&node);
}

/// A netns of 50,000 addresses, one of which comes and goes, in a process of the pod's.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_with_a_huge_netns_holds_up_nobody() {
    let mut node = WatcherNode::new();
    let (a, b) = (node.pod("a"), node.pod("b"));
    let batch = node.dir.path().join("addresses");
    let mut lines = String::new();
    for device in 0..20 {
        let _ = writeln!(lines, "link add d{device} type bridge");
        for number in 0..2500 {
            let (high, low) = (number / 250, number % 250 + 1);
            let _ = writeln!(lines, "addr add 10.{}.{high}.{low}/32 dev d{device}", 100 + device);
        }
    }
    fs::write(&batch, lines).expect("batch");
    node.write_pods(&[true, false], "");
    node.start(&["--rescan", "1"]);
    let _told = node.tunnel().take_all();
    wait_open(&node, &[a]);
    let ready = node.dir.path().join("ready");
    let script = format!(
        "exec unshare -n sh -c 'ip -batch {} && touch {}; while :; do ip addr add 10.99.9.9/32 dev d0; \
         ip addr del 10.99.9.9/32 dev d0; done'",
        batch.display(),
        ready.display()
    );
    let _huge = run_in_pod(&node, a, &script, 2);
    wait_at_most(Duration::from_mins(2), "the addresses", || ready.exists());
    let mut slowest = Duration::ZERO;
    for round in 0..10 {
        let enrolled = round % 2 == 0;
        let began = Instant::now();
        node.write_pods(&[true, enrolled], "");
        let wanted = if enrolled { "open" } else { "plain" };
        wait_for("the label to act", || node.status()["pods"][b]["state"] == wanted);
        slowest = slowest.max(began.elapsed());
    }
    eprintln!("slowest label {slowest:?}");
    assert!(slowest < Duration::from_secs(1), "a label took {slowest:?}");
    wait_open(&node, &[a]);
}

/// A pod that may make cgroups makes more than the kernel's map has room for.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_pod_with_many_cgroups_leaves_room_for_the_others() {
    const CGROUPS: usize = 17_000;
    let (mut node, a) = WatcherNode::with_pod(true, &["--rescan", "1"]);
    let _told = node.tunnel().take_all();
    wait_open(&node, &[a]);
    for number in 0..CGROUPS {
        fs::create_dir(node.pods[a].cgroup.join(format!("container/{number}"))).expect("cgroup");
    }
    wait_for("the pod to be looked at", || {
        node.status()["pods"][a]["cgroups"].as_object().is_some_and(|cgroups| cgroups.len() > 32)
    });
    let b = node.pod("b");
    let dialler = dialler(&node, b);
    wait_for("the first answer", || !verdicts(&dialler).is_empty());
    node.write_pods(&[true, true], "");
    wait_open(&node, &[a, b]);
    let before = verdicts(&dialler).len();
    wait_thousands(&dialler, 1);
    let after = verdicts(&dialler);
    assert!(after.len() <= before + 1 && after.last().is_some_and(|last| last == "EPERM"), "{after:?}");
    assert_eq!(node.status()["problems"], json!([]), "{}", node.log());
    let looked_at = node.status()["pods"][a]["cgroups"].as_object().expect("cgroups").len();
    assert!(looked_at < 1000, "{looked_at} cgroups");
}

/// What a pod makes that has no list of processes, or a process without a netns, is no error.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn threaded_cgroups_and_zombies_are_no_error_of_a_pod() {
    let mut node = WatcherNode::new();
    let a = node.pod("a");
    let threaded = node.pods[a].cgroup.join("container/threaded");
    fs::create_dir(&threaded).expect("cgroup");
    fs::write(threaded.join("cgroup.type"), "threaded").expect("threaded");
    let zombie = "import os,time\nif os.fork() == 0: os._exit(0)\ntime.sleep(1000)";
    let zombie = in_pod(&node, a).command(&["python3", "-c", zombie]);
    let _zombie = Process::spawn("zombie", zombie, &node.dir.path().join("zombie.log"));
    node.write_pods(&[true], "");
    node.start(&["--rescan", "1"]);
    let _told = node.tunnel().take_all();
    wait_open(&node, &[a]);
}

/// Pods that end together, on a node of many processes.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_end_of_many_pods_holds_up_nobody() {
    const PODS: usize = 40;
    let mut node = WatcherNode::new();
    let many = (0..PODS).map(|number| node.pod(&format!("p{number}"))).collect::<Vec<_>>();
    let stays = node.pod("stays");
    node.write_pods(&[true; PODS + 1], "");
    node.start(&[]);
    let _told = node.tunnel().take_all();
    wait_open(&node, &[many.clone(), vec![stays]].concat());
    let others = node.cgroup.create("others");
    let script = "for i in $(seq 3000); do sleep 1000 & done; wait";
    let log = node.dir.path().join("others.log");
    let _others =
        Process::spawn("others", Placement::in_cgroup(&others).command(&["sh", "-c", script]), &log);
    wait_for("the processes", || {
        fs::read_to_string(others.join("cgroup.procs")).is_ok_and(|text| text.lines().count() > 3000)
    });
    for pod in &many {
        node.pods[*pod].end();
    }
    let mut slowest = Duration::ZERO;
    wait_for("nothing to be waited for", || {
        let began = Instant::now();
        let status = node.status();
        slowest = slowest.max(began.elapsed());
        let gone = many.iter().all(|pod| status["pods"][*pod]["state"] == "refused");
        gone && status["draining"] == json!([])
    });
    eprintln!("slowest answer {slowest:?}");
    assert!(slowest < Duration::from_millis(500), "the loop stood still for {slowest:?}");
    for pod in &many {
        assert!(!node.pods[*pod].is_prepared());
    }
}
