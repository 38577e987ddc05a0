//! Dials the application of a served pod.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use tokio::net::TcpStream;

use crate::{context::ProcessContext, pod::ServedPod, socket};

/// Connects to `to` in the netns of `pod`, from the address of `client` if that is configured.
pub(super) async fn dial(
    process: &ProcessContext,
    pod: &ServedPod,
    to: SocketAddr,
    client: IpAddr,
) -> io::Result<TcpStream> {
    let from = (process.original_source && pod.own_port.is_none()).then_some(client);
    socket::connect(&pod.netns, to, from, &process.socket).await
}
