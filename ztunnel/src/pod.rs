//! A pod that is served.
//!
//! * `index`: all of them, by name
//! * `own_address`: whether it has an address

mod index;
mod own_address;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

pub use self::index::PodIndex;
pub(crate) use self::own_address::OwnAddress;
use adit_netns::Netns;
use nix::net::if_::{Interface, if_nameindex};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{
    budget::{DescriptorLease, PodBudget},
    identity::{AccountLease, MeshTrust},
    memory::MemoryBudget,
    mesh::{LocalPod, Mesh, Store, Workload},
    policy::PodProtection,
    socket,
};

/// Interval of the check whether a pod was deleted, while it has open connections.
const LOOK_FOR_LINKS_EVERY: Duration = Duration::from_secs(5);

/// The names of a pod, from the node agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInfo {
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
}

/// Whether a pod was deleted.
#[derive(Debug)]
pub(crate) struct Deletion {
    seen: CancellationToken,
    looks: Semaphore,
}

impl Default for Deletion {
    fn default() -> Self {
        Self { seen: CancellationToken::new(), looks: Semaphore::new(1) }
    }
}

/// A pod that is served.
#[derive(Debug)]
pub struct ServedPod {
    pub(crate) uid: String,
    pub(crate) info: PodInfo,
    /// The same names, and those of the node: how the mesh knows the pod.
    pub(crate) local: LocalPod,
    /// Set for a pod that the node agent handed over: it has proven the names.
    pub(crate) from_agent: bool,
    /// Whether its workload was told once. If it is not there then, it was removed.
    pub(crate) was_told: AtomicBool,
    /// Keeps its certificates as long as a connection of the pod may need them.
    pub(crate) _account: AccountLease,
    pub(crate) netns: Netns,
    pub(crate) own_address: OwnAddress,
    pub(crate) deletion: Deletion,
    /// Options for every socket in its netns, except those to the application.
    pub(crate) socket: socket::SocketOptions,
    /// For what its streams have received.
    pub(crate) memory: Arc<MemoryBudget>,
    /// Set for the tunnel's own pod: the only port that peers can reach, the one for metrics. Its
    /// netns may be the node's, with other listeners. Since that netns is not prepared,
    /// applications there are not dialled from their clients' addresses.
    pub own_port: Option<u16>,
    /// What its open connections are judged by.
    pub(crate) protection: PodProtection,
    /// What its connections may take.
    pub(crate) budget: PodBudget,
    /// Of its listeners.
    pub(crate) _descriptors: DescriptorLease,
    /// Stops accepting; open connections finish.
    pub stop: CancellationToken,
    /// The process ends: open connections have a deadline.
    pub end: CancellationToken,
}

impl ServedPod {
    /// Its workload in `mesh`: its policies and, with the trust domain, its identity.
    #[must_use]
    pub fn workload<'mesh>(&self, mesh: &'mesh Mesh) -> Option<&'mesh Arc<Workload>> {
        mesh.workload_of(&self.local)
    }

    /// What it is taken for in connections that it makes, until it is told: `None` if it is told, or
    /// was, or if nothing sound can be made of what is known.
    #[must_use]
    pub fn newcomer(&self, mesh: &Mesh) -> Option<Workload> {
        let untold = self.from_agent && !self.was_told.load(Ordering::Relaxed);
        if untold { mesh.newcomer(&self.local) } else { None }
    }

    /// Whether its netns has the address of `address`, or had it a second ago.
    pub(crate) fn has(&self, address: SocketAddr) -> bool {
        self.own_address.is(&self.netns, address)
    }

    /// Keeps its protection up to date, until nobody holds the pod.
    pub(crate) async fn follow_policies(store: Arc<Store>, trust: Arc<MeshTrust>, pod: Weak<Self>) {
        let find = |pod: &Self, mesh: &Mesh| {
            let told = pod.workload(mesh).cloned();
            if told.is_some() {
                pod.was_told.store(true, Ordering::Relaxed);
            }
            told
        };
        PodProtection::follow(store, trust, pod, |pod| &pod.protection, find).await;
    }

    /// Resolves when the pod was deleted, not only taken out of the mesh. Every CNI plugin removes
    /// the links of a deleted pod's netns; our own sockets keep the netns itself.
    pub async fn deleted(&self) {
        let look = async {
            // One of all that wait looks, and when it has gone, the next one.
            let _turn = self.deletion.looks.acquire().await;
            loop {
                tokio::time::sleep(LOOK_FOR_LINKS_EVERY).await;
                if self.netns.enter(|| Ok(if_nameindex()?.iter().all(is_loopback))).unwrap_or(false) {
                    return self.deletion.seen.cancel();
                }
            }
        };
        tokio::select! {
            () = self.deletion.seen.cancelled() => {}
            () = look => {}
        }
    }
}

fn is_loopback(link: &Interface) -> bool {
    link.name().to_bytes() == b"lo"
}
