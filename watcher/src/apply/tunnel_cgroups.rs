//! The cgroups that tunnels run in: found by the process, with programs attached before the tunnel
//! opens its first socket, and detached when no socket of it can be left.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use adit_ebpf_loader::Kernel;
use error_reporter::Report;
use tracing::warn;
use ztunnel_api::names::ServiceAccount;

use crate::{
    model::pod::{Pod, Selection},
    observe::cgroups::{self, CgroupId},
    plan::{Reason, ReasonCode},
};

use super::{journal::Journal, maps::AppliedMaps};

/// Cgroups that no tunnel may run in, or above.
#[derive(Clone, Debug)]
pub(crate) struct CgroupLayout {
    /// The root of the cgroup2 tree.
    pub root: PathBuf,
    /// The cgroup above all pods.
    pub pods: PathBuf,
    /// The watcher's own.
    pub own: Option<PathBuf>,
    /// Service accounts of pods that a tunnel may run in: a pod with the socket's folder mounted
    /// must not become the tunnel.
    pub tunnel_accounts: BTreeSet<ServiceAccount>,
}

impl CgroupLayout {
    /// The cgroup directory of the tunnel `pid`. `pod_at` gives the pod that owns a directory.
    ///
    /// # Errors
    /// The process is gone or in no cgroup2 directory, or the tunnel shares its cgroup with others:
    /// the programs could not tell their sockets apart.
    pub(crate) fn find_tunnel(
        &self,
        pid: i32,
        pod_at: impl FnOnce(&Path) -> Option<Arc<Pod>>,
    ) -> Result<PathBuf, Reason> {
        let cgroup = cgroups::of_process(&self.root, pid).map_err(|error| {
            Reason::new(ReasonCode::TunnelCgroupUnknown, format!("tunnel {pid}: {error}"))
        })?;
        let place = format!("tunnel {pid} runs in cgroup {}", cgroup.display());
        let sharer = if cgroup == self.root {
            "is the root"
        } else if self.pods.starts_with(&cgroup) {
            "contains the pods"
        } else if self.own.as_ref().is_some_and(|own| own.starts_with(&cgroup)) {
            "contains the watcher"
        } else {
            return match pod_at(&cgroup) {
                Some(pod) => self.check_pod(&pod, &place).map(|()| cgroup),
                None => Ok(cgroup),
            };
        };
        let advice = format!("start it in a cgroup of its own below {}", self.root.display());
        Err(Reason::new(ReasonCode::TunnelCgroupShared, format!("{place}, which {sharer}; {advice}")))
    }

    /// Whether a tunnel may run in `pod`, as that of a DaemonSet does.
    fn check_pod(&self, pod: &Pod, place: &str) -> Result<(), Reason> {
        let name = format!("{}/{}", pod.namespace, pod.name);
        let refused = |text| Err(Reason::new(ReasonCode::TunnelCgroupShared, text));
        if pod.selection == Selection::Enrolled {
            return refused(format!(
                "{place} of pod {name}, which is to be enrolled; take its label off, or start the tunnel elsewhere"
            ));
        }
        let account = ServiceAccount { namespace: pod.namespace.clone(), name: pod.service_account.clone() };
        if !self.tunnel_accounts.contains(&account) {
            let accounts: Vec<String> = self.tunnel_accounts.iter().map(ToString::to_string).collect();
            return refused(format!(
                "{place} of pod {name} with service account {account}, expected {}; see --tunnel-account",
                accounts.join(" or ")
            ));
        }
        Ok(())
    }
}

/// Attaches the tunnels' programs to `cgroup` and enters it in the maps; its id.
///
/// # Errors
/// The cgroup is gone, the journal cannot be written, or the kernel refused.
pub(crate) fn attach(
    cgroup: &Path,
    kernel: &mut Kernel,
    journal: &mut Journal,
    maps: &mut AppliedMaps,
) -> Result<CgroupId, Reason> {
    let failed = |text| Reason::new(ReasonCode::TunnelNotAttached, text);
    let id = cgroups::id(cgroup).map_err(|error| failed(format!("cgroup {}: {error}", cgroup.display())))?;
    journal
        .add_tunnel(id, cgroup)
        .map_err(|error| failed(format!("cannot record the tunnel's cgroup: {error}")))?;
    kernel.attach_tunnel(cgroup).map_err(|error| failed(Report::new(&error).to_string()))?;
    maps.add_tunnel(kernel, id).map_err(|error| failed(Report::new(&error).to_string()))?;
    Ok(id)
}

