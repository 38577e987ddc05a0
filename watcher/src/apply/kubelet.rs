//! The kubelet's connections, such as probes, pass to the pods whatever the tunnel and the policies
//! do: a program on its cgroup records them. So nobody rewrites probes or addresses.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use adit_ebpf_loader::Kernel;
use error_reporter::Report;
use tracing::{info, warn};

use crate::observe::{
    cgroups::{self, CgroupId},
    kubelet::{self, Bounds},
};

/// How often it is checked whether the kubelet's cgroup is still there: after a restart by systemd it
/// is another one, and a probe that fails may end a container.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is checked whether the kubelet still is in that cgroup, which may have outlived it. For
/// this the kernel goes through the listening sockets of all pods.
const LISTENER_INTERVAL: Duration = Duration::from_secs(5);

/// Where the kubelet's program is attached.
#[derive(Debug)]
pub(crate) struct KubeletCgroup {
    /// What the kubelet listens on; `None`: nobody is taken for one.
    port: Option<u16>,
    root: PathBuf,
    pods: PathBuf,
    attached: Option<(PathBuf, CgroupId)>,
    next_check: Option<Instant>,
    next_listeners: Instant,
    problem: Option<String>,
}

impl KubeletCgroup {
    /// Of the kubelet that listens on `port` of this node.
    pub(crate) fn new(port: Option<u16>, root: PathBuf, pods: PathBuf) -> Self {
        let now = Instant::now();
        let (next_check, next_listeners) = (Some(now), now);
        Self { port, root, pods, attached: None, next_check, next_listeners, problem: None }
    }

    /// When [`Self::check`] has something to do.
    #[must_use]
    pub(crate) fn next_check(&self) -> Option<Instant> {
        self.next_check
    }

    /// Why its connections are treated like anybody's.
    pub(crate) fn problem(&self) -> Option<String> {
        let problem = self.problem.as_ref()?;
        Some(format!("probes of enrolled pods are treated like anybody's connections: {problem}"))
    }

    /// Attaches the program to where the kubelet runs now, if that is due.
    pub(crate) fn check(&mut self, kernel: &mut Kernel, now: Instant) {
        if self.next_check.is_none_or(|at| at > now) {
            return;
        }
        let Some(port) = self.port else {
            self.next_check = None;
            // An earlier run may have had another option.
            if let Err(error) = kernel.attach_kubelet(None) {
                warn!(error = %Report::new(&error), "cannot detach the kubelet's program");
            }
            return;
        };
        self.next_check = Some(now + CHECK_INTERVAL);
        let exists = |(dir, id): &&(PathBuf, CgroupId)| cgroups::id(dir).is_ok_and(|found| found == *id);
        let attached = self.attached.as_ref().filter(exists).map(|(_, id)| *id);
        if attached.is_some() && now < self.next_listeners {
            return;
        }
        self.next_listeners = now + LISTENER_INTERVAL;
        let listening = kubelet::listening(port);
        // While it starts again nobody listens, and it may come back to the same place.
        if attached.is_some_and(|id| listening.as_ref().map_or(true, |ids| ids.contains(&id))) {
            return;
        }
        self.attached = None;
        let bounds = Bounds { root: &self.root, pods: &self.pods };
        let found = listening.and_then(|ids| kubelet::find(port, &ids, bounds));
        let attached = found.map_err(|error| error.to_string()).and_then(|found| {
            let result = kernel.attach_kubelet(Some(&found.0)).map(|()| found);
            result.map_err(|error| Report::new(&error).to_string())
        });
        match attached {
            Ok((dir, id)) => {
                info!(cgroup = %dir.display(), "connections of the kubelet pass to pods");
                self.attached = Some((dir, id));
                self.problem = None;
            }
            Err(problem) => {
                if self.problem.as_ref() != Some(&problem) {
                    warn!(problem, "probes of enrolled pods are treated like anybody's connections");
                }
                self.problem = Some(problem);
            }
        }
    }
}
