//! Follows one connection that comes to a served pod as it is, without a tunnel: port 15006. Policy holds here
//! too, only that nobody is proven to be anybody.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use super::{
    admission::{check, unknown_client, until_denied},
    error::InboundError,
};
use crate::{
    context::Accepted,
    direction::Direction,
    mesh::{Mesh, Workload},
    record::{Counters, Ends, Failure, Record, denied_early},
    socket, stream,
};

/// A connection that was captured on 15006.
pub async fn serve(accepted: Accepted) {
    let client = accepted.client;
    let Ok(target) = socket::original_dst(&accepted.stream) else { return socket::reset(accepted.stream) };
    let metrics = Arc::clone(&accepted.worker.shared.metrics);
    let mut ends = Ends::new(Direction::Inbound, client, target);
    let (mesh, workload) = match admit(&accepted, target).await {
        Ok(admitted) => admitted,
        Err(error) => {
            denied_early(&metrics, &ends, &error);
            return socket::reset(accepted.stream);
        }
    };
    ends.source_workload = mesh.workload_by_address(&workload.network, client.ip()).cloned();
    ends.destination_workload = Some(workload);
    let record = Record::open(&metrics, ends);
    let result = carry(accepted, target, record.counters()).await;
    record.close(result.as_ref().copied().map_err(|error| error as &dyn Failure));
}

async fn admit(accepted: &Accepted, target: SocketAddr) -> Result<(Arc<Mesh>, Arc<Workload>), InboundError> {
    let shared = &accepted.worker.shared;
    if shared.is_own_port(target.port()) {
        return Err(InboundError::Recursive);
    }
    let (mesh, workload) = shared.workload(&accepted.pod).await?;
    check(&mesh, &workload, accepted.client.ip(), None, target)?;
    let client = |mesh: &Mesh| unknown_client(mesh, &workload, accepted.client.ip());
    // For labels: without an answer there are none.
    let mesh = shared.informed(Arc::clone(&mesh), client).await.unwrap_or(mesh);
    Ok((mesh, workload))
}

async fn carry(accepted: Accepted, target: SocketAddr, counters: &Counters) -> Result<(), InboundError> {
    let Accepted { stream, client, pod, worker } = accepted;
    let (shared, began) = (&worker.shared, Instant::now());
    let application = match shared.dial_application(&pod, target, client.ip()).await {
        Ok(application) => application,
        Err(error) => {
            socket::reset(stream);
            return Err(InboundError::Dial(error));
        }
    };
    shared.metrics.connected(Direction::Inbound.as_str(), began.elapsed());
    let denied = until_denied(shared, &pod, client.ip(), None, target);
    Ok(stream::relay(stream, application, counters, shared.config.limits, denied).await?)
}
