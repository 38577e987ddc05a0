//! Takes a pod over from another tunnel of the node, such as the predecessor during an update.
//!
//! Of two tunnels that listen in a netns the later one gets the connections. One without a
//! certificate for the pod would fail those that the other carries, so it waits for one, and is not
//! ready meanwhile. A rollout of tunnels that the certificate service refuses stops there. When
//! nobody else listens in the netns any more, the pod is served in any case.

use std::{os::fd::BorrowedFd, sync::Arc, time::Duration};

use adit_netns::Netns;

use crate::{
    config::ProxyMode, context::ProcessContext, identity::AccountLease, mesh::LocalPod, pod::PodInfo, socket,
};

/// How long the pod may be without a tunnel when the other one ends.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A pod that another tunnel may serve.
#[derive(Debug)]
pub(super) struct Handover {
    pub local: LocalPod,
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
            _account: process.certificates.lease(namespace, account),
        })
    }

    /// What the pod, in `netns`, is left to another tunnel for; `None`: nothing, or nobody can tell.
    pub(super) fn awaits(&self, process: &ProcessContext, netns: BorrowedFd<'_>) -> Option<String> {
        let mesh = process.store.snapshot();
        // Who it is may become known later; this tunnel then says why it carries nothing.
        let workload = mesh.workload_of(&self.local)?;
        let lack = process.certificates.lacks(&workload.identity())?;
        let (config, options) = (&process.config, &process.socket);
        let is_shared = || socket::is_shared(config.ports.hbone, config.ipv6, options);
        // What goes wrong here goes wrong at the start too, which says so.
        let is_served = Netns::new(netns.try_clone_to_owned().ok()?).and_then(|netns| netns.enter(is_shared));
        is_served.is_ok_and(|is_served| is_served).then_some(lack)
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
