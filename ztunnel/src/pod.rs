//! A pod that is served.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use nix::net::if_::{Interface, if_nameindex};
use tokio_util::sync::CancellationToken;

use crate::{
    identity::Identity,
    socket::{self, Netns, NetnsId},
};

/// For a pod that left while connections of it are open.
const LOOK_FOR_LINKS_EVERY: Duration = Duration::from_secs(5);

/// Who a pod is, as the node agent says. Its identity follows from nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInfo {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

/// A pod that is served.
#[derive(Debug)]
pub struct Pod {
    pub uid: String,
    pub info: PodInfo,
    pub identity: Identity,
    pub netns: Netns,
    /// For every socket in it but those to the application.
    pub socket: socket::Options,
    /// The one port that peers reach in it, if it is the tunnel's own pod: the metrics', and nothing else of what
    /// listens beside the tunnel, which may be a whole node. Its netns is prepared for nothing, so that applications
    /// are not dialled from their clients' addresses there.
    pub own_port: Option<u16>,
    /// No new connections; the open ones finish.
    pub stop: CancellationToken,
    /// The process ends: they have a deadline.
    pub end: CancellationToken,
}

impl Pod {
    /// Waits until the pod is not only out of the mesh but deleted, by what every CNI plugin then does: nothing leads out
    /// of its netns any more. (Our own sockets keep the netns itself.)
    pub async fn deleted(&self) {
        loop {
            tokio::time::sleep(LOOK_FOR_LINKS_EVERY).await;
            if self.netns.enter(|| Ok(if_nameindex()?.iter().all(is_loopback))).unwrap_or(false) {
                return;
            }
        }
    }
}

fn is_loopback(link: &Interface) -> bool {
    link.name().to_bytes() == b"lo"
}

/// Which netns `fd` is.
pub(crate) fn netns_id(fd: &OwnedFd) -> io::Result<NetnsId> {
    Ok(Netns::new(fd.try_clone()?)?.id())
}
