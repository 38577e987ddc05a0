//! `make bench`: direct against through the mesh, side by side in one run, on this machine.
//!
//! Every variant has a cluster of its own (two nodes, a client, a server); each measurement visits
//! the variants in turn, several rounds, each second one the other way round, and the median counts,
//! so that what else the machine does meets all of them alike. With `PEER_BIN=/path/to/another/ztunnel` that binary does the same work
//! beside ours. With `SAME_NODE=1` client and server are pods of one node, with one tunnel.
//! `ROUNDS` (3) and `SECONDS` (3) size it; `ONLY=new` measures what has that in its name.

#![expect(clippy::disallowed_methods, reason = "options of make bench")]

use std::{env, fs, path::Path, process::ExitCode};

use testbed::{
    cluster::{Cluster, ClusterPod, Enrol},
    command::text,
    interrupt,
    process::Process,
    program::binary,
    wait::wait_for,
};

struct Variant {
    name: &'static str,
    cluster: Cluster,
    client: ClusterPod,
    server: ClusterPod,
}

/// What one run of a measurement gave.
#[derive(Clone, Copy, Default)]
struct Sample {
    /// Gbit/s or requests/s.
    rate: f64,
    /// CPU seconds of the client's and the server's tunnel, per GB or per request.
    cpu: [f64; 2],
}

struct Measurement {
    name: &'static str,
    unit: &'static str,
    cpu_unit: &'static str,
    run: fn(&Variant, u32) -> (f64, f64),
}

const MEASUREMENTS: &[Measurement] = &[
    Measurement { name: "bulk, 1 stream", unit: "Gbit/s", cpu_unit: "ms/GB", run: |v, s| iperf3(v, 1, s) },
    Measurement { name: "bulk, 8 streams", unit: "Gbit/s", cpu_unit: "ms/GB", run: |v, s| iperf3(v, 8, s) },
    Measurement { name: "keep-alive, 1", unit: "req/s", cpu_unit: "us/req", run: |v, s| wrk(v, 1, false, s) },
    Measurement {
        name: "keep-alive, 32",
        unit: "req/s",
        cpu_unit: "us/req",
        run: |v, s| wrk(v, 32, false, s),
    },
    Measurement {
        name: "new connections, 1",
        unit: "conn/s",
        cpu_unit: "us/conn",
        run: |v, s| wrk(v, 1, true, s),
    },
    Measurement {
        name: "new connections, 16",
        unit: "conn/s",
        cpu_unit: "us/conn",
        run: |v, s| wrk(v, 16, true, s),
    },
];

fn main() -> ExitCode {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("The benchmark loads kernel programs and makes network namespaces: run it as root.");
        return ExitCode::FAILURE;
    }
    interrupt::watch();
    let number = |name: &str, default: u32| {
        env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
    };
    let (rounds, seconds) = (number("ROUNDS", 3), number("SECONDS", 3));
    let mut variants = vec![variant("direct", None), variant("adit", Some(binary("ztunnel")))];
    if let Some(peer) = env::var_os("PEER_BIN") {
        variants.push(variant("peer", Some(peer.into())));
    }

    println!("{rounds} rounds of {seconds} s each, medians; CPU is user and system time of the client's");
    println!("and the server's tunnel; ratios are against direct\n");
    print!("{:<22}", "");
    for variant in &variants {
        print!("{:<44}", variant.name);
    }
    println!();
    let only = env::var("ONLY").unwrap_or_default();
    for measurement in MEASUREMENTS.iter().filter(|measurement| measurement.name.contains(&only)) {
        let mut samples: Vec<Vec<Sample>> = variants.iter().map(|_| Vec::new()).collect();
        for round in 0..rounds {
            let mut turns: Vec<_> = variants.iter().zip(&mut samples).collect();
            // What a variant leaves behind, such as a warm processor, meets none of the others more
            // often.
            if round % 2 == 1 {
                turns.reverse();
            }
            for (variant, samples) in turns {
                if interrupt::interrupted() {
                    println!("\nInterrupted. Removed everything it made.");
                    return ExitCode::from(130);
                }
                samples.push(measure(variant, measurement, seconds));
            }
        }
        print!("{:<22}", measurement.name);
        let mut direct = None;
        for samples in &mut samples {
            samples.sort_by(|a, b| a.rate.total_cmp(&b.rate));
            let median = samples[samples.len() / 2];
            let rate = format!("{:.*} {}", usize::from(median.rate < 100.0), median.rate, measurement.unit);
            let cell = direct.map_or_else(
                || rate.clone(),
                |direct: f64| {
                    let [client, server] = median.cpu;
                    let ratio = median.rate / direct;
                    format!("{rate} ({ratio:.2}x) {client:.0}+{server:.0} {}", measurement.cpu_unit)
                },
            );
            direct = direct.or(Some(median.rate));
            print!("{cell:<44}");
        }
        println!();
    }
    print!("{:<22}", "memory, peak");
    for variant in &variants {
        let peaks =
            tunnels(variant).map(|pid| peak_mib(pid).map_or_else(|| "-".into(), |mib| format!("{mib:.0}")));
        print!("{:<44}", format!("{}+{} MiB", peaks[0], peaks[1]));
    }
    println!();
    ExitCode::SUCCESS
}

