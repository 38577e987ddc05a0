//! Copies into a socket, from an HBONE stream or from another socket.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::poll_fn,
    io::{self, IoSlice},
    net::Shutdown,
    task::Poll,
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream};
use socket2::SockRef;
use tokio::net::TcpStream;

use super::{adaptive::LARGE, error::StreamError};

/// Copies until the stream ends.
pub(super) async fn stream_to_socket(
    recv: &mut RecvStream,
    socket: &TcpStream,
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
            let n = write_some(socket, &mut queue).await.map_err(StreamError::Socket)?;
            moved(n as u64);
            // Only now may the peer send more. This fails only if the stream has ended, which
            // `recv` reports.
            let _ = recv.flow_control().release_capacity(n);
        }
        if let Some(broken) = broken {
            return clean_if_compatible(broken, socket);
        }
        if ended {
            return end(socket);
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
async fn write_some(socket: &TcpStream, queue: &mut VecDeque<Bytes>) -> io::Result<usize> {
    let mut slices = [IoSlice::new(&[]); 64];
    let count = queue.len().min(slices.len());
    for (slice, data) in slices.iter_mut().zip(queue.iter()) {
        *slice = IoSlice::new(data);
    }
    let written = loop {
        match socket.try_write_vectored(&slices[..count]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await?,
            other => break other?,
        }
    };
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

thread_local! {
    /// The read buffer of `socket_to_socket`, shared by all connections of a worker. It is not used
    /// across an await, and idle connections hold no memory.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; LARGE].into_boxed_slice());
}

/// Copies until `from` ends.
pub(super) async fn socket_to_socket(
    from: &TcpStream,
    to: &TcpStream,
    moved: impl Fn(u64),
) -> Result<(), StreamError> {
    /// Reads once, writes as much as the other side accepts, and returns the rest.
    fn step(from: &TcpStream, to: &TcpStream) -> io::Result<Option<(usize, Vec<u8>)>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let n = match from.try_read(scratch) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                other => other?,
            };
            if n == 0 {
                return Ok(Some((0, Vec::new())));
            }
            let written = match to.try_write(&scratch[..n]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                other => other?,
            };
            Ok(Some((n, scratch[written..n].to_vec())))
        })
    }
    loop {
        from.readable().await.map_err(StreamError::Socket)?;
        let Some((n, rest)) = step(from, to).map_err(StreamError::Socket)? else { continue };
        if n == 0 {
            return end(to);
        }
        let mut rest = VecDeque::from([Bytes::from(rest)]);
        while !rest.iter().all(Bytes::is_empty) {
            write_some(to, &mut rest).await.map_err(StreamError::Socket)?;
        }
        moved(n as u64);
    }
}
