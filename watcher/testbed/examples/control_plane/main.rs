//! `make bench-control`: what a cluster costs `ztunnel-control`, and how soon tunnels hear of changes.
//!
//! The API server and its store are real, and so is the program, with the chart's rights. Pods, services
//! and nodes are objects only, whose statuses nobody but this program changes. Each node has a tunnel: a
//! connection with a token of its own, that subscribes to everything and acknowledges it.
//!
//! * `cluster`: fills the API server
//! * `tunnels`: what the tunnels hear
//! * `usage`: processor time and memory of the program
//!
//! `PODS` (10000), `SERVICES` (1000), `NODES` (200), `POLICIES` (0) and `CHANGES` (100) size it.

#![expect(clippy::disallowed_methods, reason = "options of make bench-control; its tasks end with it")]
#![expect(unreachable_pub, reason = "modules of a program share types; nothing else can reach them")]
#![expect(missing_docs, missing_debug_implementations, reason = "a program, not a library")]

mod cluster;
mod tunnels;
mod usage;

use std::{
    env,
    net::TcpListener,
    path::Path,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use testbed::{api_server::ApiServer, chart, process::KillOnDrop, program::binary, wait::wait_at_most};

use self::{cluster::Cluster, tunnels::Tunnels, usage::Usage};

/// What is asked for.
const MOST_MEMORY: f64 = 300.0;
const LONGEST: Duration = Duration::from_secs(1);

/// Between two changes.
const PAUSE: Duration = Duration::from_millis(200);
/// How long tunnels may take to hear of everything.
const LIMIT: Duration = Duration::from_mins(5);

/// How large it is.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub pods: usize,
    pub services: usize,
    pub nodes: usize,
    pub policies: usize,
    pub changes: usize,
}

fn sizes() -> Sizes {
    let number = |name: &str, default| {
        env::var(name)
            .ok()
            .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}: a number")))
    };
    Sizes {
        pods: number("PODS", 10_000),
        services: number("SERVICES", 1000),
        nodes: number("NODES", 200),
        policies: number("POLICIES", 0),
        changes: number("CHANGES", 100),
    }
}

/// Starts the program. Returns when it is ready.
fn start(kubeconfig: &Path, port: u16) -> KillOnDrop {
    let http = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port");
    let mut command = Command::new(binary("ztunnel-control"));
    command
        .args(["--listen", &format!("127.0.0.1:{port}"), "--http-listen", &http.to_string()])
        .args(["--server-name", "localhost"])
        .envs([("RUST_LOG", "error"), ("KUBECONFIG", kubeconfig.to_str().expect("a path"))])
        .stdin(Stdio::null());
    let process = KillOnDrop(command.spawn().expect("ztunnel-control"));
    wait_at_most(LIMIT, "it to be ready", || {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(http).ok()?;
        stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.contains("200 OK").then_some(())
    });
    process
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

/// Prints the times after which shares of `times` are over. Returns the 99th percentile.
fn report(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    let [half, most, all] = [50, 99, 100].map(|percent| at(percent).as_secs_f64() * 1e3);
    println!("{what:<46} p50 {half:>6.0} ms   p99 {most:>6.0} ms   max {all:>6.0} ms");
    at(99)
}

fn main() -> ExitCode {
    let sizes = sizes();
    let Sizes { pods, services, nodes, policies, changes } = sizes;
    println!("{pods} pods, {services} services, {policies} policies, {nodes} nodes with a tunnel each\n");
    let api = ApiServer::start_with(&[
        "--disable-admission-plugins=ServiceAccount",
        "--max-requests-inflight=2000",
        "--max-mutating-requests-inflight=1000",
    ]);
    api.apply(&chart::template("standalone", "control-rbac.yaml", &[]));
    api.apply(&chart::template("standalone", "control-policy-crd.yaml", &[]));
    let began = Instant::now();
    let cluster = Cluster::fill(&api, sizes);
    println!("filled in {}", seconds(began.elapsed()));
    let uid = api.pod(
        "adit-system",
        "control",
        "control",
        &json!({"spec": {"serviceAccountName": "ztunnel-control"}}),
    );
    let kubeconfig = api.kubeconfig_of_pod("adit-system", "ztunnel-control", Some(("control", &uid)));
    let tokens = cluster.tokens(nodes);
    let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").port();

    let began = Instant::now();
    let mut control = start(&kubeconfig, port);
    let mut usage = Usage::of(&control);
    println!("ready after {}, {:.0} MB", seconds(began.elapsed()), usage.memory());

    let began = Instant::now();
    let mut tunnels = Tunnels::start(port, cluster.root(), tokens);
    let everything = tunnels.until_all_know(LIMIT);
    println!(
        "{nodes} new tunnels at once: the last one knows {everything} resources after {}, {:.2} s of processor, peak {:.0} MB",
        seconds(began.elapsed()),
        usage.processor().as_secs_f64(),
        usage.peak()
    );
    let mut peak = usage.peak();
    thread::sleep(Duration::from_secs(10));
    println!(
        "nothing happens for 10 s: {:.2} s of processor, {:.0} MB",
        usage.processor().as_secs_f64(),
        usage.memory()
    );

    let (mut requests, mut heard) = (Vec::new(), Vec::new());
    for change in 0..changes.min(pods) {
        let began = Instant::now();
        let name = cluster.change(change);
        requests.push(began.elapsed());
        let times = tunnels.until_all_heard(&name, LIMIT);
        heard.extend(times.into_iter().map(|at| at.duration_since(began)));
        thread::sleep(PAUSE.saturating_sub(began.elapsed()));
    }
    let per_change = usage.processor() / u32::try_from(changes.max(1)).expect("a number");
    report("a change: the request alone", requests);
    let p99 = report("a change: until a tunnel has heard of it", heard);
    println!("processor time for each change: {:.1} ms", per_change.as_secs_f64() * 1e3);

    let rolled: Vec<usize> =
        (0..500.min(pods.saturating_sub(changes))).map(|number| pods - 1 - number).collect();
    let began = Instant::now();
    let names = cluster.change_all(&rolled);
    let all_sent = began.elapsed();
    for name in &names {
        tunnels.until_all_heard(name, LIMIT);
    }
    println!(
        "{} changes at once: requests for {}, the last tunnel has heard of the last after {}, {:.2} s of processor",
        names.len(),
        seconds(all_sent),
        seconds(began.elapsed()),
        usage.processor().as_secs_f64()
    );
    peak = peak.max(usage.peak());

    // As with -9: it says farewell to nobody.
    tunnels.come_back();
    drop(control);
    let began = Instant::now();
    control = start(&kubeconfig, port);
    let ready = began.elapsed();
    let mut usage = Usage::of(&control);
    tunnels.until_all_know(LIMIT);
    println!(
        "killed and started again: ready after {}, all tunnels are told after {}, {:.2} s of processor, peak {:.0} MB, {} connections",
        seconds(ready),
        seconds(began.elapsed()),
        usage.processor().as_secs_f64(),
        usage.peak(),
        tunnels.connections()
    );
    peak = peak.max(usage.peak());
    let holds = peak <= MOST_MEMORY && p99 <= LONGEST;
    println!(
        "\npeak {peak:.0} MB of {MOST_MEMORY:.0}, p99 {} of {}: {}",
        seconds(p99),
        seconds(LONGEST),
        if holds { "holds" } else { "DOES NOT HOLD" }
    );
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
