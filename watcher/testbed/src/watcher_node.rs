//! A node without a tunnel: one watcher, pods made of cgroups and netns, and [`FakeTunnel`]s.
//!
//! For what only the far end of ZDS can see or do: refuse a pod, answer late, hang up. Everything
//! is removed on drop.

mod pod;

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

pub use self::pod::NodePod;

use crate::{
    cgroup::Cgroup,
    fakes::FakeTunnel,
    mount::Mount,
    netns::TestNetns,
    process::{Placement, Process},
    program::binary,
    wait::{LIMIT, try_wait, wait_for},
};

static COUNT: AtomicUsize = AtomicUsize::new(0);

/// One node.
#[derive(Debug)]
pub struct WatcherNode {
    /// Its name, also of its pins.
    pub name: String,
    // Dropped in this order: programs, then what they use.
    /// Its watcher, while one runs. [`kill_watcher`](Self::kill_watcher) ends it as a crash does.
    pub watcher: Option<Process>,
    /// All pods made so far.
    pub pods: Vec<NodePod>,
    /// Its cgroups: `pods`, `watcher`, `tunnel`, `other-tunnel`.
    pub cgroup: Cgroup,
    bpffs: Mount,
    /// For its files.
    pub dir: tempfile::TempDir,
    /// The kubeconfig by which its watcher follows an API server; `None`: it reads the pods file.
    pub kubeconfig: Option<PathBuf>,
    /// The watcher's `--leave-grace`. Most tests are not about it, and would wait for its end.
    pub leave_grace: u32,
    /// More variables of its watcher's environment, `NAME=value`.
    pub env: Vec<String>,
}

impl WatcherNode {
    /// A node with no pods, whose watcher does not run yet.
    pub fn new() -> Self {
        let name = format!("adit-w{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir().expect("folder");
        let bpffs = dir.path().join("bpf");
        fs::create_dir(&bpffs).expect("folder");
        let node = Self {
            cgroup: Cgroup::new(&name),
            name,
            watcher: None,
            pods: Vec::new(),
            bpffs: Mount::bpffs(&bpffs),
            dir,
            kubeconfig: None,
            leave_grace: 0,
            env: Vec::new(),
        };
        for below in ["pods", "watcher", "tunnel", "other-tunnel"] {
            node.cgroup.create(below);
        }
        node
    }

    /// A node with the pod "a", labelled if `enrolled`, whose watcher answers; and the pod's index.
    /// `more`: arguments of `watcher run`.
    pub fn with_pod(enrolled: bool, more: &[&str]) -> (Self, usize) {
        let mut node = Self::new();
        let pod = node.pod("a");
        node.write_pods(&[enrolled], "");
        node.start(more);
        (node, pod)
    }

    /// The bpffs that its watcher pins to.
    pub fn bpffs(&self) -> PathBuf {
        self.bpffs.path().to_owned()
    }

    /// Where its watcher listens for tunnels.
    pub fn zds(&self) -> PathBuf {
        self.dir.path().join("zds.sock")
    }

    /// What its watchers have written so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("watcher.log")).unwrap_or_default()
    }

    /// Makes a pod and returns its index. The pods file does not name it yet.
    pub fn pod(&mut self, name: &str) -> usize {
        self.pod_in(name, name)
    }

    /// The same, with a cgroup of another name.
    pub fn pod_in(&mut self, name: &str, cgroup: &str) -> usize {
        let number = self.pods.len();
        let netns = TestNetns::new(format!("{}-{name}", self.name));
        let address = format!("10.88.{number}.2");
        netns.run(&format!(
            "ip link add e0 type veth peer name e1
             ip addr add {address}/24 dev e0
             ip addr add fd88:{number}::2/64 dev e0 nodad
             ip link set e0 up
             ip link set e1 up"
        ));
        let cgroup = self.cgroup.join("pods").join(cgroup);
        fs::create_dir_all(cgroup.join("container")).expect("cgroup");
        let command =
            Placement::in_cgroup(&cgroup.join("container")).in_netns(&netns).command(&["sleep", "infinity"]);
        let process = Process::spawn("pod", command, &self.dir.path().join("pod.log"));
        wait_for("the pod's process to be in its netns", || {
            let own = fs::metadata(format!("/proc/{}/ns/net", process.pid())).ok()?;
            (own.ino() == netns.inode()).then_some(())
        });
        self.pods.push(NodePod { name: name.to_owned(), netns, cgroup, address, process });
        number
    }

    /// Replaces the pods file: the pods made so far, each labelled if `enrolled` says so, with
    /// `more` lines.
    pub fn write_pods(&self, enrolled: &[bool], more: &str) {
        let mut text = "pods:\n".to_owned();
        for (number, (pod, enrolled)) in self.pods.iter().zip(enrolled).enumerate() {
            let label = if *enrolled { "ambient" } else { "none" };
            let NodePod { name, cgroup, address, .. } = pod;
            let _ = write!(
                text,
                "- uid: uid-{name}\n  name: {name}\n  cgroup: {}\n  labels: {{istio.io/dataplane-mode: {label}}}\n  \
                 addresses: [{address}, \"fd88:{number}::2\"]\n{more}",
                cgroup.display()
            );
        }
        let next = self.dir.path().join("pods.next");
        fs::write(&next, text).expect("pods file");
        fs::rename(next, self.dir.path().join("pods.yaml")).expect("pods file");
    }

