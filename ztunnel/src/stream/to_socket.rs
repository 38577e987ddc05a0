//! Copies into a socket, from an HBONE stream or from another socket.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io::{self, IoSlice},
    net::Shutdown,
    pin::Pin,
    task::Poll,
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream};
use socket2::SockRef;
use tokio::{
    io::AsyncWrite as _,
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

use super::{
    error::StreamError,
    scratch::{self, LARGE},
};

/// Copies until the stream ends.
pub(super) async fn stream_to_socket(
    recv: &mut RecvStream,
    mut socket: WriteHalf<'_>,
    moved: impl Fn(u64),
) -> Result<(), StreamError> {
    let mut queue = VecDeque::new();
    loop {
        let mut ended = match recv.data().await {
            Some(data) => {
                queue.push_back(data.map_err(broken_by_peer)?);
                false
            }
            None => true,
        };
        // Data that has also arrived goes into the same write.
        let mut waiting: usize = queue.iter().map(Bytes::len).sum();
        let mut broken = None;
        while !ended && waiting < LARGE {
            match poll_fn(|cx| Poll::Ready(recv.poll_data(cx))).await {
                Poll::Ready(Some(Ok(data))) => {
                    waiting += data.len();
                    queue.push_back(data);
                }
                Poll::Ready(Some(Err(error))) => {
                    broken = Some(broken_by_peer(error));
                    break;
                }
                Poll::Ready(None) => ended = true,
                Poll::Pending => break,
            }
        }
        while !queue.is_empty() {
            let n = write_some(&mut socket, &mut queue).await.map_err(StreamError::Socket)?;
            moved(n as u64);
            // Only now may the peer send more. This fails only if the stream has ended, which
            // `recv` reports.
            let _ = recv.flow_control().release_capacity(n);
        }
        if let Some(broken) = broken {
            return clean_if_compatible(broken, socket.as_ref());
        }
        if ended {
            return end(socket.as_ref());
        }
    }
}

/// See the module's exception: the end is passed on before the stream counts as over.
fn clean_if_compatible(broken: StreamError, socket: &TcpStream) -> Result<(), StreamError> {
    if let StreamError::Reset(Reason::CANCEL | Reason::NO_ERROR) = broken {
        let _ = end(socket);
    }
    Err(broken)
}

fn end(socket: &TcpStream) -> Result<(), StreamError> {
    match SockRef::from(socket).shutdown(Shutdown::Write) {
        // The other direction has already ended the connection.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        other => other.map_err(StreamError::Socket),
    }
}

fn broken_by_peer(error: h2::Error) -> StreamError {
    match error.reason() {
        Some(reason) if error.is_reset() => StreamError::Reset(reason),
        _ => StreamError::Tunnel(error),
    }
}

/// Writes what the socket takes, straight from the received frames. Returns how many bytes that
/// were.
async fn write_some(socket: &mut WriteHalf<'_>, queue: &mut VecDeque<Bytes>) -> io::Result<usize> {
    let mut slices = [IoSlice::new(&[]); 64];
    let count = queue.len().min(slices.len());
    for (slice, data) in slices.iter_mut().zip(queue.iter()) {
        *slice = IoSlice::new(data);
    }
    let slices = &slices[..count];
    let written = poll_fn(|cx| Pin::new(&mut *socket).poll_write_vectored(cx, slices)).await?;
    let mut left = written;
    while let Some(first) = queue.front_mut() {
        if first.len() > left {
            first.advance(left);
            break;
        }
        left -= first.len();
        queue.pop_front();
    }
    Ok(written)
}

/// Copies until `from` ends.
pub(super) async fn socket_to_socket(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    moved: impl Fn(u64),
) -> Result<(), StreamError> {
    loop {
        // Writes at once what the other side takes, and keeps only the rest.
        let step = poll_fn(|cx| {
            scratch::poll_read(cx, &mut from, LARGE, |data| {
                if data.is_empty() {
                    return Ok((0, Bytes::new()));
                }
                let written = match to.try_write(data) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                    other => other?,
                };
                Ok((data.len(), Bytes::copy_from_slice(&data[written..])))
            })
        });
        let (n, rest) = step.await.flatten().map_err(StreamError::Socket)?;
        if n == 0 {
            return end(to.as_ref());
        }
        let mut rest = VecDeque::from([rest]);
        while !rest.iter().all(Bytes::is_empty) {
            write_some(&mut to, &mut rest).await.map_err(StreamError::Socket)?;
        }
        moved(n as u64);
    }
}
