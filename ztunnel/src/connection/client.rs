//! The client of a connection, while it waits for its destination.

use tokio::net::TcpStream;

use super::error::ClientLeft;
use crate::socket;

/// Does `work` for a client, unless it leaves first. A client that gave up and came back would
/// otherwise have all its attempts open at once, at both ends.
pub(super) async fn while_waiting<T, E: From<ClientLeft>>(
    client: &TcpStream,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::select! {
        done = work => done,
        () = socket::client_left(client) => Err(ClientLeft.into()),
    }
}
