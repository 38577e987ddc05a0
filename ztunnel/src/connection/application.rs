//! Dials the application of a served pod.

use std::net::{IpAddr, SocketAddr};

use tokio::net::TcpStream;

use super::error::InboundError;
use crate::{context::ProcessContext, pod::ServedPod, socket};

/// Connects to `to` in the netns of `pod`, from the address of `client` if that is configured.
pub(super) async fn dial(
    process: &ProcessContext,
    pod: &ServedPod,
    to: SocketAddr,
    client: IpAddr,
) -> Result<TcpStream, InboundError> {
    let from = (process.original_source && pod.own_port.is_none()).then_some(client);
    connect(process, pod, to, from, client).await
}

/// The same from the pod itself; `client` says on whose behalf.
pub(super) async fn dial_itself(
    process: &ProcessContext,
    pod: &ServedPod,
    to: SocketAddr,
    client: IpAddr,
) -> Result<TcpStream, InboundError> {
    connect(process, pod, to, None, client).await
}

async fn connect(
    process: &ProcessContext,
    pod: &ServedPod,
    to: SocketAddr,
    from: Option<IpAddr>,
    client: IpAddr,
) -> Result<TcpStream, InboundError> {
    let _place = pod.budget.dial(client).await.map_err(|_| InboundError::TooManyDials)?;
    socket::connect(&pod.netns, to, from, &process.socket).await.map_err(InboundError::Dial)
}
