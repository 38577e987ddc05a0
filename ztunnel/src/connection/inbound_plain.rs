//! Follows one plaintext connection to a served pod: port 15006. Policy holds here too, but the
//! client has no proven identity.

use std::{net::SocketAddr, rc::Rc, sync::Arc, time::Instant};

use super::{admission::Subject, application, client::while_waiting, error::InboundError};
use crate::{
    context::Accepted,
    direction::Direction,
    mesh::Workload,
    record::{ByteCounters, ConnectionEnds, ConnectionFailure, ConnectionRecord, record_early_failure},
    socket::{self, OriginalDst},
    stream,
    workload_lookup::{for_label, own_workload},
};

/// A connection that was captured on 15006.
pub(crate) async fn serve(accepted: Accepted) {
    let client = accepted.client;
    let Ok(original) = socket::original_dst(&accepted.stream) else { return socket::reset(accepted.stream) };
    let target = original.address;
    let (worker, pod) = (Rc::clone(&accepted.worker), Arc::clone(&accepted.pod));
    let metrics = &worker.process.metrics;
    let subject = Subject::new(&worker.process, &pod, client.ip(), None, target);
    let mut ends = ConnectionEnds::new(Direction::Inbound, client, target);
    let admitting = admit(&accepted, &subject, original);
    let Admitted { source, workload } = match while_waiting(&accepted.stream, admitting).await {
        Ok(admitted) => admitted,
        Err(error) => {
            record_early_failure(metrics, &ends, &error);
            return socket::reset(accepted.stream);
        }
    };
    ends.source_workload = source;
    ends.destination_workload = Some(workload);
    let record = ConnectionRecord::open(metrics, ends);
    let result = carry(accepted, &subject, target, record.counters()).await;
    record.close(result.as_ref().copied().map_err(|error| error as &dyn ConnectionFailure));
}

/// Both ends of a connection that policy allows.
struct Admitted {
    /// For labels.
    source: Option<Arc<Workload>>,
    workload: Arc<Workload>,
}

async fn admit(
    accepted: &Accepted,
    subject: &Subject,
    original: OriginalDst,
) -> Result<Admitted, InboundError> {
    let target = original.address;
    let process = &accepted.worker.process;
    if process.config.ports.is_own(target.port()) {
        return Err(InboundError::Recursive);
    }
    let (mesh, workload) = own_workload(process, &accepted.pod).await?;
    // A redirect also catches what is not for the pod: a neighbour on its network could use it as a
    // proxy, with its address.
    let is_own =
        || workload.addresses.contains(&target.ip()) || socket::is_local(&accepted.pod.netns, target);
    if original.is_recorded && !is_own() {
        return Err(InboundError::NotOwnAddress(target.ip()));
    }
    let client = accepted.client.ip();
    subject.admit(&mesh, &workload).await?;
    let source = for_label(process, &accepted.pod, &mesh, false, |view| {
        view.workload_by_address(&workload.network, client).cloned()
    });
    Ok(Admitted { source, workload })
}

async fn carry(
    accepted: Accepted,
    subject: &Subject,
    target: SocketAddr,
    counters: &ByteCounters,
) -> Result<(), InboundError> {
    let Accepted { stream, client, pod, worker, descriptors: _descriptors } = accepted;
    let (process, began) = (&worker.process, Instant::now());
    let dialling = application::dial(&worker, &pod, target, client.ip());
    let application = match while_waiting(&stream, dialling).await {
        Ok(application) => application,
        Err(error) => {
            socket::reset(stream);
            return Err(error);
        }
    };
    process.metrics.connected(Direction::Inbound.as_str(), began.elapsed());
    Ok(stream::relay(stream, application, &[counters], process.config.limits, subject.until_denied()).await?)
}
