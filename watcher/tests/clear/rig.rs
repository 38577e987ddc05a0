//! Two nodes, their pods, the captures, and what was done so far.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use rand::{SeedableRng as _, rngs::StdRng};
use serde_json::Value;
use testbed::{
    capture::{Capture, Micros, Seen, now},
    cluster::{Cluster, STRICT},
    pod_program::{PATIENCE, PORT},
    wait::{LIMIT, try_wait},
};

use super::{
    api::ApiSource,
    judge::Judge,
    life::{Life, Mode},
    network::Place,
    node::{self, Host},
};

/// Pods of these numbers come and go, on each node.
pub const SLOTS: std::ops::Range<u8> = 20..36;
/// How long a pod's program waits between two connections.
const PERIOD: Duration = Duration::from_millis(30);
/// The same of those that attack.
const ATTACK: Duration = Duration::from_millis(4);

/// The pods that last; one of each on each node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// An enrolled server.
    Server = 10,
    /// An enrolled client of both servers.
    Client = 11,
    /// A neighbour outside the mesh that dials every address of every pod.
    Attacker = 12,
}

pub const ROLES: [(Role, &str, Mode); 3] = [
    (Role::Server, "server", Mode::Closed),
    (Role::Client, "client", Mode::Closed),
    (Role::Attacker, "attacker", Mode::Plain),
];

/// Everything.
#[derive(Debug)]
pub struct Rig {
    // In the order in which they may end.
    pub hosts: [Host; 2],
    pub lives: Vec<Life>,
    pub captures: [Capture; 2],
    pub cluster: Cluster,
    /// For the node that does not read a pods file.
    pub api: Option<ApiSource>,
    pub judge: Judge,
    pub random: StdRng,
    pub seed: u64,
    /// What was done, and when.
    pub trace: Vec<(Micros, String)>,
    /// Numbers for names, never used twice.
    serial: usize,
    /// What was done so far.
    pub done: Done,
    /// The connections of pods that are gone.
    pub past: super::life::Counts,
}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    pub starts: usize,
    pub kills: usize,
    pub boots: usize,
}

pub fn number(node: usize) -> u8 {
    u8::try_from(node).expect("0 or 1") + 1
}

pub fn letter(node: usize) -> char {
    ['a', 'b'][node]
}

impl Rig {
    /// Two nodes that work, with their lasting pods, which come from pods files.
    pub fn new(seed: u64) -> Self {
        Self::of(seed, Cluster::new(), None)
    }

    /// The same where the pods of the second node come from an API server.
    pub fn with_api(seed: u64) -> Self {
        let mut cluster = Cluster::new();
        let api = ApiSource::start(&mut cluster, 1);
        Self::of(seed, cluster, Some(api))
    }

    fn of(seed: u64, mut cluster: Cluster, api: Option<ApiSource>) -> Self {
        eprintln!("ADIT_CLEAR_SEED={seed}");
        STRICT.clone_into(&mut cluster.policies);
        let captures = [0, 1].map(|node| Capture::start(&cluster.nodes[node].netns));
        let mut rig = Self {
            hosts: [0, 1].map(Host::new),
            lives: Vec::new(),
            captures,
            cluster,
            api,
            judge: Judge::default(),
            random: StdRng::seed_from_u64(seed),
            seed,
            trace: Vec::new(),
            serial: 0,
            done: Done::default(),
            past: super::life::Counts::default(),
        };
        rig.write_mesh();
        for node in 0..2 {
            for (role, name, mode) in ROLES {
                let place = Place { node: number(node), host: role as u8 };
                rig.announce(node, place, name, mode);
            }
        }
        rig.write_targets();
        for node in 0..2 {
            rig.publish(node);
            rig.hosts[node].start_watcher(&mut rig.cluster, false);
            rig.hosts[node].start_tunnel(&mut rig.cluster);
            rig.wait_known(node, LIMIT);
        }
        for life in 0..rig.lives.len() {
            rig.start(life);
        }
        rig.wait_served();
        rig
    }

    /// Notes what is done next.
    pub fn note(&mut self, what: String) {
        self.trace.push((now(), what));
    }

    /// Adds a pod that its source will name; its number.
    pub fn announce(&mut self, node: usize, place: Place, name: &str, mode: Mode) -> usize {
        self.serial += 1;
        let mut life = Life {
            name: format!("{}-{name}", letter(node)),
            uid: format!("{:08x}-0000-4000-8000-{:012x}", std::process::id(), self.serial),
            node,
            place,
            mode,
            labelled: mode != Mode::Plain,
            named: true,
            known: false,
            excluded_ports: None,
            patience: PATIENCE,
            judged: None,
            running: None,
            counts: super::life::Counts::default(),
        };
        if let Some(api) = self.api.as_mut().filter(|api| api.node == node) {
            life.uid = api.create(&life);
        }
        self.lives.push(life);
        self.lives.len() - 1
    }

