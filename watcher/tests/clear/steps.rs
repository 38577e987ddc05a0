//! What may happen next, and what it does.

use std::{thread, time::Duration};

use nix::sys::signal::Signal;
use rand::{RngExt as _, seq::IndexedRandom as _};
use testbed::capture::now;

use super::{
    life::Mode,
    rig::{Rig, SLOTS},
    size::Size,
    tamper::Emptied,
};

/// One thing that happens. Numbers are those of nodes and pods.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// A pod is announced; whether to wait until the watcher knows it.
    Announce(usize, Mode, bool),
    /// A pod that was announced starts.
    Start(usize),
    /// It ends.
    End(usize),
    /// The source names a pod no more, which runs on. With a pods file that is as if its label were
    /// off. An object can be deleted by force: such a pod stays as closed as it was.
    Forget(usize),
    /// Its label is taken off, or put on.
    Label(usize, bool),
    /// It does what costs a watcher most.
    Nuisance(usize),
    /// A watcher is killed.
    KillWatcher(usize),
    /// A watcher starts; whether with few descriptors.
    StartWatcher(usize, bool),
    /// The oldest of several watchers is told to end.
    RetireWatcher(usize),
    /// A tunnel is killed.
    KillTunnel(usize),
    /// A tunnel starts.
    StartTunnel(usize),
    /// The oldest of several tunnels is told to end.
    RetireTunnel(usize),
    /// The source of pods cannot be read; whether it is away, else it is broken, or silent.
    BreakSource(usize, bool),
    /// It can again.
    MendSource(usize),
    /// Somebody else empties a map.
    Empty(usize, Emptied),
    /// A reboot, as the kernel programs see it.
    Boot(usize),
}

impl Rig {
    /// A random step among those that are possible now; `None`: everything was done.
    pub fn next_step(&mut self, size: &Size) -> Option<Step> {
        let done = self.done;
        if done.starts >= size.starts && done.kills >= size.kills && done.boots >= size.boots {
            return None;
        }
        let mut steps: Vec<(u32, Step)> = Vec::new();
        let node = self.random.random_range(0..2);
        let host = &self.hosts[node];
        let coin = self.random.random_bool(0.5);
        let kill_weight = if done.kills < size.kills { 2 } else { 0 };
        match host.watchers.len() {
            0 => steps.push((8, Step::StartWatcher(node, self.random.random_bool(0.3)))),
            1 => steps.extend([
                (kill_weight, Step::KillWatcher(node)),
                (kill_weight, Step::StartWatcher(node, coin)),
            ]),
            _ => steps.extend([(6, Step::RetireWatcher(node)), (2, Step::KillWatcher(node))]),
        }
        match host.tunnels.len() {
            0 => steps.push((8, Step::StartTunnel(node))),
            1 => {
                steps.extend([(kill_weight, Step::KillTunnel(node)), (kill_weight, Step::StartTunnel(node))]);
            }
            _ => steps.extend([(6, Step::RetireTunnel(node)), (2, Step::KillTunnel(node))]),
        }
        if host.is_source_broken {
            steps.push((8, Step::MendSource(node)));
        } else {
            steps.push((1, Step::BreakSource(node, coin)));
        }
        if host.watchers.len() == 1 && !host.is_source_broken && self.is_settled(node) {
            let maps = [Emptied::Cgroups, Emptied::Netns, Emptied::Addresses];
            steps.push((2, Step::Empty(node, *maps.choose(&mut self.random).expect("some"))));
        }
        if done.boots < size.boots {
            steps.push((1, Step::Boot(node)));
        }
        let coming = |rig: &Self| -> Vec<usize> {
            (0..rig.lives.len()).filter(|life| rig.lives[*life].running.is_none()).collect()
        };
        let going = |rig: &Self| -> Vec<usize> {
            let lasts = |life: &usize| !SLOTS.contains(&rig.lives[*life].place.host);
            (0..rig.lives.len()).filter(|life| rig.lives[*life].running.is_some() && !lasts(life)).collect()
        };
        let (coming, going) = (coming(self), going(self));
        if coming.len() < 4 && coming.len() + going.len() < 12 {
            let mode = *[Mode::Closed, Mode::Closed, Mode::Closed, Mode::Closed, Mode::Open, Mode::Plain]
                .choose(&mut self.random)
                .expect("some");
            steps.push((10, Step::Announce(node, mode, self.random.random_bool(0.8))));
        }
        if let Some(life) = coming.choose(&mut self.random) {
            steps.push((12, Step::Start(*life)));
        }
        if let Some(life) = going.choose(&mut self.random) {
            let of = &self.lives[*life];
            steps.push((if going.len() > 6 { 10 } else { 3 }, Step::End(*life)));
            steps.push((1, Step::Nuisance(*life)));
            if of.named && !self.hosts[of.node].is_source_broken {
                steps.push((1, Step::Forget(*life)));
                if of.mode == Mode::Closed {
                    steps.push((3, Step::Label(*life, !of.labelled)));
                }
            }
        }
        let step = steps.choose_weighted(&mut self.random, |(weight, _)| *weight).expect("a step").1;
        Some(step)
    }

