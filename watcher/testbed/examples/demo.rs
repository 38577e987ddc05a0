//! `make demo`: two nodes, five pods, real kernel programs and real HBONE, on this machine.
//!
//! It is a demonstration and says so: the nodes are network namespaces, the pods are cgroups and
//! network namespaces, workloads and certificates come from files. In a cluster they come from the
//! API server and a control plane. Everything it makes is removed at its end, also on Ctrl-C.

use std::{
    collections::BTreeSet,
    fs,
    io::IsTerminal as _,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use testbed::{
    cluster::{Cluster, ClusterPod, Enrol, WEB_V4, WEB_V6},
    command::text,
    interrupt,
    process::Process,
    program::binary,
    traffic::RequestLoop,
    wait::wait_for,
};

fn main() -> ExitCode {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("The demo loads kernel programs and makes network namespaces: run it as root.");
        return ExitCode::FAILURE;
    }
    interrupt::watch();
    let started = Instant::now();
    let mut cluster = Cluster::new();
    let shown = show(&mut cluster);
    drop(cluster);
    match shown {
        Ok(()) => {
            println!("\nRemoved everything it made. {:.0} s.", started.elapsed().as_secs_f32());
            ExitCode::SUCCESS
        }
        Err(Ended::Interrupted) => {
            println!("\nInterrupted. Removed everything it made.");
            ExitCode::from(130)
        }
        Err(Ended::Failed(why)) => {
            eprintln!("\nThe demo failed: {why}");
            ExitCode::FAILURE
        }
    }
}

enum Ended {
    Interrupted,
    Failed(String),
}

impl From<String> for Ended {
    fn from(why: String) -> Self {
        // A program that Ctrl-C ended fails; that is not why the demo ends.
        if interrupt::interrupted() { Self::Interrupted } else { Self::Failed(why) }
    }
}

fn step(title: &str) -> Result<(), Ended> {
    if interrupt::interrupted() {
        return Err(Ended::Interrupted);
    }
    if std::io::stdout().is_terminal() {
        println!("\n\x1b[1m{title}\x1b[0m");
    } else {
        println!("\n{title}");
    }
    Ok(())
}

fn say(text: &str) {
    for line in text.trim_end().lines() {
        println!("  {line}");
    }
}

fn show(cluster: &mut Cluster) -> Result<(), Ended> {
    step("Two nodes, made of network namespaces, and five pods, made of cgroups and network namespaces")?;
    let client = cluster.pod("client", 0, Enrol::Mesh);
    let v1 = cluster.pod("web-v1", 0, Enrol::Mesh);
    let v2 = cluster.pod("web-v2", 1, Enrol::Mesh);
    let plain_client = cluster.pod("plain-client", 0, Enrol::Plain);
    let plain_server = cluster.pod("plain-server", 1, Enrol::Plain);
    cluster.serve_web(&v1, "hello from web-v1");
    cluster.serve_web(&v2, "hello from web-v2");
    cluster.serve_web(&plain_server, "hello from plain-server");
    // Not a version of `web`: it only answers under its own address.
    if let Some(pod) = cluster.pods.iter_mut().find(|pod| pod.name == plain_server.name) {
        pod.serves_web = false;
    }
    for pod in &cluster.pods {
        let label = if pod.enrol == Enrol::Mesh { "istio.io/dataplane-mode=ambient" } else { "(no label)" };
        say(&format!(
            "node {}  {:<13} {:<12} {:<12} {label}",
            cluster.nodes[pod.node].name, pod.name, pod.v4, pod.v6
        ));
    }
    say(&format!(
        "service web: {WEB_V4} and {WEB_V6}, port 80 -> web-v1 (node a) and web-v2 (node b), port 8080"
    ));

    step("On each node a watcher and a tunnel; the label enrols the running pods")?;
    cluster.start();
    for node in &cluster.nodes {
        say(&text(&node.watcher_command(&["status", "pods"])));
    }

    both_greetings(cluster, &client)?;
    plain_peers(cluster, &plain_client, &v2, &client, &plain_server)?;
    label_off_and_on(cluster, &client, &v2)?;
    kernel_lines(cluster, &client, &v2)
}