/// Cgroups whose tunnel is gone. The kernel runs the programs of a socket's cgroup until the socket
/// is closed, and a tunnel that ends its ZDS connection goes on to serve the connections that it
/// has: they must be seen to close, and its dials must be seen to begin. So the programs stay until
/// the cgroup is gone, or has been without a process for longer than its sockets can outlive one.
#[derive(Debug, Default)]
pub(crate) struct UnusedTunnelCgroups {
    /// Since when they have no process.
    empty_since: BTreeMap<CgroupId, Instant>,
    /// When they are checked next; `None`: there are none.
    next_check: Option<Instant>,
}

/// How often they are checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// A socket that its process closed waits so long for the other end: twice the default of
/// `net.ipv4.tcp_fin_timeout`, which the last ACKs may start anew.
const ORPHAN_TIME: Duration = Duration::from_mins(2);

impl UnusedTunnelCgroups {
    /// Those that an earlier watcher left are checked at `now`.
    pub(crate) fn due_at(now: Instant) -> Self {
        Self { next_check: Some(now), ..Self::default() }
    }

    /// A tunnel may have gone. Has them checked at once.
    pub(crate) fn check_now(&mut self, now: Instant) {
        self.next_check = Some(now);
    }

    /// Whether [`Self::detach`] has something to do.
    #[must_use]
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.next_check.is_some_and(|at| at <= now)
    }

    /// Detaches the programs from every recorded cgroup that is not in `used`, as soon as no socket
    /// can be left of it. Whether any was detached.
    pub(crate) fn detach(
        &mut self,
        used: &BTreeSet<CgroupId>,
        kernel: &mut Kernel,
        journal: &mut Journal,
        now: Instant,
    ) -> bool {
        if journal.tunnels().keys().all(|id| used.contains(id)) {
            *self = Self::default();
            return false;
        }
        self.next_check = Some(now + CHECK_INTERVAL);
        self.empty_since.retain(|id, _| journal.tunnels().contains_key(id) && !used.contains(id));
        let recorded = journal.tunnels().iter().filter(|(id, _)| !used.contains(id));
        let unused: Vec<(CgroupId, PathBuf)> = recorded.map(|(id, dir)| (*id, dir.clone())).collect();
        let mut detached_any = false;
        for (id, dir) in unused {
            if self.may_have_sockets(id, &dir, now) {
                continue;
            }
            let detached = kernel.detach_tunnel(&dir, id).map_err(|error| Report::new(&error).to_string());
            let removed =
                detached.and_then(|()| journal.remove_tunnel(id).map_err(|error| error.to_string()));
            match removed {
                Ok(()) => {
                    self.empty_since.remove(&id);
                    detached_any = true;
                }
                Err(error) => warn!(cgroup = %dir.display(), error, "cannot detach from a tunnel's cgroup"),
            }
        }
        detached_any
    }

    fn may_have_sockets(&mut self, id: CgroupId, dir: &Path, now: Instant) -> bool {
        let populated = match cgroups::id(dir) {
            Ok(found) if found == id => cgroups::is_populated(dir),
            Ok(_) => return false,
            Err(error) => Err(error),
        };
        match populated {
            Ok(false) => now.duration_since(*self.empty_since.entry(id).or_insert(now)) < ORPHAN_TIME,
            Ok(true) => {
                self.empty_since.remove(&id);
                true
            }
            // What cannot be read is not known to be gone.
            Err(error) => !cgroups::is_gone(&error),
        }
    }

    /// When to call [`Self::detach`] again.
    #[must_use]
    pub(crate) fn next_check(&self) -> Option<Instant> {
        self.next_check
    }
}
