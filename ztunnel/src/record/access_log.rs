//! The access record as a log line. Field names, their order and the meaning of the numbers are
//! those of Istio's tunnel, since runbooks rely on them.

use std::{net::SocketAddr, time::Duration};

use tracing::{Level, event, field::DisplayValue};

use super::ConnectionEnds;
use crate::mesh::Workload;

/// The fields of an access record. `tracing` needs the level at compile time, the fields are the
/// same for all.
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
    ends: &'a ConnectionEnds,
    source: LoggedEnd<'a>,
    destination: LoggedEnd<'a>,
    hbone: Option<DisplayValue<SocketAddr>>,
    service: Option<&'a str>,
    sent: u64,
    received: u64,
    duration: &'a str,
}

/// Writes the record of a connection that was open for `lasted`. `failure`: error and reason; of
/// many failures of one client only some have a record.
pub(super) fn write(
    ends: &ConnectionEnds,
    sent: u64,
    received: u64,
    lasted: Duration,
    failure: Option<(&str, &str)>,
) {
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
    let Some((error, reason)) = failure else {
        return access!(Level::INFO, line, "connection complete");
    };
    if let Some(left_out) = super::failure_line(ends.source.ip()) {
        access!(Level::ERROR, line, error, reason, left_out = left_out.field(), "connection complete");
    }
}
