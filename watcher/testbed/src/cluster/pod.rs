//! One pod: a cgroup, a network namespace and what runs there.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
};

use crate::{
    cgroup,
    netns::TestNetns,
    process::{Placement, Process},
};

/// Whether a pod carries the label that enrols it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enrol {
    /// It does.
    Mesh,
    /// It does not.
    Plain,
}

/// A pod. The clones of one stand for the same pod.
#[derive(Clone, Debug)]
pub struct ClusterPod {
    /// Its name, also of its service account.
    pub name: String,
    /// The index of its node: 0 is `a`, 1 is `b`.
    pub node: usize,
    /// Its netns.
    pub netns: Arc<TestNetns>,
    /// The container's cgroup; its parent is the pod's.
    pub cgroup: PathBuf,
    /// Its IPv4 address.
    pub v4: String,
    /// Its IPv6 address.
    pub v6: String,
    /// Whether the pods file labels it.
    pub enrol: Enrol,
    /// Whether it is an endpoint of the service `web`.
    pub serves_web: bool,
    /// Whether it asks for fail mode `open`.
    pub fail_open: bool,
    /// The first process of its node, where that is a container.
    pub(super) inside: Option<u32>,
}

impl ClusterPod {
    /// Its uid in the pods file.
    pub fn uid(&self) -> String {
        format!("uid-{}", self.name)
    }

    /// Runs a program in the pod until it ends.
    pub fn exec(&self, program: &[&str]) -> Output {
        self.command(program).stderr(Stdio::piped()).output().expect("sh")
    }

    /// Starts a program in the pod.
    pub fn spawn(&self, name: &str, program: &[&str], log: &Path) -> Process {
        Process::spawn(name, self.command(program), log)
    }

    /// In its container.
    pub fn placement(&self) -> Placement {
        Placement::in_cgroup(&self.cgroup).in_netns(&self.netns).in_node(self.inside)
    }

    fn command(&self, program: &[&str]) -> Command {
        self.placement().command(program)
    }

    /// Ends the pod as a kubelet does: its processes, then its cgroups, then its netns.
    pub fn end(&self) {
        cgroup::remove(self.cgroup.parent().expect("pod cgroup"));
        self.netns.delete();
    }

    /// GETs `url` with curl: the body.
    ///
    /// # Errors
    /// What curl printed when it failed.
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
