//! Connections that pods made in clear before the first watcher ran.
//!
//! After a reboot nothing closes a pod until a watcher runs, and kubelets start pods in any order.
//! What an enrolled pod opened or accepted in the meantime met no policy and no encryption, and it
//! would go on like that for as long as it lives. So it is cut when the pod is enrolled: new
//! connections are refused, or carried, by then.

use std::{collections::BTreeSet, io};

use nix::errno::Errno;
use tracing::{info, warn};

use crate::observe::{cgroups::CgroupId, connections, listeners::listening, netns::Visitors};

use super::in_clear::{PodSockets, in_clear};

/// Why the connections of a pod could not be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotCut {
    /// This kernel cannot.
    Unsupported,
    /// It is tried again.
    Failed,
}

/// Cuts what `pods` have in clear, side by side. `tunnels` are the cgroups of tunnels. For each
/// pod, in their order, how many connections were cut.
pub(crate) fn cut(
    visitors: &Visitors,
    pods: &[PodSockets],
    tunnels: &BTreeSet<CgroupId>,
) -> Vec<Result<usize, NotCut>> {
    let results = visitors.visit_each(pods, |visitor, pod| {
        visitor.enter(std::os::fd::AsFd::as_fd(&*pod.netns), || cut_here(pod, tunnels))
    });
    let results = pods.iter().zip(results);
    results
        .map(|(PodSockets { uid, .. }, result)| match result {
            Ok(0) => Ok(0),
            Ok(count) => {
                info!(uid, count, "cut connections that the pod made in clear before the watcher ran");
                Ok(count)
            }
            Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => Err(NotCut::Unsupported),
            Err(error) => {
                warn!(uid, %error, "cannot cut the connections that the pod made in clear; trying again");
                Err(NotCut::Failed)
            }
        })
        .collect()
}

/// In the pod's netns. Once more after the first time: a handshake may have been on its way.
fn cut_here(pod: &PodSockets, tunnels: &BTreeSet<CgroupId>) -> io::Result<usize> {
    let mut count = 0;
    for _ in 0..2 {
        let (found, listeners) = (connections::connections()?, listening()?);
        let clear = in_clear(found, &listeners, pod, tunnels);
        if clear.is_empty() {
            break;
        }
        count += connections::cut(&clear)?;
    }
    Ok(count)
}