fn both_greetings(cluster: &Cluster, client: &ClusterPod) -> Result<(), Ended> {
    step("An unmodified curl in `client` asks service web until both versions have answered")?;
    let wire = cluster.dir.path().join("wire.pcap");
    let mut capture = capture_between_nodes(cluster, &wire)?;
    for address in [WEB_V4.to_owned(), format!("[{WEB_V6}]")] {
        let mut seen = BTreeSet::new();
        for _ in 0..60 {
            let greeting = client.curl(&format!("http://{address}/"))?;
            if seen.insert(greeting.clone()) {
                say(&format!("curl http://{address}/  ->  {greeting}"));
            }
            if seen.len() == 2 {
                break;
            }
        }
        if seen.len() != 2 {
            return Err(format!("only {seen:?} answered in 60 requests").into());
        }
    }
    step("The tunnels' records of one such connection across the nodes: the identities at either end")?;
    let across =
        |node: usize, direction: &str| {
            wait_for("an access record", || {
                cluster.nodes[node].access_log().into_iter().rev().find(|line| {
                    line.contains(&format!("direction=\"{direction}\"")) && line.contains("web-v2")
                })
            })
        };
    for (node, direction) in [(0, "outbound"), (1, "inbound")] {
        say(&format!("node {}: {}", cluster.nodes[node].name, identities(&across(node, direction))));
    }
    step("What was on the wire between the nodes meanwhile")?;
    capture.stop(Duration::from_secs(3));
    let (packets, strangers) = read_capture(&wire)?;
    say(&format!("{packets} TCP packets, {strangers} of them neither from nor to port 15008"));
    let bytes = fs::read(&wire).map_err(|e| e.to_string())?;
    let readable = contains(&bytes, b"hello from") || contains(&bytes, b"HTTP/1.1");
    let tls = contains(&bytes, &[0x16, 0x03, 0x01]);
    say(&format!("TLS handshakes seen: {}; greetings or HTTP readable: {}", yes(tls), yes(readable)));
    if packets == 0 || strangers != 0 || readable || !tls {
        return Err("something else than TLS to 15008 crossed the wire".to_owned().into());
    }
    Ok(())
}

fn plain_peers(
    cluster: &Cluster,
    plain_client: &ClusterPod,
    v2: &ClusterPod,
    client: &ClusterPod,
    plain_server: &ClusterPod,
) -> Result<(), Ended> {
    step("A client without the label reaches an enrolled server, through the tunnel's port 15006")?;
    let greeting = plain_client.curl(&format!("http://{}:8080/", v2.v4))?;
    say(&format!("plain-client: curl http://{}:8080/  ->  {greeting}", v2.v4));
    let record = wait_for("an access record", || {
        cluster.nodes[1].access_log().into_iter().rev().find(|line| line.contains(&plain_client.v4))
    });
    say(&format!("node b: {}", identities(&record)));

    step("An enrolled client reaches a server without the label")?;
    let greeting = client.curl(&format!("http://{}:8080/", plain_server.v4))?;
    say(&format!("client: curl http://{}:8080/  ->  {greeting}", plain_server.v4));
    Ok(())
}

