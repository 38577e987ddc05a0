//! Programs started in a cgroup and a network namespace, ended when dropped.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

/// Waits until `condition` gives a value.
///
/// # Panics
/// When it has not within `limit`: the message is `what`.
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// `program` in the cgroup `cgroup` and the network namespace `netns`: a shell moves itself into the
/// cgroup, then becomes `nsenter`, then the program, so that not one instruction of it runs elsewhere.
/// (`ip netns exec` would hide the cgroup mounts.)
pub fn placed(cgroup: &Path, netns: &str, program: &[&str]) -> Command {
    placed_inside(None, cgroup, netns, program)
}

/// The same on a node that is a container: in the pid, mount and cgroup namespaces of process `node`.
pub fn placed_inside(node: Option<u32>, cgroup: &Path, netns: &str, program: &[&str]) -> Command {
    let mut command = Command::new("bash");
    let netns = format!("--net=/run/netns/{netns}");
    command.args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec nsenter \"$@\""]).arg(cgroup).arg(netns);
    if let Some(pid) = node {
        command.args(["--target", &pid.to_string(), "--pid", "--mount", "--cgroup"]);
    }
    command
        .arg("--")
        .args(program)
        .stdin(Stdio::null())
        // A Ctrl-C at the terminal is for the bed, which then ends its programs in order.
        .process_group(0);
    command
}

/// Runs a command of the bed's own (ip, sysctl, mount) that has to succeed.
pub fn run(line: &str) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|e| panic!("{line}: {e}"));
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The same, where failing is fine: on the way out.
pub fn run_quietly(line: &str) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let _ = Command::new(words[0]).args(&words[1..]).output();
}

/// A running program. Its output goes to a file.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pub log: PathBuf,
}

impl Process {
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Self {
        let out = File::options().create(true).append(true).open(log).expect("log file");
        let err = out.try_clone().expect("log file");
        let child = command.stdout(out).stderr(err).spawn().unwrap_or_else(|e| panic!("{name}: {e}"));
        Self { name: name.to_owned(), child, log: log.to_owned() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("pid"));
        let _ = nix::sys::signal::kill(pid, signal);
    }

    /// SIGTERM, then waits; SIGKILL when it takes longer than `limit`. Whether it ended by itself.
    pub fn stop(&mut self, limit: Duration) -> bool {
        if !self.is_running() {
            return true;
        }
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if !self.is_running() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill();
        false
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn output_so_far(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop(Duration::from_secs(3));
    }
}

/// What a finished command printed, both streams.
pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), output.stderr.as_slice()].concat()).into_owned()
}