fn variant(name: &'static str, tunnel: Option<std::path::PathBuf>) -> Variant {
    let mut cluster = Cluster::new();
    let enrol = if tunnel.is_some() { Enrol::Mesh } else { Enrol::Plain };
    let client = cluster.pod("client", 0, enrol);
    let same_node = env::var_os("SAME_NODE").is_some_and(|value| value == "1");
    let server = cluster.pod("server", usize::from(!same_node), enrol);
    cluster.serve_web(&server, "hello");
    // Through the mesh a client's connections end on its own loopback, where Linux reuses ports in
    // TIME_WAIT; the direct ones get the same, or they would measure the wait for a port.
    let ports = "sysctl -qw net.ipv4.ip_local_port_range='1024 65535' net.ipv4.tcp_tw_reuse=1";
    let set = client.exec(&["bash", "-c", ports]);
    assert!(set.status.success(), "{}", text(&set));
    let log = cluster.dir.path().join("iperf3.log");
    let iperf3 = server.spawn("iperf3", &["iperf3", "-s", "-p", "5201"], &log);
    cluster.keep(iperf3);
    if let Some(tunnel) = tunnel {
        // Foreign tunnels have no development CA; what the others have, ours gets too.
        cluster.use_certificate_service();
        cluster.start_with(&tunnel);
    }
    let url = format!("http://{}:8080/", server.v4);
    wait_for("the first answer", || client.curl(&url).ok());
    Variant { name, cluster, client, server }
}

fn measure(variant: &Variant, measurement: &Measurement, seconds: u32) -> Sample {
    let before = tunnels(variant).map(cpu_seconds);
    let (rate, work) = (measurement.run)(variant, seconds);
    let after = tunnels(variant).map(cpu_seconds);
    // Per GB in milliseconds, per request in microseconds.
    let scale = if measurement.cpu_unit == "ms/GB" { 1e3 } else { 1e6 };
    let cpu = [0, 1].map(|i| (after[i] - before[i]) / work * scale);
    Sample { rate, cpu }
}

fn tunnels(variant: &Variant) -> [Option<u32>; 2] {
    [0, 1].map(|node| variant.cluster.nodes[node].tunnel.as_ref().map(Process::pid))
}

/// Gbit/s, and GB moved.
fn iperf3(variant: &Variant, streams: u32, seconds: u32) -> (f64, f64) {
    let (streams, seconds) = (streams.to_string(), seconds.to_string());
    let words = ["iperf3", "-J", "-c", &variant.server.v4, "-p", "5201", "-P", &streams, "-t", &seconds];
    let output = variant.client.exec(&words);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let received = &report["end"]["sum_received"];
    match (received["bits_per_second"].as_f64(), received["bytes"].as_f64()) {
        (Some(rate), Some(bytes)) => (rate / 1e9, bytes / 1e9),
        _ => panic!("iperf3 over {}: {}", variant.name, text(&output)),
    }
}

/// Requests per second, and requests served.
fn wrk(variant: &Variant, connections: u32, close: bool, seconds: u32) -> (f64, f64) {
    let (connections, seconds) = (connections.to_string(), format!("{seconds}s"));
    let url = format!("http://{}:8080/", variant.server.v4);
    let mut words = vec!["wrk", "-t", "1", "-c", &connections, "-d", &seconds];
    if close {
        words.extend(["-H", "Connection: close"]);
    }
    words.push(&url);
    let output = variant.client.exec(&words);
    let text = text(&output);
    let rate = text.lines().find_map(|line| line.strip_prefix("Requests/sec:")?.trim().parse().ok());
    let served = text.lines().find_map(|line| {
        let (number, rest) = line.trim().split_once(" requests in ")?;
        let _ = rest;
        number.parse().ok()
    });
    match (rate, served) {
        (Some(rate), Some(served)) => (rate, served),
        _ => panic!("wrk over {}: {text}", variant.name),
    }
}

/// User and system time so far (proc(5), fields 14 and 15 of `stat`; a tick is 10 ms on Linux).
fn cpu_seconds(pid: Option<u32>) -> f64 {
    let stat = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok()).unwrap_or_default();
    // The name, in parentheses, may hold spaces.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

fn peak_mib(pid: Option<u32>) -> Option<f64> {
    let status = fs::read_to_string(Path::new("/proc").join(pid?.to_string()).join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}
