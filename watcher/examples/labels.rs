//! `make bench-labels`: how long a label takes, from the request to a real API server until the pods are open, and back.
//!
//! Pods are processes in netns and pod-shaped cgroups; the tunnel takes every pod at once, so what is measured is
//! the API server, the watcher and the kernel. A pod is open when the watcher has told the kernel programs so: the next
//! connect is captured. `ROUNDS` (30) sizes it; `KEEP_LOG=FILE` keeps the watcher's log.

#[path = "../tests/api_server/mod.rs"]
mod api_server;
#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    collections::BTreeSet,
    env, fs,
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
    sync::mpsc,
    time::{Duration, Instant},
};

use api_server::node::Node;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use support::{Told, wait_for};

const PODS: usize = 60;

/// From `since` to each time that the log has told of since then, in milliseconds.
fn opened(log: &str, since: Timestamp) -> Vec<f64> {
    log.lines()
        .filter(|line| line.contains("pod open"))
        .filter_map(|line| line.split_ascii_whitespace().next()?.parse::<Timestamp>().ok())
        .filter(|at| *at >= since)
        .map(|at| at.duration_since(since).as_secs_f64() * 1e3)
        .collect()
}

fn text_after(path: &Path, offset: u64) -> String {
    let mut text = Vec::new();
    let mut file = fs::File::open(path).expect("the log");
    file.seek(SeekFrom::Start(offset)).expect("seek");
    file.read_to_end(&mut text).expect("the log");
    String::from_utf8_lossy(&text).into_owned()
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "small numbers"
    )]
    let place = (share * (sorted.len() - 1) as f64).round() as usize;
    sorted[place]
}

fn report(what: &str, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    let [p50, p99, most] = [0.5, 0.99, 1.0].map(|share| percentile(&times, share));
    println!("{what:<28} p50 {p50:>7.2} ms   p99 {p99:>7.2} ms   max {most:>7.2} ms");
}

fn main() {
    let rounds: usize = env::var("ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
    let mut node = Node::new(&json!({}));
    node.bed.env.push("RUST_LOG=info,watcher::node::asked=debug".to_owned());
    let uids: Vec<String> = (0..PODS).map(|number| node.pod(&format!("p{number}"), &json!({})).1).collect();
    node.bed.start(&[]);
    node.wait_ready();
    let log = node.bed.dir.path().join("watcher.log");
    let tunnel = node.tunnel();
    assert!(tunnel.take_snapshot().is_empty());
    let (sender, told) = mpsc::channel();
    std::thread::spawn(move || {
        loop {
            let told = tunnel.take();
            let over = told == Told::Closed;
            if sender.send((Instant::now(), told)).is_err() || over {
                return;
            }
        }
    });
    for some in [1, 20, PODS] {
        // One request each time: a pod's own label for one, the namespace's for more, from which the others opt out.
        let chosen: BTreeSet<&String> = uids.iter().take(some).collect();
        for number in 0..PODS {
            let stays_out = if some == 1 || number >= some { json!("none") } else { Value::Null };
            let labels = json!({"metadata": {"labels": {"istio.io/dataplane-mode": stays_out}}});
            node.api.patch_pod(&node.namespace, &format!("p{number}"), &labels);
        }
        let ask = |mode: Value| {
            if some == 1 {
                let mode = if mode.is_null() { json!("none") } else { mode };
                let labels = json!({"metadata": {"labels": {"istio.io/dataplane-mode": mode}}});
                node.api.patch_pod(&node.namespace, "p0", &labels);
            } else {
                node.api.label_namespace(&node.namespace, &json!({"istio.io/dataplane-mode": mode}));
            }
        };
        let (mut asked, mut on, mut off) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..rounds + 3 {
            // Only what comes: reading all of it again and again would take the time that is measured.
            let before = fs::metadata(&log).map_or(0, |found| found.len());
            let since = Timestamp::now();
            ask(json!("ambient"));
            let requested = Timestamp::now().duration_since(since).as_secs_f64() * 1e3;
            let opened = wait_for("all of them to be open", || {
                let opened = opened(&text_after(&log, before), since);
                (opened.len() >= some).then_some(opened)
            });
            // What is written back meanwhile should not meet the next request, as it would not in real life.
            std::thread::sleep(Duration::from_millis(some as u64 * 60));
            while told.try_recv().is_ok() {}
            let since = Instant::now();
            ask(Value::Null);
            let mut last = since;
            let mut waiting = chosen.clone();
            while !waiting.is_empty() {
                let (at, told) = told.recv_timeout(Duration::from_secs(15)).expect("to be told");
                if let Told::Del(uid) = told {
                    waiting.remove(&uid);
                    last = at;
                }
            }
            std::thread::sleep(Duration::from_millis(some as u64 * 60));
            // The first ones warm up.
            if round >= 3 {
                asked.push(requested);
                on.push(opened.into_iter().fold(0.0, f64::max));
                off.push(last.duration_since(since).as_secs_f64() * 1e3);
            }
        }
        report(&format!("{some} labelled, all open"), on);
        report("  until the request returned", asked);
        report(&format!("{some} taken off, all told"), off);
    }
    if let Ok(path) = env::var("KEEP_LOG") {
        fs::write(path, node.bed.log()).expect("log");
    }
}