    /// Does it, pauses for a random time, and judges what was seen.
    pub fn step(&mut self, step: Step) {
        self.describe(step);
        match step {
            Step::Announce(node, mode, wait) => self.announce_some(node, mode, wait),
            Step::Start(life) => self.start(life),
            Step::End(life) => self.end(life),
            Step::Forget(life) => {
                self.lives[life].named = false;
                if self.follows_api(self.lives[life].node) {
                    self.publish(self.lives[life].node);
                } else {
                    self.label(life, false);
                }
            }
            Step::Label(life, on) => self.label(life, on),
            Step::Nuisance(life) => self.nuisance(life),
            Step::KillWatcher(node) => {
                self.forget_known(node);
                self.hosts[node].end_oldest_watcher(Signal::SIGKILL);
                self.done.kills += 1;
            }
            Step::StartWatcher(node, few) => self.hosts[node].start_watcher(&mut self.cluster, few),
            Step::RetireWatcher(node) => {
                self.forget_known(node);
                self.hosts[node].end_oldest_watcher(Signal::SIGTERM);
                self.done.kills += 1;
            }
            Step::KillTunnel(node) => {
                self.hosts[node].end_oldest_tunnel(Signal::SIGKILL);
                self.done.kills += 1;
            }
            Step::StartTunnel(node) => self.hosts[node].start_tunnel(&mut self.cluster),
            Step::RetireTunnel(node) => {
                self.hosts[node].end_oldest_tunnel(Signal::SIGTERM);
                self.done.kills += 1;
            }
            Step::BreakSource(node, away) => {
                self.hosts[node].is_source_broken = true;
                self.break_source(node, away);
            }
            Step::MendSource(node) => self.mend_source(node),
            Step::Empty(node, which) => self.empty(node, which),
            Step::Boot(node) => self.boot(node),
        }
        // Any length of time, short ones most often: what follows meets everything half done.
        let pause = self.random.random_range(0.0..1.0_f64).powi(4) * 300.0;
        thread::sleep(Duration::from_secs_f64(pause / 1000.0));
        for node in 0..2 {
            let ended = self.hosts[node].ended();
            assert!(ended.is_empty(), "ended by itself: {ended:?} of node {node}\n{}", self.story(now()));
        }
        self.check();
    }

    fn describe(&mut self, step: Step) {
        let pod = match step {
            Step::Start(life)
            | Step::End(life)
            | Step::Forget(life)
            | Step::Label(life, _)
            | Step::Nuisance(life) => {
                let life = &self.lives[life];
                format!(" {} {} known {} {:?}", life.name, life.uid, life.known, life.mode)
            }
            _ => String::new(),
        };
        self.note(format!("{step:?}{pod}"));
    }

