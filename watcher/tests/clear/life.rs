//! One pod from its announcement to its end.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    time::Duration,
};

use testbed::{
    capture::{Micros, now},
    cgroup,
    cluster::ClusterNode,
    pod_program::{self, Said},
    process::{Placement, Process},
};

use super::{
    judge::PodId,
    network::{Network, Place},
};

/// What a pod's owner wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In the mesh, and closed while no tunnel serves it.
    Closed,
    /// In the mesh, and in clear while no tunnel serves it.
    Open,
    /// Not in the mesh.
    Plain,
}

/// A pod.
#[derive(Debug)]
pub struct Life {
    /// Its name, which later pods of the place have too.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The index of its node.
    pub node: usize,
    /// Where it is.
    pub place: Place,
    /// What its owner wants.
    pub mode: Mode,
    /// Whether it has the label.
    pub labelled: bool,
    /// Whether its source names it.
    pub named: bool,
    /// Whether a watcher has known it since before its cgroup was there.
    pub known: bool,
    /// Ports that its owner excludes from what is captured inbound.
    pub excluded_ports: Option<String>,
    /// How long its program waits for a connection.
    pub patience: Duration,
    /// Under which number it is judged; from its start on.
    pub judged: Option<PodId>,
    /// What it has there.
    pub running: Option<Running>,
    /// Its connections.
    pub counts: Counts,
}

/// How the connections that a pod opened turned out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// All of them.
    pub dialled: usize,
    /// Those that reached an application.
    pub served: usize,
    /// Those that the programs refused.
    pub refused: usize,
}

/// What runs of a pod.
#[derive(Debug)]
pub struct Running {
    cgroup: PathBuf,
    /// Its netns and its veth.
    pub network: Network,
    _program: Process,
    /// What else runs in it.
    pub others: Vec<Process>,
    log: PathBuf,
    read: u64,
}

impl Life {
    /// Its entry in the pods file.
    pub fn entry(&self) -> String {
        let [v4, v6] = self.place.told();
        let label = if self.labelled { "ambient" } else { "none" };
        let mut entry = format!(
            "- uid: {}\n  name: {name}\n  namespace: demo\n  serviceAccount: {name}\n  \
             labels: {{istio.io/dataplane-mode: {label}}}\n  addresses: [\"{v4}\", \"{v6}\"]\n",
            self.uid,
            name = self.name,
        );
        if let Some(ports) = &self.excluded_ports {
            let _ = writeln!(entry, "  excludeInboundPorts: \"{ports}\"");
        }
        if self.mode == Mode::Open {
            let _ = writeln!(entry, "  failMode: open");
        }
        entry
    }

    /// Starts it as a kubelet and a runtime do: cgroup, network, program. The program's very first
    /// instructions are the script `first`; then it dials what is in file `targets`.
    pub fn start(
        &mut self,
        node: &ClusterNode,
        serial: usize,
        first: &str,
        targets: &Path,
        period: Duration,
    ) -> Micros {
        let cgroup = node.pods_cgroup().join("burstable").join(format!("pod{}", self.uid));
        // What there is to read of a clock is the time after the cgroup was made.
        fs::create_dir_all(cgroup.join("main")).expect("cgroup");
        let since = now();
        let network = Network::new(node, self.place, serial);
        let at = Placement::in_cgroup(&cgroup.join("main")).in_netns(&network.netns);
        let log = node.dir.join(format!("pod-{serial}.log"));
        let program = Process::spawn(
            &self.name,
            pod_program::command(&at, targets, period, self.patience, first),
            &log,
        );
        let others = Vec::new();
        self.running = Some(Running { cgroup, network, _program: program, others, log, read: 0 });
        since
    }

    /// Runs `script` in it beside its program.
    pub fn also_run(&mut self, script: &str) {
        let Some(running) = &mut self.running else { return };
        let at = Placement::in_cgroup(&running.cgroup.join("main")).in_netns(&running.network.netns);
        let log = running.log.with_extension("others");
        running.others.push(Process::spawn("script", at.command(&["sh", "-c", script]), &log));
    }

    /// Ends it: its processes, then its cgroup; `Running` still has its network.
    pub fn end(&mut self) -> Option<Running> {
        let running = self.running.take()?;
        cgroup::remove(&running.cgroup);
        Some(running)
    }

    /// What its program has printed since the last call.
    pub fn said(&mut self) -> Vec<Said> {
        self.running.as_mut().map(Running::said).unwrap_or_default()
    }
}

impl Running {
    /// What the program has printed since the last call: whole lines.
    pub fn said(&mut self) -> Vec<Said> {
        let mut text = String::new();
        let Ok(mut file) = File::open(&self.log) else { return Vec::new() };
        if file.seek(SeekFrom::Start(self.read)).and_then(|_| file.read_to_string(&mut text)).is_err() {
            return Vec::new();
        }
        let Some(end) = text.rfind('\n') else { return Vec::new() };
        self.read += end as u64 + 1;
        text[..end].lines().filter_map(pod_program::said).collect()
    }
}
