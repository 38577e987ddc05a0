//! Copies from a socket into an HBONE stream.

use std::{future::poll_fn, task::Poll};

use bytes::Bytes;
use h2::{Reason, SendStream};
use tokio::net::TcpStream;

use super::{adaptive::Adaptive, error::StreamError};

/// Copies until the socket ends, or the stream takes no more.
pub(super) async fn socket_to_stream(
    socket: &TcpStream,
    send: &mut SendStream<Bytes>,
    moved: impl Fn(u64),
) -> Result<(), StreamError> {
    let mut buffer = Adaptive::new();
    loop {
        // Also wakes when the peer resets the stream: nothing else checks while the application is
        // silent.
        let readable = async {
            let room = capacity(send, buffer.size).await?;
            tokio::select! {
                biased;
                broken = reset_by_peer(send) => Err(broken),
                ready = socket.readable() => ready.map(|()| room).map_err(StreamError::Socket),
            }
        };
        let room = match readable.await {
            // The peer accepts no more data, but what it sent earlier may still be on its way to
            // the application.
            Err(StreamError::Reset(Reason::CANCEL | Reason::NO_ERROR)) => return Ok(()),
            other => other?,
        };
        let Some(data) = buffer.read(socket, room).map_err(StreamError::Socket)? else { continue };
        let (n, ended) = (data.len(), data.is_empty());
        if let Err(error) = send.send_data(data, ended) {
            // The stream has the more precise reason.
            return Err(known_reset(send).await.unwrap_or(StreamError::Tunnel(error)));
        }
        if ended {
            return Ok(());
        }
        moved(n as u64);
    }
}

/// Waits until some of `wanted` bytes may be sent, and says how many.
async fn capacity(send: &mut SendStream<Bytes>, wanted: usize) -> Result<usize, StreamError> {
    send.reserve_capacity(wanted);
    loop {
        // `poll_capacity` reports only changes; existing capacity must be read first.
        let now = send.capacity();
        if now > 0 {
            return Ok(now);
        }
        let grown = poll_fn(|cx| {
            if let Poll::Ready(reset) = send.poll_reset(cx) {
                return Poll::Ready(Err(reset.map_or_else(StreamError::Tunnel, StreamError::Reset)));
            }
            send.poll_capacity(cx).map(Ok)
        });
        match grown.await? {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(StreamError::Tunnel(error)),
            None => {
                let unknown = StreamError::Reset(Reason::INTERNAL_ERROR);
                return Err(known_reset(send).await.unwrap_or(unknown));
            }
        }
    }
}

async fn reset_by_peer(send: &mut SendStream<Bytes>) -> StreamError {
    match poll_fn(|cx| send.poll_reset(cx)).await {
        Ok(reason) => StreamError::Reset(reason),
        Err(error) => StreamError::Tunnel(error),
    }
}

/// The reset that has already happened, if there was one.
async fn known_reset(send: &mut SendStream<Bytes>) -> Option<StreamError> {
    poll_fn(|cx| {
        Poll::Ready(match send.poll_reset(cx) {
            Poll::Ready(Ok(reason)) => Some(StreamError::Reset(reason)),
            Poll::Ready(Err(error)) => Some(StreamError::Tunnel(error)),
            Poll::Pending => None,
        })
    })
    .await
}