    /// Waits until the node's watcher knows all pods that its source names, and notes which ones it knows.
    pub fn wait_known(&mut self, node: usize, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            let states = self.states(node);
            let mut all = true;
            for life in self.lives.iter_mut().filter(|life| life.node == node && life.running.is_none()) {
                life.known |= states.contains_key(&life.uid);
                all &= life.known || !life.named;
            }
            if all || Instant::now() > deadline {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The state of each pod of a node by its uid; empty while its watcher does not answer.
    pub fn states(&self, node: usize) -> BTreeMap<String, String> {
        if self.hosts[node].watchers.is_empty() {
            return BTreeMap::new();
        }
        let status: Value = serde_json::from_str(&self.cluster.nodes[node].status()).unwrap_or_default();
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        let word = |pod: &Value, key: &str| pod[key].as_str().map(str::to_owned);
        pods.iter().filter_map(|pod| Some((word(pod, "uid")?, word(pod, "state")?))).collect()
    }

    /// Starts a pod that was announced.
    pub fn start(&mut self, life: usize) {
        self.serial += 1;
        let node = self.lives[life].node;
        let (targets, period) = match self.lives[life].place.host {
            10 => (self.targets("none"), PERIOD),
            12 => (self.targets(&format!("attack-{node}")), ATTACK),
            _ => (self.targets("servers"), PERIOD),
        };
        let [v4, _] = Place { node: number(1 - node), host: Role::Server as u8 }.told();
        let first = format!("(exec 3<>/dev/tcp/{v4}/{PORT}) 2> /dev/null");
        let started = &mut self.lives[life];
        let since = started.start(&self.cluster.nodes[node], self.serial, &first, &targets, period);
        if let Some(api) = self.api.as_ref().filter(|api| api.node == node && started.named) {
            api.report(started);
        }
        let device = started.running.as_ref().expect("it runs").network.device;
        let name = format!("{} ({}, {:?})", started.name, started.uid, started.mode);
        let judged = self.judge.add(&name, (node, device), started.place.addresses());
        started.judged = Some(judged);
        if started.mode == Mode::Closed && started.labelled && started.known {
            self.judge.close(judged, since, false);
        }
        self.done.starts += 1;
        self.write_targets();
    }

    /// Ends a pod. Its source names it until its processes have ended.
    pub fn end(&mut self, life: usize) {
        let mut life = self.lives.remove(life);
        let ended = life.end();
        self.publish(life.node);
        let Some(mut running) = ended else { return };
        let said = running.said();
        if let Some(violation) = self.hear(&mut life, &said) {
            self.fail(&violation);
        }
        if let Some(judged) = life.judged {
            self.judge.open(judged, now());
        }
        self.past.dialled += life.counts.dialled;
        self.past.served += life.counts.served;
        self.past.refused += life.counts.refused;
        self.write_targets();
    }

    /// The places of a node that no pod has.
    pub fn free_places(&self, node: usize) -> Vec<Place> {
        let places = SLOTS.map(|host| Place { node: number(node), host });
        places.filter(|place| self.lives.iter().all(|life| life.place != *place)).collect()
    }

    /// Announces a pod at a place that is free and starts it; its number.
    pub fn start_pod(&mut self, node: usize, mode: Mode) -> usize {
        self.start_patient_pod(node, mode, PATIENCE)
    }

    /// The same of one whose program waits so long for a connection.
    pub fn start_patient_pod(&mut self, node: usize, mode: Mode, patience: Duration) -> usize {
        let place = self.free_places(node)[0];
        let life = self.announce(node, place, &format!("slot{}", place.host), mode);
        self.lives[life].patience = patience;
        self.publish(node);
        self.wait_known(node, LIMIT);
        self.start(life);
        life
    }

    /// Takes a pod for one that must be closed from now on, whatever it is.
    pub fn expect_closed(&mut self, life: usize) {
        self.judge.close(self.lives[life].judged.expect("it runs"), now(), false);
    }

    /// Whether a watcher reports all these pods of node `node` as `wanted`.
    pub fn are(&self, node: usize, lives: &[usize], wanted: &str) -> bool {
        let states = self.states(node);
        lives.iter().all(|life| states.get(&self.lives[*life].uid).is_some_and(|state| state == wanted))
    }

    /// Whether the watcher of a node reports every pod that runs and has the label as open.
    pub fn is_settled(&self, node: usize) -> bool {
        self.are(node, &self.enrolled(node), "open")
    }

    /// The pods of a node that run and have the label.
    pub fn enrolled(&self, node: usize) -> Vec<usize> {
        let wanted = |life: &Life| life.node == node && life.running.is_some() && life.labelled && life.named;
        (0..self.lives.len()).filter(|life| wanted(&self.lives[*life])).collect()
    }

    /// What the capture of a node has seen since the last call.
    pub fn packets(&self, node: usize) -> Vec<Seen> {
        self.captures[node].take()
    }

    /// Waits until a watcher reports the pod as open.
    pub fn wait_open(&mut self, life: usize) {
        let (node, uid) = (self.lives[life].node, self.lives[life].uid.clone());
        let open = try_wait(LIMIT, || self.states(node).get(&uid).is_some_and(|state| state == "open"));
        assert!(open.is_some(), "{} is not open\n{}", self.lives[life].name, self.story(now()));
    }

    /// Kills the tunnels of a node.
    pub fn stop_tunnels(&mut self, node: usize) {
        while !self.hosts[node].tunnels.is_empty() {
            self.hosts[node].end_oldest_tunnel(Signal::SIGKILL);
        }
    }

    /// The folder of a node's pins.
    pub fn pins(&self, node: usize) -> PathBuf {
        node::pins(&self.cluster, &self.cluster.nodes[node])
    }

    /// Whether each node has its lasting pod of this role.
    pub fn is_fixed(&self, role: Role) -> bool {
        self.lives.iter().filter(|life| life.place.host == role as u8).count() == 2
    }
}
