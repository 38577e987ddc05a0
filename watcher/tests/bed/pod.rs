//! One pod: a cgroup, a network namespace and what runs there.

use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use super::{
    cgroups::remove_cgroups,
    process::{Process, placed_inside, run_quietly},
};

/// Whether a pod carries the label that enrols it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enrol {
    Mesh,
    Plain,
}

#[derive(Clone, Debug)]
pub struct Pod {
    pub name: String,
    pub node: usize,
    pub netns: String,
    /// The container's cgroup; its parent is the pod's.
    pub cgroup: PathBuf,
    pub v4: String,
    pub v6: String,
    pub enrol: Enrol,
    /// The versions of service `web` have it: `web` is served by these pods.
    pub serves_web: bool,
    pub fail_open: bool,
    /// The node's process, where the node is a container.
    pub inside: Option<u32>,
}

impl Pod {
    pub fn uid(&self) -> String {
        format!("uid-{}", self.name)
    }

    /// Runs a program in the pod until it ends.
    pub fn exec(&self, program: &[&str]) -> Output {
        self.placed(program).stderr(Stdio::piped()).output().expect("bash")
    }

    /// Starts a program in the pod.
    pub fn spawn(&self, name: &str, program: &[&str], log: &Path) -> Process {
        Process::spawn(name, self.placed(program), log)
    }

    fn placed(&self, program: &[&str]) -> std::process::Command {
        placed_inside(self.inside, &self.cgroup, &self.netns, program)
    }

    /// Ends the pod as a kubelet does: its processes, then its cgroups, then its netns.
    pub fn end(&self) {
        remove_cgroups(self.cgroup.parent().expect("pod cgroup"));
        run_quietly(&format!("ip netns del {}", self.netns));
    }

    /// GETs `url`: the body, or what curl said.
    pub fn curl(&self, url: &str) -> Result<String, String> {
        let output = self.exec(&["curl", "-sS", "--noproxy", "*", "-m", "10", url]);
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(format!(
                "curl exits {}: {}",
                output.status.code().unwrap_or(-1),
                String::from_utf8_lossy(&output.stderr).trim()
            ))
        }
    }
}
