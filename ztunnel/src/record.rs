//! What remains of a connection: one access record at its end, and the counters.
//!
//! Field names, their order and the meaning of the numbers are those of Istio's tunnel, since runbooks rely on them.

use std::{
    error::Error,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tracing::{Level, event, field::DisplayValue};

use crate::{
    direction::Direction,
    error_chain::error_chain,
    identity::Identity,
    mesh::{Service, Workload},
    metrics::{
        EndLabels, Metrics, Traffic, TrafficLabels,
        failures::FailedConnection,
        open::{ConnectionSlot, ConnectionView, LiveConnection},
    },
    reason::FailureReason,
};

/// Both ends of a connection, as far as they are known.
#[derive(Clone, Debug)]
pub struct Ends {
    pub direction: Direction,
    pub source: SocketAddr,
    pub source_workload: Option<Arc<Workload>>,
    /// Proven by mutual TLS; `None` for plaintext. So for `destination_identity`.
    pub source_identity: Option<Identity>,
    /// Whom we talk to: over HBONE the tunnel's port 15008.
    pub destination: SocketAddr,
    /// Over HBONE, the target behind the tunnel.
    pub hbone: Option<SocketAddr>,
    pub destination_workload: Option<Arc<Workload>>,
    pub destination_identity: Option<Identity>,
    pub destination_service: Option<Arc<Service>>,
}

impl Ends {
    pub fn new(direction: Direction, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            direction,
            source,
            source_workload: None,
            source_identity: None,
            destination,
            hbone: None,
            destination_workload: None,
            destination_identity: None,
            destination_service: None,
        }
    }

    fn failed(&self, error: &str, reason: FailureReason) -> FailedConnection {
        FailedConnection {
            at: SystemTime::now(),
            direction: self.direction.as_str(),
            reason,
            src: self.source,
            dst: self.hbone.unwrap_or(self.destination),
            error: error.to_owned(),
        }
    }

    fn labels(&self, response_flags: &'static str) -> TrafficLabels {
        let service = self.destination_service.as_deref();
        TrafficLabels {
            reporter: self.direction.reporter(),
            source: end_labels(self.source_workload.as_deref(), self.source_identity.as_ref()),
            destination: end_labels(self.destination_workload.as_deref(), self.destination_identity.as_ref()),
            destination_service: service.map(|service| Arc::clone(&service.hostname)).unwrap_or_default(),
            destination_service_namespace: service
                .map(|service| Arc::clone(&service.namespace))
                .unwrap_or_default(),
            destination_service_name: service.map(|service| Arc::clone(&service.name)).unwrap_or_default(),
            response_flags,
            mutual_tls: self.source_identity.is_some() || self.destination_identity.is_some(),
        }
    }
}

fn end_labels(workload: Option<&Workload>, identity: Option<&Identity>) -> EndLabels {
    let principal = identity.map(|identity| identity.to_string().into()).unwrap_or_default();
    let Some(workload) = workload else { return EndLabels { principal, ..EndLabels::default() } };
    EndLabels {
        workload: Arc::clone(&workload.workload_name),
        canonical_service: Arc::clone(&workload.canonical_name),
        canonical_revision: Arc::clone(&workload.canonical_revision),
        namespace: Arc::clone(&workload.namespace),
        principal,
        cluster: Arc::clone(&workload.cluster_id),
        region: Arc::clone(&workload.locality.region),
        zone: Arc::clone(&workload.locality.zone),
    }
}

/// An error that ends a connection. Its `Display` is the record's `error`.
pub trait Failure: Error {
    /// For the record, the metrics and the admin page.
    fn reason(&self) -> FailureReason;

    /// Istio's flags: `DENY`, `CONNECT`, `TLS_FAILURE`, `H2_HANDSHAKE_FAILURE`, `NETWORK_POLICY`, `IDENTITY_ERROR`,
    /// or `-` for what none of them says.
    fn response_flags(&self) -> &'static str {
        "-"
    }
}

/// Bytes that were carried. May be held by both copying directions.
#[derive(Debug, Default)]
pub struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Counters {
    /// From the client to the server.
    pub fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// From the server to the client.
    pub fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes sent and received so far.
    pub fn totals(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }
}

/// An open connection, as the table of open connections holds it.
#[derive(Debug)]
struct Shown {
    /// Of the ends as they were at the opening, so that what was opened is closed.
    traffic: Arc<Traffic>,
    ends: Mutex<Ends>,
    started: Instant,
    counters: Counters,
    /// What the metrics know already: sent and received. Whoever holds it counts.
    counted: Mutex<(u64, u64)>,
}