fn label_off_and_on(cluster: &mut Cluster, client: &ClusterPod, v2: &ClusterPod) -> Result<(), Ended> {
    step("The label is taken off and put back, five times, while a loop of requests runs")?;
    // Not the service's address: it leads nowhere outside the mesh.
    let url = format!("http://{}:8080/", v2.v4);
    let requests = RequestLoop::start(client, &url, &cluster.dir.path().join("loop"));
    let names = ["client", "web-v1", "web-v2"];
    let mut slowest = Duration::ZERO;
    for _ in 0..5 {
        for enrol in [Enrol::Plain, Enrol::Mesh] {
            if interrupt::interrupted() {
                return Err(Ended::Interrupted);
            }
            let since = Instant::now();
            cluster.label(&names, enrol);
            slowest = slowest.max(since.elapsed());
            requests.more(10);
        }
    }
    let (all, failed) = requests.finish();
    say(&format!(
        "{all} requests, {} failed; the slowest change took {} ms, everything included",
        failed.len(),
        slowest.as_millis()
    ));
    if failed.is_empty() { Ok(()) } else { Err(format!("failed requests: {failed:?}").into()) }
}

fn kernel_lines(cluster: &Cluster, client: &ClusterPod, v2: &ClusterPod) -> Result<(), Ended> {
    step("The kernel's verdicts for one connection (watcher trace, on either node)")?;
    let watcher = binary("watcher");
    let mut traces = Vec::new();
    for node in &cluster.nodes {
        let log = node.dir.join("trace.log");
        let status = node.status_socket();
        let words = [
            watcher.to_str().ok_or_else(|| "path".to_owned())?,
            "trace",
            "--node",
            &node.pins_name,
            "--status-socket",
            status.to_str().ok_or_else(|| "path".to_owned())?,
            "--port",
            "8080",
        ];
        let command = node.at(&node.cgroup.join("watcher")).command(&words);
        traces.push((node, Process::spawn("trace", command, &log), log));
    }
    // Repeated until seen on both: the first may come before the switch is on.
    for (node, trace, log) in &mut traces {
        wait_for("a line of the trace", || {
            let said = fs::read_to_string(&*log).unwrap_or_default();
            assert!(trace.is_running(), "watcher trace ended: {said}");
            client.curl(&format!("http://{}:8080/", v2.v4)).ok()?;
            let line = fs::read_to_string(&*log).ok()?.lines().find(|line| line.contains(&v2.v4))?.to_owned();
            say(&format!("node {}: {line}", node.name));
            Some(())
        });
        trace.stop(Duration::from_secs(3));
    }
    Ok(())
}

fn capture_between_nodes(cluster: &Cluster, file: &std::path::Path) -> Result<Process, Ended> {
    let node = &cluster.nodes[0];
    let path = file.to_str().ok_or_else(|| "path".to_owned())?;
    // -Z root: tcpdump else becomes a user who may not write into the cluster's folder.
    let words = ["tcpdump", "-i", "link0", "-U", "-Z", "root", "-w", path, "tcp"];
    let log = cluster.dir.path().join("tcpdump.log");
    let capture = Process::spawn("tcpdump", node.at(&node.cgroup.join("watcher")).command(&words), &log);
    wait_for("tcpdump to listen", || fs::read_to_string(&log).ok()?.contains("listening on").then_some(()));
    Ok(capture)
}

/// How many packets were captured, and how many of them neither come from nor go to 15008.
fn read_capture(file: &std::path::Path) -> Result<(usize, usize), Ended> {
    let count = |filter: &str| -> Result<usize, Ended> {
        let output = Command::new("tcpdump")
            .args(["-n", "-r"])
            .arg(file)
            .arg(filter)
            .output()
            .map_err(|e| format!("tcpdump: {e}"))?;
        Ok(output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count())
    };
    Ok((count("tcp")?, count("tcp and not port 15008")?))
}

/// The fields of an access record that tell who spoke with whom.
fn identities(record: &str) -> String {
    let wanted =
        ["src.addr=", "src.identity=", "dst.addr=", "dst.hbone_addr=", "dst.identity=", "direction="];
    let fields: Vec<&str> =
        record.split_whitespace().filter(|field| wanted.iter().any(|name| field.starts_with(name))).collect();
    fields.join("\n        ")
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

fn yes(it_is: bool) -> &'static str {
    if it_is { "yes" } else { "no" }
}
