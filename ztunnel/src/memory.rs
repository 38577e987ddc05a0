//! Memory for what streams have received and their sockets have not taken yet, and for what was read
//! from sockets and peers have not taken.
//!
//! HTTP/2 lets a peer send as much as the window of a stream allows, whether or not somebody reads
//! it. So a window is a promise of memory, and promises have budgets:
//!
//! * a stream: its window begins at 256 KiB, and grows to `h2.stream_window_bytes` while its socket
//!   takes what arrives
//! * a tunnel: the windows of its streams have 16 MiB together. They get smaller as the streams
//!   become more, down to 64 KiB
//! * a pod and the process: `memory.pod_bytes` and `memory.total_bytes`. When one of them is spent,
//!   windows are 64 KiB
//!
//! Each stream has a window of its own, so none waits for what another one does not read.
//!
//! What is to be sent counts when it is there, before and after TLS: once a tunnel has queued 4 MiB,
//! or the pod or the process holds what its budget allows, a stream queues one read of 16 KiB at a
//! time, and TLS keeps one record for the connection.
//!
//! * this file: the budgets of pods and the process
//! * `tunnel`: the windows of one tunnel, and how many streams of it were reset
//! * `queue`: what streams have queued to be sent

mod queue;
mod tunnel;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use prometheus_client::metrics::gauge::Gauge;

pub use self::queue::SendData;
pub(crate) use self::queue::SendQueue;
pub(crate) use self::tunnel::{
    RESET_REMEMBERED, RESETS, StreamMemory, TunnelBuffers, TunnelChange, TunnelMemory,
};

/// Bytes of streams in memory. Each budget has its own; those of the process are shown.
#[derive(Clone, Debug, Default)]
pub struct MemoryMetrics {
    /// That the windows of open streams allow peers to send.
    pub promised: Gauge,
    /// That were received, and wait for sockets that take nothing now; or that were read from
    /// sockets, and wait for the tunnel to a peer.
    pub held: Gauge,
}

/// What may be promised, and what was promised and is held.
#[derive(Debug)]
pub struct MemoryBudget {
    limit: usize,
    metrics: MemoryMetrics,
    /// What waits to be sent: a part of what is held.
    queued: AtomicUsize,
    /// The process's, if this is a pod's.
    parent: Option<Arc<Self>>,
}

impl MemoryBudget {
    /// The process's: `limit` in bytes; `metrics` show how much of it is used.
    #[must_use]
    pub fn new(limit: usize, metrics: MemoryMetrics) -> Arc<Self> {
        Arc::new(Self { limit, metrics, queued: AtomicUsize::new(0), parent: None })
    }

    /// That of a pod, as a part of `self`.
    #[must_use]
    pub fn of_pod(self: &Arc<Self>, limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            metrics: MemoryMetrics::default(),
            queued: AtomicUsize::new(0),
            parent: Some(Arc::clone(self)),
        })
    }

    /// How much more may be promised.
    fn room(&self) -> usize {
        let promised = usize::try_from(self.metrics.promised.get()).unwrap_or(0);
        let own = self.limit.saturating_sub(promised.saturating_add(self.queued.load(Relaxed)));
        self.parent.as_ref().map_or(own, |parent| own.min(parent.room()))
    }

    /// Whether less is held than the limit.
    fn has_memory(&self) -> bool {
        let held = usize::try_from(self.metrics.held.get()).unwrap_or(0);
        held < self.limit && self.parent.as_ref().is_none_or(|parent| parent.has_memory())
    }

    /// What a tunnel has queued was `before` and is `now`.
    fn queue(&self, before: usize, now: usize) {
        self.metrics.held.inc_by(difference(now, before));
        self.queued.fetch_add(now, Relaxed);
        self.queued.fetch_sub(before, Relaxed);
        if let Some(parent) = &self.parent {
            parent.queue(before, now);
        }
    }

    fn promise(&self, change: i64) {
        self.metrics.promised.inc_by(change);
        if let Some(parent) = &self.parent {
            parent.promise(change);
        }
    }

    fn hold(&self, change: i64) {
        self.metrics.held.inc_by(change);
        if let Some(parent) = &self.parent {
            parent.hold(change);
        }
    }
}

/// `new - old` for gauges.
fn difference(new: usize, old: usize) -> i64 {
    let signed = |value| i64::try_from(value).unwrap_or(i64::MAX);
    signed(new) - signed(old)
}
