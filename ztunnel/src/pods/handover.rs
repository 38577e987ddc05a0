//! Takes a pod over from another tunnel of the node, such as the predecessor during an update.
//!
//! Of two tunnels that listen in a netns the later one gets the connections. One that knows less
//! would fail those that the other carries. So it waits, and is not ready meanwhile, until it has
//! what connections of the pod need:
//!
//! 1. the word of the control plane itself, not only what was kept of it
//! 2. the pod's workload, without which nobody knows who the pod is and what protects it
//! 3. its certificate
//!
//! A rollout of tunnels that the certificate service refuses stops there. The control plane may be
//! away, and may never tell of the pod, for the other tunnel as for this one: the one is waited for no
//! longer than [`FIRST_LIMIT`], the other [`TELL_LIMIT`]. When nobody else listens in the netns any
//! more, the pod is served in any case.

use std::{os::fd::BorrowedFd, sync::Arc, time::Duration};

use adit_netns::Netns;
use tokio::time::Instant;

use crate::{
    config::ProxyMode, context::ProcessContext, identity::AccountLease, mesh::LocalPod, pod::PodInfo, socket,
    workload_lookup::ask_for_own,
};

/// How long the pod may be without a tunnel when the other one ends.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// How long the control plane may take to tell anything, where nothing is known of the pod: a rollout
/// that it cannot follow stops there for so long.
const FIRST_LIMIT: Duration = Duration::from_mins(1);

/// How long it may take to tell of a pod: several times what one that is there needs.
const TELL_LIMIT: Duration = Duration::from_secs(10);

/// A pod that another tunnel may serve.
#[derive(Debug)]
pub(super) struct Handover {
    pub local: LocalPod,
    /// When it was handed over.
    since: Instant,
    /// Has its certificate fetched.
    _account: AccountLease,
}

impl Handover {
    /// `None` for a tunnel that shares its ports with no other.
    pub(super) fn new(process: &ProcessContext, info: &PodInfo) -> Option<Self> {
        let config = &process.config;
        if config.mode != ProxyMode::Shared || !config.port_reuse {
            return None;
        }
        let (namespace, account) = (Arc::clone(&info.namespace), Arc::clone(&info.service_account));
        Some(Self {
            local: local_pod(process, info),
            since: Instant::now(),
            _account: process.certificates.lease(namespace, account),
        })
    }

    /// What the pod, in `netns`, is left to another tunnel for; `None`: nothing, or nobody can tell.
    pub(super) fn awaits(&self, process: &ProcessContext, netns: BorrowedFd<'_>) -> Option<String> {
        let lack = self.lacks(process)?;
        let (config, options) = (&process.config, &process.socket);
        let is_shared = || socket::is_shared(config.ports.hbone, config.ipv6, options);
        // What goes wrong here goes wrong at the start too, which says so.
        let is_served = Netns::new(netns.try_clone_to_owned().ok()?).and_then(|netns| netns.enter(is_shared));
        if !is_served.is_ok_and(|is_served| is_served) {
            return None;
        }
        if process.store.snapshot().workload_of(&self.local).is_none() {
            ask_for_own(process, &self.local.namespace, &self.local.name);
        }
        Some(lack)
    }

    /// What connections of the pod would need, and is not there.
    fn lacks(&self, process: &ProcessContext) -> Option<String> {
        let (mesh, waited) = (process.store.snapshot(), self.since.elapsed());
        let workload = mesh.workload_of(&self.local);
        // What the other tunnel was told last is here, too, and has the pod.
        let limit = if workload.is_some() { TELL_LIMIT } else { FIRST_LIMIT };
        if waited < limit && !process.store.is_told() {
            return Some("the control plane has not told everything yet".to_owned());
        }
        let Some(workload) = workload else {
            return (waited < TELL_LIMIT).then(|| "the control plane has not told of the pod yet".to_owned());
        };
        process.certificates.lacks(&workload.identity())
    }
}

/// How the mesh knows a pod of this node.
pub(super) fn local_pod(process: &ProcessContext, info: &PodInfo) -> LocalPod {
    LocalPod {
        cluster_id: Arc::clone(&process.config.cluster_id),
        node: Arc::clone(&process.config.node),
        namespace: Arc::clone(&info.namespace),
        name: Arc::clone(&info.name),
        service_account: Arc::clone(&info.service_account),
    }
}
