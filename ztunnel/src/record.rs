//! The access record of a connection, written once at its end, and its counters.
//!
//! * `ends`: both ends of it
//! * `live`: what it carries while it is open
//! * `access_log`: the log line

mod access_log;
mod ends;
mod live;

use std::{
    error::Error,
    net::IpAddr,
    sync::{Arc, Mutex},
    time::Instant,
};

use tracing::{Level, event};

use self::live::OpenConnection;
pub(crate) use self::{
    ends::{ConnectionEnds, UntoldSource},
    live::ByteCounters,
};
use crate::{
    error_chain::error_chain,
    logging::line::cut,
    metrics::{Metrics, open::ConnectionSlot},
    rarely::PerPeer,
    reason::FailureReason,
};

/// Of the text of an error, which may have words of a peer in it.
const LONGEST_ERROR: usize = 1024;

/// Lines about what peers do that comes to nothing.
static FAILURES: PerPeer = PerPeer::new();

/// Whether `client` may cause another line about what came to nothing. If so: what the line says of
/// those that were left out since the last one.
pub(crate) fn failure_line(client: IpAddr) -> Option<LeftOut> {
    FAILURES.due(client).map(LeftOut)
}

/// A number of lines. A field of the log if it is not zero.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeftOut(u64);

impl LeftOut {
    pub(crate) fn field(self) -> Option<u64> {
        (self.0 > 0).then_some(self.0)
    }
}

/// An error that ends a connection. Its `Display` is the record's `error`.
pub(crate) trait ConnectionFailure: Error {
    /// For the record, the metrics and the admin page.
    fn reason(&self) -> FailureReason;

    /// Istio's flags: `DENY`, `CONNECT`, `TLS_FAILURE`, `H2_HANDSHAKE_FAILURE`, `NETWORK_POLICY`,
    /// `IDENTITY_ERROR`, or `-` for what none of them says.
    fn response_flags(&self) -> &'static str {
        "-"
    }
}

/// One connection from open to close. Dropped without [`close`](Self::close), it was cut.
#[derive(Debug)]
pub(crate) struct ConnectionRecord {
    open: Arc<OpenConnection>,
    slot: ConnectionSlot,
    closed: bool,
}

impl ConnectionRecord {
    /// Counts an opened connection.
    pub(crate) fn open(metrics: &Arc<Metrics>, ends: ConnectionEnds) -> Self {
        Self::open_since(metrics, ends, Instant::now())
    }

    /// For a connection that was accepted at `started`, before its ends were known.
    pub(crate) fn open_since(metrics: &Arc<Metrics>, ends: ConnectionEnds, started: Instant) -> Self {
        let sockets = metrics.sockets_open(ends.direction.reporter());
        sockets.inc();
        event!(
            target: "access", Level::DEBUG, src.addr = %ends.source, dst.addr = %ends.destination,
            direction = ends.direction.as_str(), "connection opened"
        );
        let (ends, counters, counted) = (Mutex::new(ends), ByteCounters::default(), Mutex::default());
        let metrics = Arc::clone(metrics);
        let open = Arc::new(OpenConnection { metrics, sockets, ends, started, counters, counted });
        open.count_opened(true);
        let slot = open.metrics.open.add(Arc::<OpenConnection>::clone(&open));
        Self { open, slot, closed: false }
    }

    pub(crate) fn counters(&self) -> &ByteCounters {
        &self.open.counters
    }

    /// The connection is tried at another endpoint, before a byte was carried. It has one record; the
    /// metrics of each endpoint count a connection, so that what was opened is closed.
    pub(crate) fn redirect(&mut self, ends: ConnectionEnds) {
        if let Some(before) = self.open.counted().traffic.take() {
            before.closed.inc();
        }
        *self.open.ends() = ends;
        self.open.count_opened(true);
    }

    #[cfg(test)]
    pub(crate) fn ends_mut(&mut self) -> std::sync::MutexGuard<'_, ConnectionEnds> {
        self.open.ends()
    }

    /// Writes the access record.
    pub(crate) fn close(mut self, result: Result<(), &dyn ConnectionFailure>) {
        match result {
            Ok(()) => self.finish(None),
            Err(failure) => self.fail(
                cut(&error_chain(failure), LONGEST_ERROR),
                failure.response_flags(),
                failure.reason(),
            ),
        }
    }

    fn fail(&mut self, error: &str, response_flags: &'static str, reason: FailureReason) {
        let (labels, failed) = {
            let mut ends = self.open.ends();
            ends.learn_source();
            (ends.labels(response_flags), ends.failed(error, reason))
        };
        self.open.metrics.failed(&labels, failed);
        self.finish(Some((error, reason.code())));
    }

    fn finish(&mut self, failure: Option<(&str, &'static str)>) {
        self.closed = true;
        self.open.metrics.open.remove(self.slot);
        self.open.count_closed();
        self.open.sockets.dec();
        let (sent, received) = self.open.counters.totals();
        self.open.ends().learn_source();
        access_log::write(&self.open.ends(), sent, received, self.open.started.elapsed(), failure);
    }
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        if !self.closed {
            self.fail("connection cut", "-", FailureReason::Cut);
        }
    }
}

/// Records a connection that ended before its ends were known: it counts as failed, never as
/// opened.
pub(crate) fn record_early_failure(
    metrics: &Metrics,
    ends: &ConnectionEnds,
    failure: &dyn ConnectionFailure,
) {
    let direction = ends.direction.as_str();
    let error = error_chain(failure);
    let error = cut(&error, LONGEST_ERROR);
    metrics.failed(&ends.labels(failure.response_flags()), ends.failed(error, failure.reason()));
    if let Some(left_out) = failure_line(ends.source.ip()) {
        event!(
            target: "access", Level::WARN, src.addr = %ends.source, dst.addr = %ends.destination, direction, error,
            reason = failure.reason().code(), left_out = left_out.field(), "connection failed"
        );
    }
}

#[cfg(test)]
mod tests;