    fn arguments(&self) -> Vec<String> {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let arguments = ["--node", &self.name, "--run-dir", &path("run")];
        arguments.into_iter().map(str::to_owned).collect()
    }

    /// The words that start the watcher.
    fn run_words(&self, more: &[&str]) -> Vec<String> {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let (pods, zds, bpffs) = (path("pods.yaml"), path("zds.sock"), path("bpf"));
        let attach = self.cgroup.join("pods").display().to_string();
        let source: &[&str] = if self.kubeconfig.is_some() { &["--kubernetes"] } else { &["--pods", &pods] };
        let grace = self.leave_grace.to_string();
        let words = ["--zds-socket", &zds, "--bpffs", &bpffs, "--attach", &attach, "--leave-grace", &grace];
        let words = ["run"].iter().chain(source).chain(&words).chain(more).map(|word| (*word).to_owned());
        words.chain(self.arguments()).collect()
    }

    /// The error of a watcher that cannot start with these options.
    pub fn refuses(&self, more: &[&str]) -> String {
        let output = Command::new(binary("watcher")).args(self.run_words(more)).output().expect("watcher");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Starts the watcher and waits until it answers.
    pub fn start(&mut self, more: &[&str]) {
        self.start_under(&[], more);
    }

    /// The same through `wrapper`, a program that runs the rest of its command line.
    pub fn start_under(&mut self, wrapper: &[&str], more: &[&str]) {
        self.watcher = Some(self.spawn(wrapper, more));
        wait_for("the watcher to answer", || self.command(&["status", "-o", "json"]).0);
    }

    /// One more watcher of this node, in the same way; it may not answer.
    pub fn spawn(&self, wrapper: &[&str], more: &[&str]) -> Process {
        let words = self.run_words(more);
        let kubeconfig = self.kubeconfig.as_ref().map(|path| format!("KUBECONFIG={}", path.display()));
        let mut line = vec!["env"];
        line.extend(self.env.iter().chain(&kubeconfig).map(String::as_str));
        line.extend(wrapper);
        let binary = binary("watcher");
        line.push(binary.to_str().expect("UTF-8 path"));
        line.extend(words.iter().map(String::as_str));
        let name = if self.watcher.is_some() { "next-watcher.log" } else { "watcher.log" };
        let log = self.dir.path().join(name);
        let command = Placement::in_cgroup(&self.cgroup.join("watcher")).command(&line);
        Process::spawn("watcher", command, &log)
    }

    /// Kills the watcher, if one runs, so that it can undo nothing.
    pub fn kill_watcher(&mut self) {
        if let Some(mut watcher) = self.watcher.take() {
            watcher.kill();
        }
    }

    /// Runs `watcher WORDS` for this node: whether it succeeded, and its standard output.
    pub fn command(&self, words: &[&str]) -> (bool, String) {
        let output = self.prepared(words).output().expect("watcher");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The same, not started yet.
    pub fn prepared(&self, words: &[&str]) -> Command {
        let mut command = Command::new(binary("watcher"));
        command.args(words).args(self.arguments());
        command
    }

    /// `watcher status -o json`.
    pub fn status(&self) -> serde_json::Value {
        let (ok, text) = self.command(&["status", "-o", "json"]);
        assert!(ok, "no status\n{}", self.log());
        serde_json::from_str(&text).expect("JSON")
    }

    /// Waits until pod `number` has this state, with this reason code ("": none).
    pub fn wait_state(&self, number: usize, state: &str, code: &str) {
        let mut last = serde_json::Value::Null;
        let reached = try_wait(LIMIT, || {
            last = self.status()["pods"][number].clone();
            last["state"] == state && last["reason"]["code"].as_str().unwrap_or_default() == code
        });
        assert!(reached.is_some(), "wanted {state} ({code}), found {last}\n{}", self.log());
    }

    /// A tunnel in a cgroup of its own.
    pub fn tunnel(&self) -> FakeTunnel {
        FakeTunnel::connect(&self.zds(), Some(&self.cgroup.join("tunnel")))
    }

    /// The paths of all pins.
    pub fn pins(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut waiting = vec![self.bpffs()];
        while let Some(dir) = waiting.pop() {
            for entry in fs::read_dir(dir).expect("bpffs").filter_map(Result::ok) {
                found.push(entry.path());
                if entry.path().is_dir() {
                    waiting.push(entry.path());
                }
            }
        }
        found.sort();
        found
    }
}

impl Drop for WatcherNode {
    fn drop(&mut self) {
        self.kill_watcher();
        let bpffs = self.bpffs().display().to_string();
        let _ = self.command(&["uninstall", "--bpffs", &bpffs]);
    }
}