    fn announce_some(&mut self, node: usize, mode: Mode, wait: bool) {
        let place = *self.free_places(node).choose(&mut self.random).expect("a free place");
        self.announce(node, place, &format!("slot{}", place.host), mode);
        self.publish(node);
        let host = &self.hosts[node];
        if wait && !host.watchers.is_empty() && !host.is_source_broken {
            // One that has just started may need longer: then the pod is not known.
            self.wait_known(node, Duration::from_secs(2));
        }
    }

    /// What a watcher knew of pods to come ends with it.
    fn forget_known(&mut self, node: usize) {
        for life in self.lives.iter_mut().filter(|life| life.node == node && life.running.is_none()) {
            life.known = false;
        }
    }

    fn label(&mut self, life: usize, on: bool) {
        self.lives[life].labelled = on;
        if let Some(judged) = self.lives[life].judged.filter(|_| !on) {
            self.judge.open(judged, now());
        }
        self.publish(self.lives[life].node);
    }

    fn nuisance(&mut self, life: usize) {
        let scripts = [
            "for i in $(seq 150); do sleep 1000 & done; wait",
            "for i in $(seq 40); do unshare -n sleep 1000 & done; wait",
            "for i in $(seq 600); do echo addr add 10.200.$((i / 250)).$((i % 250 + 1))/32 dev lo; done | ip -batch -",
            "while :; do ip addr add 10.99.9.9/32 dev lo; ip addr del 10.99.9.9/32 dev lo; sleep 0.01; done",
            "timeout 3 sh -c 'while :; do /bin/true; done'",
        ];
        let script = *scripts.choose(&mut self.random).expect("some");
        self.note(format!("  {script}"));
        self.lives[life].also_run(script);
        if self.random.random_bool(0.5) {
            // Not its own port, nor that of the servers.
            let list: Vec<String> = (0..2000).map(|port| (20_000 + port * 2).to_string()).collect();
            self.lives[life].excluded_ports = Some(list.join(","));
            self.publish(self.lives[life].node);
        }
    }

    /// What a node's kernel has of us is gone, and its pods run. They need not be closed until a
    /// watcher reports them as open.
    fn boot(&mut self, node: usize) {
        let judged: Vec<usize> =
            self.lives.iter().filter(|life| life.node == node).filter_map(|life| life.judged).collect();
        self.forget_known(node);
        self.hosts[node].kill_all();
        for judged in judged {
            self.judge.open(judged, now());
        }
        self.hosts[node].forget_everything(&self.cluster);
        self.done.boots += 1;
    }

    /// Everything that should work works in the end.
    pub fn settle(&mut self) {
        self.note("settle".to_owned());
        for node in 0..2 {
            self.mend_source(node);
            while self.hosts[node].watchers.len() > 1 {
                self.hosts[node].end_oldest_watcher(Signal::SIGTERM);
            }
            while self.hosts[node].tunnels.len() > 1 {
                self.hosts[node].end_oldest_tunnel(Signal::SIGTERM);
            }
            if self.hosts[node].watchers.is_empty() {
                self.hosts[node].start_watcher(&mut self.cluster, false);
            }
            if self.hosts[node].tunnels.is_empty() {
                self.hosts[node].start_tunnel(&mut self.cluster);
            }
        }
        for life in 0..self.lives.len() {
            let of = &self.lives[life];
            if of.running.is_some() && of.labelled && of.named {
                self.wait_open(life);
            }
        }
        self.hosts.iter_mut().for_each(super::node::Host::wait_left);
        self.wait_served();
        for node in 0..2 {
            let log = std::fs::read_to_string(self.cluster.nodes[node].dir.join("watcher.log"));
            let log = log.expect("the watcher's log");
            let found: Vec<&str> = log.lines().filter(|line| line.contains("no tunnel carries")).collect();
            assert!(
                found.is_empty(),
                "a watcher's own scan of node {node}: {found:#?}\n{}",
                self.story(now())
            );
        }
        self.note("settled".to_owned());
    }
}
