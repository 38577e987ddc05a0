//! Programs that run in a cgroup and a netns of their own, and end with their owner.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    netns::TestNetns,
    wait::{try_wait, wait_for},
};

/// Before the words of a command: it gets pid, mount and cgroup namespaces of its own, as a node that
/// is a container has, and all in them ends with it.
pub(crate) const UNSHARE: [&str; 8] =
    ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--cgroup", "--propagation", "slave"];

/// Before the words of a command: as on a kernel without IPv6, which makes no socket of that family
/// (`EAFNOSUPPORT`).
pub const WITHOUT_IPV6: [&str; 3] = ["python3", "-c", REFUSE_IPV6];

const REFUSE_IPV6: &str = "
import ctypes, os, platform, struct, sys
number = {'x86_64': 41, 'aarch64': 198}[platform.machine()]  # socket(2)
program = b''.join(struct.pack('HBBI', *line) for line in [
    (0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16), (0x15, 0, 1, 10),
    (0x06, 0, 0, 0x50000 | 97), (0x06, 0, 0, 0x7fff0000)])
kept = ctypes.create_string_buffer(program)
filter = struct.pack('HxxxxxxP', 6, ctypes.addressof(kept))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter, 0, 0) == 0, ctypes.get_errno()
os.execvp(sys.argv[1], sys.argv[1:])
";

/// Where a program runs.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    cgroup: Option<PathBuf>,
    netns: Option<PathBuf>,
    node: Option<u32>,
}

impl Placement {
    /// In the cgroup whose folder is `path`.
    pub fn in_cgroup(path: &Path) -> Self {
        Self { cgroup: Some(path.to_owned()), ..Self::default() }
    }

    /// In this netns, too.
    #[must_use]
    pub fn in_netns(self, netns: &TestNetns) -> Self {
        Self { netns: Some(netns.path()), ..self }
    }

    /// Also in the pid, mount and cgroup namespaces of process `node`, the first process of a node
    /// that is a container; `None`: the node is no container.
    #[must_use]
    pub fn in_node(self, node: Option<u32>) -> Self {
        Self { node, ..self }
    }

    /// The command that runs `words` there. A shell joins the cgroup, then becomes `nsenter`, then
    /// the program, so that not one instruction of the program runs elsewhere.
    ///
    /// The program leads a process group of its own: Ctrl-C at a terminal reaches the testbed
    /// alone, which then ends its programs in order.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", r#"[ -z "$0" ] || echo $$ > "$0/cgroup.procs" || exit 1; exec "$@""#]);
        command.arg(self.cgroup.as_deref().unwrap_or_else(|| Path::new("")));
        if self.netns.is_some() || self.node.is_some() {
            command.arg("nsenter");
        }
        if let Some(netns) = &self.netns {
            // `ip netns exec` would hide the cgroup mounts.
            command.arg(format!("--net={}", netns.display()));
        }
        if let Some(node) = self.node {
            command.args(["--target", &node.to_string(), "--pid", "--mount", "--cgroup"]);
        }
        if self.netns.is_some() || self.node.is_some() {
            command.arg("--");
        }
        command.args(words).stdin(Stdio::null()).process_group(0);
        command
    }
}

/// A running program whose output goes to a file. It ends when this is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; both output streams are appended to `log`.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Self {
        let out = File::options().create(true).append(true).open(log).expect("log file");
        let err = out.try_clone().expect("log file");
        let child = command.stdout(out).stderr(err).spawn();
        let child = child.unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        Self { name: name.to_owned(), child, log: log.to_owned() }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends `signal`.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")), signal)
            .unwrap_or_else(|error| panic!("{signal} to {}: {error}", self.name));
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self) -> ExitStatus {
        wait_for(&format!("{} to end", self.name), || self.child.try_wait().expect("wait"))
    }

    /// Sends SIGTERM and waits; after `limit` kills it. Whether it ended by itself.
    pub fn stop(&mut self, limit: Duration) -> bool {
        if !self.is_running() {
            return true;
        }
        self.signal(Signal::SIGTERM);
        let ended = try_wait(limit, || !self.is_running()).is_some();
        if !ended {
            self.kill();
        }
        ended
    }

    /// Ends it at once, as a crash does.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What it has written so far.
    pub fn output(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop(Duration::from_secs(3));
    }
}

/// A child process that is killed when this is dropped; for those whose streams the test reads or
/// writes.
#[derive(Debug)]
pub struct KillOnDrop(pub Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
