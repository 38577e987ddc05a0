//! `make bench-labels`: how long a label takes, from the request to a real API server until a pod's connections are of the
//! new kind, and back; and what the change breaks.
//!
//! Then how long the first connection of a new pod takes, in the mesh and outside it.
//!
//! Real watcher, real tunnel, 1, 20 and 60 pods that talk all the while, and how it is measured: see `tests/labelled`. `ROUNDS` (30) and `PODS` (`1 20 60`) size it.

#[path = "../tests/api_server/mod.rs"]
mod api_server;
#[path = "../tests/bed/mod.rs"]
mod bed;
#[path = "../tests/labelled/mod.rs"]
mod labelled;

use std::{collections::BTreeMap, env, time::Duration};

use labelled::{Labelled, Sampled};

/// New pods of one kind; the bed gives an address to each.
const MOST_ARRIVALS: usize = 50;
/// Later than any pod changes.
const WITHIN: Duration = Duration::from_millis(100);

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Of pods that connect once each in a round: by when so many of them were of the new kind.
fn report_sampled(what: &str, sampled: &mut Sampled) {
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

/// Waits until what became of so many pods is written back, which should not meet the next request: it would not in real life.
fn written_back(pods: usize) {
    std::thread::sleep(Duration::from_millis(300 + 20 * pods as u64));
}

fn main() {
    if labelled::probe() {
        return;
    }
    let rounds: usize = env::var("ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
    let counts = env::var("PODS").unwrap_or_else(|_| "1 20 60".to_owned());
    for pods in counts.split_whitespace().map(|count| count.parse().expect("PODS: numbers")) {
        let mut labelled = Labelled::new(pods, &[]);
        let (mut times, mut requests, mut failures) = ([Vec::new(), Vec::new()], Vec::new(), Vec::new());
        for round in 0..rounds + 3 {
            for (on, times) in [true, false].into_iter().zip(&mut times) {
                let flip = labelled.flip(on);
                failures.extend(flip.failures);
                // The first ones warm up.
                if round >= 3 {
                    times.extend(flip.took);
                    requests.push(flip.requested);
                }
                written_back(pods);
            }
        }
        failures.extend(labelled.failures());
        let [on, off] = &mut times;
        report(&format!("{pods} labelled, each captured"), on);
        report(&format!("{pods} taken off, each direct"), off);
        report("  until the request was answered", &mut requests);
        if pods > 1 {
            let (mut on, mut off) = (Sampled::default(), Sampled::default());
            for _ in 0..rounds {
                for (is_on, sampled) in [(true, &mut on), (false, &mut off)] {
                    failures.extend(labelled.sample(is_on, WITHIN, sampled));
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
    let mut labelled = Labelled::new(1, &[]);
    for on in [false, true] {
        if on {
            labelled.flip_all(on);
        }
        for at_once in [1, 10] {
            let (mut times, mut kinds) = (Vec::new(), BTreeMap::<String, usize>::new());
            for _ in 0..rounds.min(MOST_ARRIVALS).div_ceil(at_once).max(3) {
                for (took, kind) in labelled.arrive(at_once, &[]) {
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
