//! `make bench-labels`: how long a label takes, from the request to a real API server until the
//! connections of a pod are of the new kind, and back; and which connections the change breaks.
//!
//! Then how long the first connection of a new pod takes, in the mesh and outside it.
//!
//! A real watcher and a real tunnel serve 1, 20 and 60 pods that talk meanwhile.
//! `testbed::label_latency` explains the measurement. `ROUNDS` (30) and `PODS` (`1 20 60`) size it.

#![expect(clippy::disallowed_methods, reason = "options of make bench-labels")]

use std::{collections::BTreeMap, env, time::Duration};

use testbed::{
    label_latency::{LabelLatency, Samples},
    roles,
};

/// New pods of one kind; the cluster has an address for each.
const MOST_ARRIVALS: usize = 50;
/// Later than any pod changes.
const WITHIN: Duration = Duration::from_millis(100);

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// For pods that connect once each in a round: the times by which shares of them were of the new
/// kind.
fn report_sampled(what: &str, sampled: &mut Samples) {
    let mut at = |share| {
        sampled
            .reached(share)
            .map_or_else(|| "never".to_owned(), |time| format!("{:.1} ms", milliseconds(time)))
    };
    println!("{what:<34} p50 {:>10}   p90 {:>10}   p99 {:>10}", at(0.5), at(0.9), at(0.99));
}

fn report(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |percent: usize| milliseconds(times[(times.len() - 1) * percent / 100]);
    println!("{what:<34} p50 {:>7.1} ms   p99 {:>7.1} ms   max {:>7.1} ms", at(50), at(99), at(100));
}

/// Waits until the states of so many pods are written back to the API server, so that the writes do
/// not meet the next request: in real life they would not.
fn written_back(pods: usize) {
    std::thread::sleep(Duration::from_millis(300 + 20 * pods as u64));
}

fn main() {
    if roles::serve() {
        return;
    }
    let rounds: usize = env::var("ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
    let counts = env::var("PODS").unwrap_or_else(|_| "1 20 60".to_owned());
    for pods in counts.split_whitespace().map(|count| count.parse().expect("PODS: numbers")) {
        let mut measured = LabelLatency::new(pods);
        let (mut times, mut requests, mut failures) = ([Vec::new(), Vec::new()], Vec::new(), Vec::new());
        for round in 0..rounds + 3 {
            for (on, times) in [true, false].into_iter().zip(&mut times) {
                let flip = measured.flip(on);
                failures.extend(flip.failures);
                // The first ones warm up.
                if round >= 3 {
                    times.extend(flip.took);
                    requests.push(flip.requested);
                }
                written_back(pods);
            }
        }
        failures.extend(measured.failures());
        let [on, off] = &mut times;
        report(&format!("{pods} labelled, each captured"), on);
        report(&format!("{pods} taken off, each direct"), off);
        report("  until the request was answered", &mut requests);
        if pods > 1 {
            let (mut on, mut off) = (Samples::default(), Samples::default());
            for _ in 0..rounds {
                for (is_on, sampled) in [(true, &mut on), (false, &mut off)] {
                    failures.extend(measured.sample(is_on, WITHIN, sampled));
                    written_back(pods);
                }
            }
            report_sampled(&format!("{pods} labelled, by one connection"), &mut on);
            report_sampled(&format!("{pods} taken off, by one connection"), &mut off);
        }
        println!("  connections that failed: {}", failures.len());
        for failure in failures.iter().take(5) {
            println!("    {failure}");
        }
    }
    let mut measured = LabelLatency::new(1);
    for on in [false, true] {
        if on {
            measured.flip_all(on);
        }
        for at_once in [1, 10] {
            let (mut times, mut kinds) = (Vec::new(), BTreeMap::<String, usize>::new());
            for _ in 0..rounds.min(MOST_ARRIVALS).div_ceil(at_once).max(3) {
                for (took, kind) in measured.arrive(at_once) {
                    times.push(took);
                    *kinds.entry(kind).or_default() += 1;
                }
            }
            let mesh = if on { "in the mesh" } else { "outside it" };
            report(&format!("first connect, {at_once} new {mesh}"), &mut times);
            println!("  {kinds:?}");
        }
    }
}
