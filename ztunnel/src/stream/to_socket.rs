//! Copies into a socket, from an HBONE stream or from another socket.

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    net::Shutdown,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
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
    received::Received,
    scratch::{self, LARGE},
};
use crate::memory::StreamMemory;

/// Copies until the stream ends.
pub(super) async fn stream_to_socket(
    recv: &mut RecvStream,
    socket: WriteHalf<'_>,
    memory: &mut StreamMemory,
    moved: impl Fn(u64),
) -> Result<(), StreamError> {
    let mut copy = ToSocket { recv, socket, memory, received: Received::default(), ended: None };
    poll_fn(|cx| copy.poll(cx, &moved)).await
}

struct ToSocket<'a> {
    recv: &'a mut RecvStream,
    socket: WriteHalf<'a>,
    memory: &'a mut StreamMemory,
    received: Received,
    /// How the stream ended. What it sent before is written first.
    ended: Option<Result<(), StreamError>>,
}

impl ToSocket<'_> {
    fn poll(&mut self, cx: &mut Context<'_>, moved: &impl Fn(u64)) -> Poll<Result<(), StreamError>> {
        loop {
            self.receive(cx);
            if self.received.bytes() == 0 {
                let Some(ended) = self.ended.take() else { return Poll::Pending };
                return Poll::Ready(match ended {
                    Ok(()) => end(self.socket.as_ref()),
                    Err(broken) => clean_if_compatible(broken, self.socket.as_ref()),
                });
            }
            match self.poll_write(cx) {
                Poll::Ready(written) => moved(written.map_err(StreamError::Socket)? as u64),
                Poll::Pending => {
                    if !self.received.is_stalled() {
                        self.received.stall();
                        self.memory.hold(self.received.bytes());
                        self.receive(cx);
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Takes what has arrived: as much as one write may take, so that it all goes into that. If the
    /// socket takes nothing, everything: h2 would keep small frames at a large cost.
    fn receive(&mut self, cx: &mut Context<'_>) {
        let stalled = self.received.is_stalled();
        while self.ended.is_none() && (stalled || self.received.bytes() < LARGE) {
            match self.recv.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) => {
                    if stalled {
                        self.memory.hold(data.len());
                    }
                    self.received.push(data);
                }
                Poll::Ready(Some(Err(error))) => self.ended = Some(Err(broken_by_peer(error))),
                Poll::Ready(None) => self.ended = Some(Ok(())),
                Poll::Pending => return,
            }
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut slices = [IoSlice::new(&[]); 64];
        let count = self.received.slices(&mut slices);
        let written = ready!(Pin::new(&mut self.socket).poll_write_vectored(cx, &slices[..count]))?;
        if self.received.is_stalled() {
            self.memory.release(written);
        }
        self.received.advance(written);
        self.memory.taken(written);
        // Only now may the peer send more. This fails only if the stream has ended, which `recv`
        // reports.
        let _ = self.recv.flow_control().release_capacity(written);
        Poll::Ready(Ok(written))
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
        let (n, mut rest) = step.await.flatten().map_err(StreamError::Socket)?;
        if n == 0 {
            return end(to.as_ref());
        }
        while !rest.is_empty() {
            let written = poll_fn(|cx| Pin::new(&mut to).poll_write(cx, &rest)).await;
            rest.advance(written.map_err(StreamError::Socket)?);
        }
        moved(n as u64);
    }
}
