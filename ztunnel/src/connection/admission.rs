//! Whether a client may reach a pod, and for how long. The same for HBONE and for plaintext.

use std::{
    cell::Cell,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, info};

use crate::{
    context::ProcessContext,
    identity::Identity,
    mesh::{Mesh, Workload},
    pod::ServedPod,
    policy::{Denied, InboundConnection, Protection},
    record::failure_line,
};

/// How long a policy that a workload names, and of which nothing was heard, is waited for. A control
/// plane tells workloads before policies, in one push, so it is on its way.
const HEAR_OF_POLICY: Duration = Duration::from_millis(1500);

/// A connection that policy decides about, from its admission to its end.
pub(super) struct Subject {
    process: Arc<ProcessContext>,
    pod: Arc<ServedPod>,
    client: IpAddr,
    identity: Option<Identity>,
    target: SocketAddr,
    /// Whether the log has a line that a policy on trial would deny it.
    reported: Cell<bool>,
}

impl Subject {
    /// `client`, who has proved to be `identity`, wants to reach `target` of `pod`.
    pub(super) fn new(
        process: &Arc<ProcessContext>,
        pod: &Arc<ServedPod>,
        client: IpAddr,
        identity: Option<&Identity>,
        target: SocketAddr,
    ) -> Self {
        let (process, pod, identity) = (Arc::clone(process), Arc::clone(pod), identity.cloned());
        Self { process, pod, client, identity, target, reported: Cell::new(false) }
    }

    /// Whether policy lets it pass, as `mesh` knows it. Where that names a policy of which nothing
    /// was heard, waits for it.
    pub(super) async fn admit(&self, mesh: &Mesh, workload: &Workload) -> Result<(), Denied> {
        let mut changes = self.process.store.subscribe();
        match self.check(&self.protection(mesh, workload)) {
            Err(Denied::Unheard(policy)) => {
                debug!(%policy, workload = &*workload.name, "waiting for policies that the workload names");
            }
            decided => return decided,
        }
        let deadline = Instant::now() + HEAR_OF_POLICY;
        loop {
            changes.mark_unchanged();
            // A workload that is gone meanwhile keeps what was known of it.
            let decided = match self.current() {
                Some((mesh, workload)) => self.check(&self.protection(&mesh, &workload)),
                None => self.check(&self.protection(mesh, workload)),
            };
            let heard = timeout_at(deadline, changes.changed());
            match decided {
                Err(Denied::Unheard(_)) if matches!(heard.await, Ok(Ok(()))) => {}
                decided => return decided,
            }
        }
    }

    /// Ends when a change of policy forbids what was allowed. Wakes only for a change of what
    /// protects the pod.
    pub(super) async fn until_denied(&self) {
        let mut protection = self.pod.protection.subscribe();
        loop {
            let decided = self.check(&protection.borrow_and_update());
            let changed = match decided {
                Ok(()) => protection.changed().await.is_ok(),
                Err(Denied::Unheard(_)) => {
                    let heard = protection.wait_for(|now| !now.names_unheard());
                    matches!(timeout(HEAR_OF_POLICY, heard).await, Ok(Ok(_)))
                }
                Err(_) => false,
            };
            if !changed {
                return;
            }
        }
    }

    fn current(&self) -> Option<(Arc<Mesh>, Arc<Workload>)> {
        let mesh = self.process.store.snapshot();
        let workload = self.pod.workload(&mesh).cloned();
        workload.map(|workload| (mesh, workload))
    }

    fn protection(&self, mesh: &Mesh, workload: &Workload) -> Protection {
        Protection::of(mesh, workload, &self.process.trust)
    }

    fn check(&self, protection: &Protection) -> Result<(), Denied> {
        let (source_ip, destination) = (self.client, self.target);
        let connection = InboundConnection { source_ip, source: self.identity.as_ref(), destination };
        if !self.reported.get()
            && let Err(denied) = protection.try_out(&connection)
        {
            self.reported.set(true);
            if let Some(left_out) = failure_line(source_ip) {
                info!(
                    pod.name = &*self.pod.info.name, %source_ip, %destination, %denied, left_out = left_out.field(),
                    "dry-run: would deny"
                );
            }
        }
        protection.check(&connection)
    }
}
