//! Tunnels come and go: what changes for the node as a whole.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use tokio::sync::oneshot;
use tracing::warn;

use crate::{model::pod::Pod, observe::cgroups::CgroupId};

use super::{
    Applier,
    tunnel_cgroups::{self, CgroupLayout},
    tunnels::LostTunnel,
    zds_server::{Admission, ConnId},
};

impl Applier {
    /// Admits the tunnel of process `pid` if it runs in a cgroup of its own. `pod_at` gives the
    /// pod that owns a directory. Whether it was admitted; if not, its connection is
    /// closed.
    pub(crate) fn admit_tunnel(
        &mut self,
        conn: ConnId,
        pid: i32,
        admission: oneshot::Sender<Admission>,
        layout: &CgroupLayout,
        pod_at: impl FnOnce(&Path) -> Option<Arc<Pod>>,
    ) -> bool {
        let attached = layout.find_tunnel(pid, pod_at).and_then(|cgroup: PathBuf| {
            tunnel_cgroups::attach(&cgroup, &mut self.kernel, &mut self.journal, &mut self.maps)
                .map(|id| (cgroup, id))
        });
        match attached {
            Ok(cgroup) => {
                self.tunnels.admit(conn, pid, cgroup, admission);
                self.settings.set_tunnel_up(&mut self.kernel, true);
                true
            }
            Err(reason) => {
                self.check_unused_tunnels();
                self.tunnels.reject(pid, reason);
                false
            }
        }
    }

    /// Removes a tunnel whose connection ended; `None`: it was not connected.
    pub(crate) fn remove_tunnel(&mut self, conn: ConnId, reason: &str) -> Option<LostTunnel> {
        self.draining.forget_tunnel(conn);
        self.check_unused_tunnels();
        self.tunnels.remove(conn, reason)
    }

    /// No tunnel serves any pod. One write, before anything else: from here on every pod follows
    /// its fail mode.
    pub(crate) fn without_tunnel(&mut self) {
        self.settings.set_tunnel_up(&mut self.kernel, false);
    }

    /// What tunnels served that are not connected does not count any more.
    pub(crate) fn end_kept(&mut self) {
        if self.tunnels.is_empty() && self.settings.tunnel_up() {
            warn!("no tunnel reconnected in time");
            self.without_tunnel();
        }
    }

    /// A tunnel may have gone: [`Self::detach_unused_tunnels`] has something to do.
    pub(crate) fn check_unused_tunnels(&mut self) {
        self.unused_tunnel_cgroups.check_now(Instant::now());
    }

    /// Detaches the programs from the cgroups of tunnels that are gone, except for those in
    /// `adopted`, as soon as no socket can be left of them. Whether any was detached, and has to
    /// lose its map entry.
    pub fn detach_unused_tunnels(&mut self, adopted: &BTreeSet<CgroupId>, now: Instant) -> bool {
        if !self.unused_tunnel_cgroups.is_due(now) {
            return false;
        }
        let used = self.tunnels.cgroup_ids().union(adopted).copied().collect();
        self.unused_tunnel_cgroups.detach(&used, &mut self.kernel, &mut self.journal, now)
    }

    /// The cgroups that are tunnels', also of tunnels that are gone and may have left sockets.
    #[must_use]
    pub fn tunnel_cgroups(&self) -> BTreeSet<CgroupId> {
        self.journal.tunnels().keys().copied().collect()
    }
}
