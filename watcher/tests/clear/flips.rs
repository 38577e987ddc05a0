//! Labels that come and go on pods that talk: a pod whose connections have once been captured
//! sends nothing in clear until its label is taken off, and no connection hangs.

use std::{
    thread,
    time::{Duration, Instant},
};

use rand::RngExt as _;
use testbed::{
    capture::{MARK, Micros, Seen, now},
    pod_program::{Outcome, Said},
    wait::{LIMIT, wait_for},
};

use super::{life::Mode, rig::Rig};

/// Longer than a connection takes on a loaded machine, two SYNs of which were lost.
const HANGS: Micros = 4_500_000;
/// Longer than any part of the mesh waits for another one: what nobody answers is seen to hang.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection of a pod, as its program printed it.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    began: Micros,
    ended: Micros,
    outcome: Outcome,
}

/// A pod's label, while some packets were seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It was on, and the pod open, before and after.
    On,
    /// It was put on at that time.
    Coming(Micros),
    /// It was taken off, or not on.
    Off,
}

/// What the rounds of labels led to.
#[derive(Debug, Default)]
pub struct Flips {
    /// All connections.
    pub attempts: usize,
    /// Those that were captured.
    pub captured: usize,
    /// Those of them whose server saw the client's own port, by chance: a probe that judges by the
    /// port takes them for connections in clear.
    pub same_port: usize,
    /// Connections in clear that began after the first captured one of the same label.
    pub late: Vec<String>,
    /// The longest time that a connection took.
    pub slowest: Micros,
    /// Connections that nobody seems to have answered.
    pub hung: Vec<String>,
}

impl Rig {
    /// Takes the label off and puts it on `rounds` times, each time on some of `pods` pods of node a.
    pub fn flip(&mut self, pods: usize, rounds: usize) -> Flips {
        let lives: Vec<usize> =
            (0..pods).map(|_| self.start_patient_pod(0, Mode::Closed, PATIENCE)).collect();
        let mut flips = Flips::default();
        for life in &lives {
            self.wait_open(*life);
        }
        for round in 0..rounds {
            // The others go on in the mesh, beside those that change.
            let some: Vec<usize> = lives.iter().copied().filter(|_| self.random.random_bool(0.5)).collect();
            for on in [false, true] {
                for life in &some {
                    self.lives[*life].labelled = on;
                }
                thread::sleep(Duration::from_micros(self.random.random_range(0..30_000)));
                let since = now();
                self.publish(0);
                let wanted = if on { "open" } else { "plain" };
                wait_for(wanted, || self.are(0, &some, wanted));
                // Some connections of each kind.
                let until = Instant::now() + LIMIT;
                let mut attempts: Vec<Vec<Attempt>> = vec![Vec::new(); pods];
                while attempts.iter().any(|of| of.len() < 20) && Instant::now() < until {
                    for (life, of) in lives.iter().zip(&mut attempts) {
                        of.extend(self.lives[*life].said().iter().filter_map(attempt));
                    }
                    thread::sleep(Duration::from_millis(5));
                }
                let seen = self.packets(0);
                for (life, of) in lives.iter().zip(&attempts) {
                    let device = self.lives[*life].running.as_ref().expect("it runs").network.device;
                    let name = format!("{} round {round}", self.lives[*life].name);
                    let state = match (some.contains(life), on) {
                        (false, _) => State::On,
                        (true, true) => State::Coming(since),
                        (true, false) => State::Off,
                    };
                    flips.add(&name, state, of, seen.iter().filter(|seen| seen.device == device));
                }
            }
        }
        flips
    }
}

fn attempt(said: &Said) -> Option<Attempt> {
    match *said {
        Said::Dialled { began, outcome, ended, .. } => Some(Attempt { began, ended, outcome }),
        Said::Accepted { .. } => None,
    }
}

impl Flips {
    /// Adds the connections `attempts` of a pod, and the packets that it sent meanwhile.
    fn add<'a>(
        &mut self,
        name: &str,
        state: State,
        attempts: &[Attempt],
        seen: impl Iterator<Item = &'a Seen>,
    ) {
        self.attempts += attempts.len();
        for attempt in attempts {
            let took = attempt.ended - attempt.began;
            self.slowest = self.slowest.max(took);
            if took > HANGS {
                self.hung.push(format!("{name}, {state:?}: {attempt:?}"));
            }
        }
        let in_clear: Vec<&Seen> =
            seen.filter(|seen| seen.segment.class == MARK && seen.segment.opens()).collect();
        let is_captured = |attempt: &&Attempt| {
            matches!(attempt.outcome, Outcome::Served { .. })
                && !in_clear.iter().any(|seen| (attempt.began..=attempt.ended).contains(&seen.at))
        };
        let captured = attempts.iter().filter(is_captured);
        for attempt in captured {
            self.captured += 1;
            self.same_port += usize::from(attempt.outcome == Outcome::Served { same_port: true });
        }
        let from = match state {
            State::Off => return,
            State::On => 0,
            State::Coming(since) => {
                let first = attempts.iter().filter(|attempt| attempt.began >= since).find(is_captured);
                let Some(first) = first else { return };
                first.ended
            }
        };
        for seen in in_clear.iter().filter(|seen| seen.at > from) {
            self.late
                .push(format!("{name}, {state:?}, captured since {from}: {} at {}", seen.segment, seen.at));
        }
    }
}
