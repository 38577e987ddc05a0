//! A node without a tunnel: one watcher, pods made of cgroups and netns, and [`FakeTunnel`]s.
//!
//! For what only the far end of ZDS can see or do (refuse a pod, answer late, hang up). Everything
//! is removed on drop.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    fmt::Write as _,
    fs,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

pub use self::fake_tunnel::{FakeTunnel, Told};

pub mod fake_tunnel;

static BEDS: AtomicUsize = AtomicUsize::new(0);

/// Calls `look` until it finds something.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The program: what Cargo built for tests; beside an example, what was built before it.
pub fn watcher_binary() -> PathBuf {
    option_env!("CARGO_BIN_EXE_watcher").map_or_else(
        || {
            let here = std::env::current_exe().expect("own path");
            let path = here.parent().and_then(Path::parent).expect("target folder").join("watcher");
            assert!(path.exists(), "{} is not built: cargo build --workspace --bins", path.display());
            path
        },
        PathBuf::from,
    )
}

/// Runs a command line; its output.
pub fn run(line: &str) -> String {
    let mut words = line.split_ascii_whitespace();
    let output = Command::new(words.next().expect("a command")).args(words).output().expect(line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A process that ends with its owner.
#[derive(Debug)]
pub struct Owned(Child);

impl Owned {
    /// Starts `words` as a member of `cgroup`, so that its very first instruction is.
    pub fn spawn(cgroup: &Path, words: &[&str], log: &Path) -> Self {
        let log = fs::File::options().create(true).append(true).open(log).expect("log");
        let script = r#"echo $$ > "$0/cgroup.procs" && exec "$@""#;
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(cgroup).args(words);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("log")).stderr(log);
        Self(command.spawn().expect("sh"))
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).expect("a pid"));
        nix::sys::signal::kill(pid, signal).expect("signal");
    }

    pub fn wait(&mut self) -> bool {
        wait_for("a process to end", || self.0.try_wait().expect("wait")).success()
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One node.
#[derive(Debug)]
pub struct Bed {
    pub name: String,
    pub cgroup: PathBuf,
    pub dir: tempfile::TempDir,
    pub watcher: Option<Owned>,
    pub pods: Vec<Pod>,
    /// Where its watcher has pods from: `None`: the pods file; else the API server that this kubeconfig leads to.
    pub kubeconfig: Option<PathBuf>,
    /// More variables of its watcher's environment, `NAME=value`.
    pub env: Vec<String>,
}

/// A pod: a cgroup with one container, whose process is in a netns of its own.
#[derive(Debug)]
pub struct Pod {
    pub name: String,
    pub netns: String,
    pub cgroup: PathBuf,
    pub address: String,
    process: Owned,
}

impl Bed {
    pub fn new() -> Self {
        let name = format!("adit-w{}-{}", std::process::id(), BEDS.fetch_add(1, Ordering::Relaxed));
        let root = watcher::observe::cgroups::find_root().expect("cgroup2");
        let bed = Self {
            cgroup: root.join(&name),
            name,
            dir: tempfile::tempdir().expect("folder"),
            watcher: None,
            pods: Vec::new(),
            kubeconfig: None,
            env: Vec::new(),
        };
        for below in ["pods", "watcher", "tunnel", "other-tunnel"] {
            fs::create_dir_all(bed.cgroup.join(below)).expect("cgroup");
        }
        fs::create_dir(bed.bpffs()).expect("folder");
        run(&format!("mount -t bpf bpf {}", bed.bpffs().display()));
        bed
    }

    pub fn bpffs(&self) -> PathBuf {
        self.dir.path().join("bpf")
    }

    pub fn zds(&self) -> PathBuf {
        self.dir.path().join("zds.sock")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("watcher.log")).unwrap_or_default()
    }

    /// Makes a pod; the pods file has to name it.
    pub fn pod(&mut self, name: &str) -> usize {
        self.pod_in(name, name)
    }

    /// The same, with a cgroup of another name.
    pub fn pod_in(&mut self, name: &str, cgroup: &str) -> usize {
        let number = self.pods.len();
        let netns = format!("{}-{name}", self.name);
        let address = format!("10.88.{number}.2");
        run(&format!("ip netns add {netns}"));
        run(&format!("ip -n {netns} link set lo up"));
        run(&format!("ip -n {netns} link add e0 type veth peer name e1"));
        run(&format!("ip -n {netns} addr add {address}/24 dev e0"));
        run(&format!("ip -n {netns} addr add fd88:{number}::2/64 dev e0 nodad"));
        run(&format!("ip -n {netns} link set e0 up"));
        run(&format!("ip -n {netns} link set e1 up"));
        let cgroup = self.cgroup.join("pods").join(cgroup);
        fs::create_dir_all(cgroup.join("container")).expect("cgroup");
        let net = format!("--net=/run/netns/{netns}");
        let words = ["nsenter", net.as_str(), "sleep", "infinity"];
        let process = Owned::spawn(&cgroup.join("container"), &words, &self.dir.path().join("pod.log"));
        wait_for("the pod's process to be in its netns", || {
            let pid = process.0.id();
            let own = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?;
            let named = fs::metadata(format!("/run/netns/{netns}")).ok()?;
            (own.ino() == named.ino()).then_some(())
        });
        self.pods.push(Pod { name: name.to_owned(), netns, cgroup, address, process });
        number
    }

    /// Writes the pods file, whole at once: the pods made so far, each enrolled if `enrolled` says so,
    /// with `more` lines.
    pub fn write_pods(&self, enrolled: &[bool], more: &str) {
        let mut text = "pods:\n".to_owned();
        for (number, (pod, enrolled)) in self.pods.iter().zip(enrolled).enumerate() {
            let label = if *enrolled { "ambient" } else { "none" };
            let Pod { name, cgroup, address, .. } = pod;
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
        let words = ["--zds-socket", &zds, "--bpffs", &bpffs, "--attach", &attach];
        let words = ["run"].iter().chain(source).chain(&words).chain(more).map(|word| (*word).to_owned());
        words.chain(self.arguments()).collect()
    }

    /// What a watcher says that cannot start with these options.
    pub fn refuses(&self, more: &[&str]) -> String {
        let output = Command::new(watcher_binary()).args(self.run_words(more)).output().expect("watcher");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Starts the watcher and waits until it answers.
    pub fn start(&mut self, more: &[&str]) {
        self.start_under(&[], more);
    }

    /// The same by another program, which takes the watcher's words as its last ones.
    pub fn start_under(&mut self, wrapper: &[&str], more: &[&str]) {
        let words = self.run_words(more);
        let kubeconfig = self.kubeconfig.as_ref().map(|path| format!("KUBECONFIG={}", path.display()));
        let mut line = vec!["env"];
        line.extend(self.env.iter().chain(&kubeconfig).map(String::as_str));
        line.extend(wrapper);
        let binary = watcher_binary();
        line.push(binary.to_str().expect("UTF-8 path"));
        line.extend(words.iter().map(String::as_str));
        let log = self.dir.path().join("watcher.log");
        self.watcher = Some(Owned::spawn(&self.cgroup.join("watcher"), &line, &log));
        wait_for("the watcher to answer", || self.command(&["status", "-o", "json"]).0.then_some(()));
    }

    /// Whether a command of this node succeeded, and what it printed.
    pub fn command(&self, words: &[&str]) -> (bool, String) {
        let output = self.prepared(words).output().expect("watcher");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The same, not started yet.
    pub fn prepared(&self, words: &[&str]) -> Command {
        let mut command = Command::new(watcher_binary());
        command.args(words).args(self.arguments());
        command
    }

    pub fn status(&self) -> serde_json::Value {
        let (ok, text) = self.command(&["status", "-o", "json"]);
        assert!(ok, "no status\n{}", self.log());
        serde_json::from_str(&text).expect("JSON")
    }

    /// Waits until pod `number` has this state, with this reason code ("": none).
    pub fn wait_state(&self, number: usize, state: &str, code: &str) {
        let mut last = serde_json::Value::Null;
        let deadline = Instant::now() + Duration::from_secs(15);
        while Instant::now() < deadline {
            last = self.status()["pods"][number].clone();
            if last["state"] == state && last["reason"]["code"].as_str().unwrap_or_default() == code {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("wanted {state} ({code}), found {last}\n{}", self.log());
    }

    /// A tunnel in a cgroup of its own.
    pub fn tunnel(&self) -> FakeTunnel {
        FakeTunnel::connect(&self.zds(), Some(&self.cgroup.join("tunnel")))
    }

    /// What pins there are, by name.
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

impl Pod {
    /// As when a pod is deleted: its processes and its cgroup end. Its netns stays.
    pub fn end(&mut self) {
        let _ = self.process.0.kill().and_then(|()| self.process.0.wait());
        for dir in [self.cgroup.join("container"), self.cgroup.clone()] {
            wait_for("the cgroup to be empty", || fs::remove_dir(&dir).ok());
        }
    }

    /// What the netns holds of what a watcher might change.
    pub fn traces(&self) -> String {
        let Self { netns, .. } = self;
        let sysctls = "net.ipv4.tcp_fwmark_accept net.ipv4.fwmark_reflect net.ipv6.fwmark_reflect net.ipv4.tcp_migrate_req";
        let shown: String = [
            format!("ip -n {netns} rule"),
            format!("ip -n {netns} -6 rule"),
            format!("ip -n {netns} route show table all"),
            format!("ip -n {netns} -6 route show table all"),
            format!("ip netns exec {netns} sysctl {sysctls}"),
        ]
        .iter()
        .map(|line| run(line))
        .collect();
        // Link-local addresses and their routes come by themselves, some time after the interface.
        shown.split_inclusive('\n').filter(|line| !line.contains("fe80:")).collect()
    }

    pub fn is_prepared(&self) -> bool {
        run(&format!("ip -n {} rule", self.netns)).contains("0x539")
    }

    pub fn open_netns(&self) -> OwnedFd {
        fs::File::open(format!("/run/netns/{}", self.netns)).expect("netns").into()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.watcher = None;
        let bpffs = self.bpffs().display().to_string();
        let _ = self.command(&["uninstall", "--bpffs", &bpffs]);
        for pod in self.pods.drain(..) {
            let Pod { netns, .. } = &pod;
            let _ = Command::new("ip").args(["netns", "del", netns]).status();
        }
        let _ = Command::new("umount").arg(&bpffs).status();
        // Killed processes leave a cgroup a moment after they are waited for.
        let deadline = Instant::now() + Duration::from_secs(5);
        while remove_cgroups(&self.cgroup).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Removes `dir` and all below. What still runs there is ended: its owner may be dropped later, or have left it behind.
fn remove_cgroups(dir: &Path) -> std::io::Result<()> {
    for pid in fs::read_to_string(dir.join("cgroup.procs"))?.lines().filter_map(|pid| pid.parse::<i32>().ok())
    {
        if u32::try_from(pid) != Ok(std::process::id()) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
    for entry in fs::read_dir(dir)?.filter_map(Result::ok) {
        if entry.path().is_dir() {
            remove_cgroups(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}