impl Shown {
    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LiveConnection for Shown {
    fn count(&self) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let (sent, received) = self.counters.totals();
        // Istio's metrics are told from the server's side, its logs from the client's.
        self.traffic.received.inc_by(sent - counted.0);
        self.traffic.sent.inc_by(received - counted.1);
        *counted = (sent, received);
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

/// One connection from open to close. Dropped without [`close`](Self::close), it was cut.
#[derive(Debug)]
pub struct Record {
    metrics: Arc<Metrics>,
    shown: Arc<Shown>,
    slot: ConnectionSlot,
    closed: bool,
}

impl Record {
    /// Counts an opened connection.
    pub fn open(metrics: &Arc<Metrics>, ends: Ends) -> Self {
        Self::open_since(metrics, ends, Instant::now())
    }

    /// For a connection that was accepted at `started`, before its ends were known.
    pub fn open_since(metrics: &Arc<Metrics>, ends: Ends, started: Instant) -> Self {
        let traffic = metrics.traffic(ends.labels("-"));
        traffic.opened.inc();
        traffic.sockets_open.inc();
        event!(
            target: "access", Level::DEBUG, src.addr = %ends.source, dst.addr = %ends.destination,
            direction = ends.direction.as_str(), "connection opened"
        );
        let (ends, counters, counted) = (Mutex::new(ends), Counters::default(), Mutex::default());
        let shown = Arc::new(Shown { traffic, ends, started, counters, counted });
        let slot = metrics.open.add(Arc::<Shown>::clone(&shown));
        Self { metrics: Arc::clone(metrics), shown, slot, closed: false }
    }

    pub fn counters(&self) -> &Counters {
        &self.shown.counters
    }

    pub fn sent(&self, bytes: u64) {
        self.shown.counters.sent(bytes);
    }

    pub fn received(&self, bytes: u64) {
        self.shown.counters.received(bytes);
    }

    /// To add what was learnt after the opening. It shows in the access record; the counters' labels stay.
    pub fn ends_mut(&mut self) -> MutexGuard<'_, Ends> {
        self.shown.ends()
    }

    /// Writes the access record.
    pub fn close(mut self, result: Result<(), &dyn Failure>) {
        match result {
            Ok(()) => self.finish(None),
            Err(failure) => self.fail(&error_chain(failure), failure.response_flags(), failure.reason()),
        }
    }

    fn fail(&mut self, error: &str, response_flags: &'static str, reason: FailureReason) {
        let (labels, failed) = {
            let ends = self.shown.ends();
            (ends.labels(response_flags), ends.failed(error, reason))
        };
        self.metrics.failed(&labels, failed);
        self.finish(Some((error, reason.code())));
    }

    fn finish(&mut self, failure: Option<(&str, &'static str)>) {
        self.closed = true;
        self.metrics.open.remove(self.slot);
        self.shown.count();
        self.shown.traffic.closed.inc();
        self.shown.traffic.sockets_open.dec();
        let (sent, received) = self.shown.counters.totals();
        log(&self.shown.ends(), sent, received, self.shown.started.elapsed(), failure);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.closed {
            self.fail("connection cut", "-", FailureReason::Cut);
        }
    }
}

/// Records a connection that ended before its ends were known: it counts as failed, never as opened.
pub fn denied_early(metrics: &Metrics, ends: &Ends, failure: &dyn Failure) {
    let direction = ends.direction.as_str();
    let error = error_chain(failure);
    metrics.failed(&ends.labels(failure.response_flags()), ends.failed(&error, failure.reason()));
    event!(
        target: "access", Level::WARN, src.addr = %ends.source, dst.addr = %ends.destination, direction, error,
        reason = failure.reason().code(), "connection failed"
    );
}

/// The fields of an access record. `tracing` needs the level at compile time, the fields are the same for all.
macro_rules! access {
    ($level:expr, $line:expr, $($last:tt)+) => {
        event!(
            target: "access",
            $level,
            src.addr = %$line.ends.source,
            src.workload = $line.source.name,
            src.namespace = $line.source.namespace,
            src.identity = $line.source.identity,
            src.cluster = $line.source.cluster,
            dst.addr = %$line.ends.destination,
            dst.hbone_addr = $line.hbone,
            dst.service = $line.service,
            dst.workload = $line.destination.name,
            dst.namespace = $line.destination.namespace,
            dst.identity = $line.destination.identity,
            dst.cluster = $line.destination.cluster,
            direction = $line.ends.direction.as_str(),
            bytes_sent = $line.sent,
            bytes_recv = $line.received,
            duration = $line.duration,
            $($last)+
        )
    };
}

/// One end in an access record. What is not known is left out.
struct LoggedEnd<'a> {
    name: Option<&'a str>,
    namespace: Option<&'a str>,
    identity: Option<&'a str>,
    cluster: Option<&'a str>,
}

impl<'a> LoggedEnd<'a> {
    fn new(workload: Option<&'a Workload>, identity: Option<&'a String>) -> Self {
        Self {
            name: workload.map(|workload| &*workload.name),
            namespace: workload.map(|workload| &*workload.namespace),
            identity: identity.map(String::as_str),
            cluster: workload.map(|workload| &*workload.cluster_id).filter(|cluster| !cluster.is_empty()),
        }
    }
}

struct Line<'a> {
    ends: &'a Ends,
    source: LoggedEnd<'a>,
    destination: LoggedEnd<'a>,
    hbone: Option<DisplayValue<SocketAddr>>,
    service: Option<&'a str>,
    sent: u64,
    received: u64,
    duration: &'a str,
}

fn log(ends: &Ends, sent: u64, received: u64, lasted: Duration, failure: Option<(&str, &str)>) {
    let identities = [&ends.source_identity, &ends.destination_identity]
        .map(|identity| identity.as_ref().map(ToString::to_string));
    let line = Line {
        ends,
        source: LoggedEnd::new(ends.source_workload.as_deref(), identities[0].as_ref()),
        destination: LoggedEnd::new(ends.destination_workload.as_deref(), identities[1].as_ref()),
        hbone: ends.hbone.map(tracing::field::display),
        service: ends.destination_service.as_ref().map(|service| &*service.hostname),
        sent,
        received,
        duration: &format!("{}ms", lasted.as_millis()),
    };
    match failure {
        None => access!(Level::INFO, line, "connection complete"),
        Some((error, reason)) => access!(Level::ERROR, line, error, reason, "connection complete"),
    }
}

#[cfg(test)]
mod tests;
