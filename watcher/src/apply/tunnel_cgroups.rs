//! The cgroups that tunnels run in: found by the process, with programs attached before the tunnel
//! opens its first socket, and detached when no tunnel is left there.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use adit_ebpf_loader::Kernel;
use error_reporter::Report;
use tracing::warn;

use crate::{
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
}

impl CgroupLayout {
    /// The cgroup directory of the tunnel `pid`. `pod_at` gives the name of the pod that owns a
    /// directory.
    ///
    /// # Errors
    /// The process is gone or in no cgroup2 directory, or the tunnel shares its cgroup with others:
    /// the programs could not tell their sockets apart.
    pub(crate) fn find_tunnel(
        &self,
        pid: i32,
        pod_at: impl FnOnce(&Path) -> Option<String>,
    ) -> Result<PathBuf, Reason> {
        let cgroup = cgroups::of_process(&self.root, pid).map_err(|error| {
            Reason::new(ReasonCode::TunnelCgroupUnknown, format!("tunnel {pid}: {error}"))
        })?;
        let sharer = if cgroup == self.root {
            "is the root".to_owned()
        } else if self.pods.starts_with(&cgroup) {
            "contains the pods".to_owned()
        } else if self.own.as_ref().is_some_and(|own| own.starts_with(&cgroup)) {
            "contains the watcher".to_owned()
        } else if let Some(pod) = pod_at(&cgroup) {
            format!("is pod {pod}'s")
        } else {
            return Ok(cgroup);
        };
        let text = format!(
            "tunnel {pid} runs in cgroup {}, which {sharer}; start it in a cgroup of its own below {}",
            cgroup.display(),
            self.root.display()
        );
        Err(Reason::new(ReasonCode::TunnelCgroupShared, text))
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

/// Detaches the programs from every recorded cgroup that is not in `used`.
pub(crate) fn detach_unused(used: &BTreeSet<CgroupId>, kernel: &mut Kernel, journal: &mut Journal) {
    let recorded = journal.tunnels().iter().filter(|(id, _)| !used.contains(id));
    let unused: Vec<(CgroupId, PathBuf)> = recorded.map(|(id, dir)| (*id, dir.clone())).collect();
    for (id, dir) in unused {
        let detached = kernel.detach_tunnel(&dir).map_err(|error| Report::new(&error).to_string());
        let removed = detached.and_then(|()| journal.remove_tunnel(id).map_err(|error| error.to_string()));
        if let Err(error) = removed {
            warn!(cgroup = %dir.display(), error, "cannot detach from a tunnel's cgroup");
        }
    }
}
