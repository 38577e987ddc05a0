//! What was seen and heard, whether it is a violation, and how to tell.

use std::{collections::BTreeMap, fmt::Write as _};

use testbed::{
    capture::{Capture, Micros, now},
    cluster::ClusterNode,
    pod_program::{Outcome, Said},
    wait::{LIMIT, try_wait},
};

use super::{
    judge::Violation,
    life::{Life, Mode},
    rig::{Rig, Role},
};

impl Rig {
    /// Judges what has been seen and heard since the last call; a violation, in words.
    pub fn find(&mut self) -> Option<String> {
        let violation = self.look();
        violation.map(|violation| violation.to_string())
    }

    /// The same where there must be none.
    pub fn check(&mut self) {
        if let Some(violation) = self.look() {
            self.fail(&violation);
        }
    }

    fn look(&mut self) -> Option<Violation> {
        let mut found = None;
        for (node, capture) in self.captures.iter().enumerate() {
            let seen = capture.take();
            let violation = self.judge.packets(node, &seen);
            found = found.or(violation);
        }
        for at in 0..self.lives.len() {
            let said = self.lives[at].said();
            let mut life = self.lives.remove(at);
            let heard = self.hear(&mut life, &said);
            self.lives.insert(at, life);
            found = found.or(heard);
        }
        for node in 0..2 {
            let open = |states: &BTreeMap<String, String>, life: &Life| {
                states.get(&life.uid).is_some_and(|state| state == "open")
            };
            let wanted =
                |life: &Life| life.node == node && life.mode == Mode::Closed && life.labelled && life.named;
            let pending = self
                .lives
                .iter()
                .any(|life| wanted(life) && life.judged.is_some_and(|judged| !self.judge.is_closed(judged)));
            if !pending {
                continue;
            }
            let states = self.states(node);
            let at = now();
            for life in self.lives.iter().filter(|life| wanted(life) && open(&states, life)) {
                if let Some(judged) = life.judged {
                    self.judge.close(judged, at, false);
                }
            }
        }
        found
    }

    /// Counts and judges what a pod's program printed.
    pub fn hear(&self, life: &mut Life, said: &[Said]) -> Option<Violation> {
        let mut found = None;
        // The label of a pod comes and goes, so that nobody knows which of its connections were
        // its own.
        let is_plain = |life: &Life| life.mode == Mode::Plain;
        for said in said {
            match *said {
                Said::Dialled { began, to, outcome, ended } => {
                    life.counts.dialled += 1;
                    let is_served = matches!(outcome, Outcome::Served { .. });
                    life.counts.served += usize::from(is_served);
                    life.counts.refused += usize::from(outcome == Outcome::Refused);
                    if is_served && is_plain(life) {
                        found = found.or_else(|| self.judge.served(&life.name, began, ended, to.ip()));
                    }
                }
                Said::Accepted { at, from } => {
                    let client = self.lives.iter().find(|life| life.place.addresses().contains(&from));
                    let attacks = client.is_some_and(|client| client.place.host == Role::Attacker as u8);
                    if let Some(judged) = life.judged.filter(|_| attacks) {
                        found = found.or_else(|| self.judge.accepted(judged, at, from));
                    }
                }
            }
        }
        found
    }

    /// Waits until both lasting clients are served anew.
    pub fn wait_served(&mut self) {
        let clients = |rig: &Self| -> Vec<usize> {
            let fixed = rig.lives.iter().filter(|life| life.place.host == Role::Client as u8);
            fixed.map(|life| life.counts.served).collect()
        };
        let before = clients(self);
        let served = try_wait(LIMIT, || {
            self.check();
            // Once for each address of both servers.
            clients(self).iter().zip(&before).all(|(now, before)| *now >= before + 4)
        });
        assert!(served.is_some(), "clients are not served\n{}", self.story(now()));
    }

    /// What there was.
    pub fn summary(&self) -> String {
        let mut all = self.past;
        for life in &self.lives {
            all.dialled += life.counts.dialled;
            all.served += life.counts.served;
            all.refused += life.counts.refused;
        }
        let counts: Vec<(u64, u64)> = self.captures.iter().map(Capture::counts).collect();
        format!(
            "seed {}: {:?}, connections {all:?}, segments captured {}, of HBONE {}",
            self.seed,
            self.done,
            counts[0].0 + counts[1].0,
            counts[0].1 + counts[1].1
        )
    }

    /// Ends the test.
    pub fn fail(&self, violation: &Violation) -> ! {
        panic!("{violation}\n{}", self.story(violation.at));
    }

    /// What the tunnels wrote of connections that failed, those that policy refused left out.
    pub fn failures(&self) -> String {
        let logs: Vec<String> = self.cluster.nodes.iter().map(ClusterNode::tunnel_log).collect();
        let lines = logs.iter().flat_map(|log| log.lines());
        let warnings = lines.filter(|line| line.contains("WARN") && !line.contains("policy rejection"));
        warnings.collect::<Vec<_>>().join("\n")
    }

    /// What was done before and just after `at`, and what the programs wrote.
    pub fn story(&self, at: Micros) -> String {
        let mut story = format!("{}\nwhat was done, in ms before it:\n", self.summary());
        let first = self.trace.partition_point(|(when, _)| *when < at).saturating_sub(40);
        for (when, what) in &self.trace[first..] {
            let before = i128::from(at) - i128::from(*when);
            let _ = writeln!(story, "{:>9} {what}", before / 1000);
        }
        for node in &self.cluster.nodes {
            let _ = writeln!(story, "{}\n{}", node.status(), node.story());
        }
        story
    }
}
