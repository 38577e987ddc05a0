//! Dials the application of a served pod.

use std::net::{IpAddr, SocketAddr};

use tokio::net::TcpStream;

use super::error::InboundError;
use crate::{context::WorkerContext, pod::ServedPod, socket::Dialler};

/// Connects to `to` in the netns of `pod`, from the address of `client` if that is configured.
pub(super) async fn dial(
    worker: &WorkerContext,
    pod: &ServedPod,
    to: SocketAddr,
    client: IpAddr,
) -> Result<TcpStream, InboundError> {
    let from = (worker.process.original_source && pod.own_port.is_none()).then_some(client);
    connect(worker, pod, to, from, client).await
}

/// The same from the pod itself; `client` says on whose behalf.
pub(super) async fn dial_itself(
    worker: &WorkerContext,
    pod: &ServedPod,
    to: SocketAddr,
    client: IpAddr,
) -> Result<TcpStream, InboundError> {
    connect(worker, pod, to, None, client).await
}

async fn connect(
    worker: &WorkerContext,
    pod: &ServedPod,
    to: SocketAddr,
    from: Option<IpAddr>,
    client: IpAddr,
) -> Result<TcpStream, InboundError> {
    let _place = pod.budget.dial(client).await.map_err(|_| InboundError::TooManyDials)?;
    // The last hop has the mark also where others may not (see `mark_stays_local`).
    let dialler = Dialler { options: &worker.process.socket, ..worker.dialler(pod) };
    dialler.connect(to, from).await.map_err(InboundError::Dial)
}
