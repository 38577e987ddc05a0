//! An open connection: what it has carried so far, and how the list of open connections shows it.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus_client::metrics::gauge::Gauge;

use super::ConnectionEnds;
use crate::{
    direction::Direction,
    metrics::{
        LabelSet, Metrics, Traffic, TrafficLabels,
        open::{ConnectionView, LiveConnection},
    },
};

/// How long after its opening a connection is counted by what is known of its source by then.
const LEARN_SOURCE: Duration = Duration::from_secs(5);

/// Bytes that were carried. May be held by both copying directions.
#[derive(Debug, Default)]
pub(crate) struct ByteCounters {
    sent: AtomicU64,
    received: AtomicU64,
}

impl ByteCounters {
    /// From the client to the server.
    pub(crate) fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// From the server to the client.
    pub(crate) fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes sent and received so far.
    pub(crate) fn totals(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }
}

/// An open connection, as the table of open connections holds it.
#[derive(Debug)]
pub(super) struct OpenConnection {
    pub(super) metrics: Arc<Metrics>,
    pub(super) sockets: Gauge,
    pub(super) ends: Mutex<ConnectionEnds>,
    pub(super) started: Instant,
    pub(super) counters: ByteCounters,
    /// Whoever holds it counts.
    pub(super) counted: Mutex<Counted>,
}

/// What the metrics know of a connection.
#[derive(Debug, Default)]
pub(super) struct Counted {
    /// Of the ends as they were when it was counted as opened, so that what was opened is closed.
    /// `None`: it is not counted yet, since its source may be told in a moment.
    pub(super) traffic: Option<Arc<LabelSet<TrafficLabels, Traffic>>>,
    pub(super) sent: u64,
    pub(super) received: u64,
}

impl OpenConnection {
    pub(super) fn ends(&self) -> MutexGuard<'_, ConnectionEnds> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts it as opened, unless it was or `only_if_known` and its source is not told.
    pub(super) fn count_opened(&self, only_if_known: bool) {
        let mut counted = self.counted();
        if counted.traffic.is_some() {
            return;
        }
        let mut ends = self.ends();
        if ends.learn_source() || !only_if_known {
            let traffic = self.metrics.traffic(ends.labels("-"));
            traffic.opened.inc();
            counted.traffic = Some(traffic);
        }
    }

    /// Adds what it carried since the last time to the counters.
    fn count_bytes(&self) {
        let mut counted = self.counted();
        let Counted { traffic: Some(traffic), sent: sent_before, received: received_before } = &mut *counted
        else {
            return;
        };
        let (sent, received) = self.counters.totals();
        // Istio counts metrics from the server's side, and logs from the client's.
        traffic.received.inc_by(sent - *sent_before);
        traffic.sent.inc_by(received - *received_before);
        (*sent_before, *received_before) = (sent, received);
    }

    /// Counts it as closed, with what it carried to the end.
    pub(super) fn count_closed(&self) {
        self.count_opened(false);
        self.count_bytes();
        if let Some(traffic) = &self.counted().traffic {
            traffic.closed.inc();
        }
    }
}

impl LiveConnection for OpenConnection {
    fn count(&self) {
        self.count_opened(self.started.elapsed() < LEARN_SOURCE);
        self.count_bytes();
    }

    fn view(&self) -> ConnectionView {
        let (bytes_sent, bytes_received) = self.counters.totals();
        let ends = self.ends();
        let (ours, peer, peer_identity) = match ends.direction {
            Direction::Inbound => (&ends.destination_workload, &ends.source_workload, &ends.source_identity),
            Direction::Outbound => {
                (&ends.source_workload, &ends.destination_workload, &ends.destination_identity)
            }
        };
        let pod = ours.as_ref().map(|pod| (Arc::clone(&pod.namespace), Arc::clone(&pod.name)));
        let (dialled, actual) = match (ends.hbone, ends.direction) {
            (Some(target), Direction::Inbound) => (ends.destination, target),
            (Some(target), Direction::Outbound) => (target, ends.destination),
            (None, _) => (ends.destination, ends.destination),
        };
        ConnectionView {
            src: ends.source,
            original_dst: Some(dialled.to_string()),
            actual_dst: actual.to_string(),
            protocol: if ends.hbone.is_some() { "HBONE" } else { "TCP" },
            direction: ends.direction.as_str(),
            pod: pod.unwrap_or_default(),
            peer: peer.as_ref().map(|peer| format!("{}/{}", peer.namespace, peer.name)),
            peer_identity: peer_identity.as_ref().map(ToString::to_string),
            service: ends.destination_service.as_ref().map(|service| Arc::clone(&service.hostname)),
            bytes_sent,
            bytes_received,
            age: self.started.elapsed(),
        }
    }
}
