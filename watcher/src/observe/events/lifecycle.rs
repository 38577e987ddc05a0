//! Events from our programs on the kernel's tracepoints.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    task::{Context, Poll, ready},
};

use adit_ebpf_common::lifecycle::Kind;
use adit_ebpf_loader::{Lifecycle, LifecycleEvent};
use tokio::io::unix::AsyncFd;

use super::{Event, EventSource, EventSourceError, EventSourceNeeds, SourceKind};
use crate::sys::pollable;

/// The ring buffer and its readiness.
#[derive(Debug)]
pub(crate) struct LifecycleSource {
    lifecycle: Lifecycle,
    readable: AsyncFd<OwnedFd>,
    /// How many lost events were reported already.
    lost: u64,
}

impl LifecycleSource {
    fn newly_lost(&mut self) -> Option<u64> {
        // An unreadable counter counts as unchanged; else every call would cause a full scan.
        let lost = self.lifecycle.lost().unwrap_or(self.lost);
        let newly = lost.saturating_sub(self.lost);
        self.lost = lost;
        (newly > 0).then_some(newly)
    }
}

impl EventSource for LifecycleSource {
    /// The loader's preflight checks the tracepoints; attaching alone would show more.
    fn probe() -> Result<(), EventSourceError> {
        Ok(())
    }

    fn open(needs: &mut EventSourceNeeds<'_>) -> Result<Self, EventSourceError> {
        let lifecycle = needs.kernel.lifecycle(needs.base).map_err(EventSourceError::Attach)?;
        let fd = lifecycle.as_fd().try_clone_to_owned();
        let readable = fd.and_then(pollable).map_err(EventSourceError::RingBuffer)?;
        Ok(Self { lifecycle, readable, lost: 0 })
    }

    fn kind(&self) -> SourceKind {
        SourceKind::Lifecycle
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Event> {
        loop {
            match self.lifecycle.next() {
                Some(LifecycleEvent::Cgroup { path, closed, .. }) => {
                    return Poll::Ready(Event::Cgroup { path, closed });
                }
                Some(LifecycleEvent::Process { cgroup_id, kind: Kind::WantsPort }) => {
                    return Poll::Ready(Event::WantsPort { cgroup_id });
                }
                Some(LifecycleEvent::Process { cgroup_id, .. }) => {
                    return Poll::Ready(Event::Process { cgroup_id });
                }
                None => {}
            }
            if let Some(lost) = self.newly_lost() {
                return Poll::Ready(Event::Lost(lost));
            }
            match ready!(self.readable.poll_read_ready(context)) {
                // Cleared before the ring is read again, so that no event that arrives meanwhile is
                // missed.
                Ok(mut guard) => guard.clear_ready(),
                // The runtime is shutting down.
                Err(_) => return Poll::Pending,
            }
        }
    }
}
