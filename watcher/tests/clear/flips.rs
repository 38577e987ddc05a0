//! Labels that come and go on pods that talk: a pod whose connections have once been captured
//! sends nothing in clear until its label is taken off, and no connection hangs.

use std::time::{Duration, Instant};

use testbed::{
    capture::{MARK, Micros, Seen, now},
    pod_program::{Outcome, Said},
    wait::{LIMIT, wait_for},
};

use super::{life::Mode, rig::Rig};

/// Longer than a connection takes on a loaded machine, and less than a SYN that is sent again.
const HANGS: Micros = 400_000;

/// A connection of a pod, as its program printed it.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    began: Micros,
    ended: Micros,
    outcome: Outcome,
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
    /// Connections that took too long.
    pub hung: Vec<String>,
}

impl Rig {
    /// Puts the label on and off `rounds` times, on `pods` pods of node a at once.
    pub fn flip(&mut self, pods: usize, rounds: usize) -> Flips {
        let lives: Vec<usize> = (0..pods).map(|_| self.start_pod(0, Mode::Closed)).collect();
        let mut flips = Flips::default();
        for life in &lives {
            self.wait_open(*life);
        }
        for round in 0..rounds {
            for on in [false, true] {
                for life in &lives {
                    self.lives[*life].labelled = on;
                }
                self.publish(0);
                let since = now();
                let wanted = if on { "open" } else { "plain" };
                wait_for(wanted, || self.are(0, &lives, wanted));
                // Some connections of each kind.
                let until = Instant::now() + LIMIT;
                let mut attempts: Vec<Vec<Attempt>> = vec![Vec::new(); pods];
                while attempts.iter().any(|of| of.len() < 20) && Instant::now() < until {
                    for (life, of) in lives.iter().zip(&mut attempts) {
                        of.extend(self.lives[*life].said().iter().filter_map(attempt));
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                let seen = self.packets(0);
                for (life, of) in lives.iter().zip(&attempts) {
                    let device = self.lives[*life].running.as_ref().expect("it runs").network.device;
                    let name = format!("{} round {round}", self.lives[*life].name);
                    flips.add(&name, on, since, of, seen.iter().filter(|seen| seen.device == device));
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
    /// Adds the connections `attempts` of a pod whose label was put on or taken off at `since`, and
    /// the packets that it sent meanwhile.
    fn add<'a>(
        &mut self,
        name: &str,
        on: bool,
        since: Micros,
        attempts: &[Attempt],
        seen: impl Iterator<Item = &'a Seen>,
    ) {
        self.attempts += attempts.len();
        for attempt in attempts.iter().filter(|attempt| attempt.ended - attempt.began > HANGS) {
            let after = i128::from(attempt.began) - i128::from(since);
            self.hung.push(format!("{name}, on {on}: began {after} µs after the label: {attempt:?}"));
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
        if !on {
            return;
        }
        let first = attempts.iter().filter(|attempt| attempt.began >= since).find(is_captured);
        let Some(first) = first else { return };
        for seen in in_clear.iter().filter(|seen| seen.at > first.ended) {
            let after = seen.at - first.ended;
            self.late.push(format!("{name}: {}, {after} µs after a captured one", seen.segment));
        }
    }
}
