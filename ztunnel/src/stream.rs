//! Copies both ways until both sides end, or one fails.
//!
//! * An end (FIN, END_STREAM) is passed on; the other direction continues.
//! * A reset stays a reset (RFC 9113 §8.5): RST on the socket becomes RST_STREAM(CONNECT_ERROR),
//!   and a reset stream becomes RST on the socket. Exception: CANCEL and NO_ERROR end cleanly,
//!   because Istio's tunnel sends them for connections that ended well.
//! * Back-pressure: data is read only if it can be passed on.
//!
//! * `from_socket`: from the application into the stream; `adaptive`: the size of its reads
//! * `to_socket`: from the stream to the application; `received`: what waits for it
//! * `scratch`: the read buffer of the worker

mod adaptive;
mod error;
mod from_socket;
mod received;
mod scratch;
mod to_socket;

use std::{future::Future, pin::pin};

use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use tokio::net::TcpStream;

pub(crate) use self::error::StreamError;
use self::{
    from_socket::socket_to_stream,
    to_socket::{socket_to_socket, stream_to_socket},
};
use crate::{
    config::StreamConfig,
    memory::{SendData, SendQueue, StreamMemory},
    record::ByteCounters,
};

/// Both halves of an HBONE stream. If dropped before [`finished`](Self::finished), it is reset like
/// the TCP connection that it carries: h2 alone would send CANCEL, which peers take for a clean
/// end.
#[derive(Debug)]
pub(crate) struct HboneStream {
    send: SendStream<SendData>,
    recv: RecvStream,
    queue: SendQueue,
    memory: StreamMemory,
    finished: bool,
}

impl HboneStream {
    /// `memory`: the stream's part in its tunnel's.
    pub(crate) fn new(send: SendStream<SendData>, recv: RecvStream, memory: StreamMemory) -> Self {
        Self { send, recv, queue: memory.send_queue(), memory, finished: false }
    }

    fn finished(mut self) {
        self.finished = true;
    }

    /// For uses other than copying to a socket.
    pub(crate) fn halves(&mut self) -> (&mut SendStream<SendData>, &mut RecvStream) {
        (&mut self.send, &mut self.recv)
    }

    /// What is sent must come from here.
    pub(crate) fn queue(&self) -> &SendQueue {
        &self.queue
    }

    /// `bytes` of what was received are used up: the peer may send as many again.
    pub(crate) fn taken(&mut self, bytes: usize) {
        self.memory.taken(bytes);
        // This fails only if the stream has ended, which the next read reports.
        let _ = self.recv.flow_control().release_capacity(bytes);
    }

    /// Ends the sending side. A stream that is dropped afterwards ends cleanly.
    pub(crate) fn end(&mut self) -> Result<(), h2::Error> {
        if !self.finished {
            self.finished = true;
            self.send.send_data(SendData::default(), true)?;
        }
        Ok(())
    }
}

impl Drop for HboneStream {
    fn drop(&mut self) {
        if !self.finished {
            self.send.send_reset(Reason::CONNECT_ERROR);
            self.memory.reset();
        }
    }
}

/// A socket that is reset when dropped, also if its task or the whole process is killed: a
/// truncated transfer must not look complete to the application.
struct Unfinished(TcpStream);

impl Unfinished {
    /// A client's, which has that from its listener ([`AcceptedEnd::Reset`](crate::socket::AcceptedEnd)).
    fn accepted(socket: TcpStream) -> Self {
        Self(socket)
    }

    fn dialled(socket: TcpStream) -> Result<Self, StreamError> {
        socket.set_zero_linger().map_err(StreamError::Socket)?;
        Ok(Self(socket))
    }

    /// Closes the socket after sending the remaining data.
    fn finished(self) {
        // Fails only if the socket is gone.
        let _ = SockRef::from(&self.0).set_linger(None);
    }
}

/// Whose counters the bytes read from the socket belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketIs {
    Client,
    Server,
}

/// Copies between a socket and an HBONE stream until both end, or until `cut`. On return both are
/// closed, by FIN or by RST.
pub(crate) async fn tunnel(
    socket: TcpStream,
    mut stream: HboneStream,
    side: SocketIs,
    counters: &ByteCounters,
    limits: StreamConfig,
    cut: impl Future<Output = ()>,
) -> Result<(), StreamError> {
    let from_socket = |n| if side == SocketIs::Client { counters.sent(n) } else { counters.received(n) };
    let to_socket = |n| if side == SocketIs::Client { counters.received(n) } else { counters.sent(n) };
    let mut socket = match side {
        SocketIs::Client => Unfinished::accepted(socket),
        SocketIs::Server => Unfinished::dialled(socket)?,
    };
    let (read, write) = socket.0.split();
    let result = both(
        socket_to_stream(read, &mut stream.send, &stream.queue, from_socket),
        stream_to_socket(&mut stream.recv, write, &mut stream.memory, to_socket),
        || Some(counters.totals()),
        limits,
        cut,
    )
    .await;
    match result {
        Ok(()) | Err(StreamError::Reset(Reason::CANCEL | Reason::NO_ERROR)) => {
            socket.finished();
            stream.finished();
            Ok(())
        }
        broken => broken,
    }
}

/// Copies between two sockets until both end, or until `cut`. On return both are closed, by FIN or
/// by RST. All of `counters` count the same.
pub(crate) async fn relay(
    client: TcpStream,
    server: TcpStream,
    counters: &[&ByteCounters],
    limits: StreamConfig,
    cut: impl Future<Output = ()>,
) -> Result<(), StreamError> {
    let (mut client, mut server) = (Unfinished::accepted(client), Unfinished::dialled(server)?);
    let ((from_client, to_client), (from_server, to_server)) = (client.0.split(), server.0.split());
    both(
        socket_to_socket(from_client, to_server, |n| counters.iter().for_each(|one| one.sent(n))),
        socket_to_socket(from_server, to_client, |n| counters.iter().for_each(|one| one.received(n))),
        || counters.first().map(|one| one.totals()),
        limits,
        cut,
    )
    .await?;
    client.finished();
    server.finished();
    Ok(())
}

/// Bytes up and down so far, if somebody counts.
type Moved = Option<(u64, u64)>;

/// Runs both directions to their ends; the first failure ends both. A connection that is idle for
/// as long as `limits` allow is closed, at the latest after twice that time.
async fn both(
    up: impl Future<Output = Result<(), StreamError>>,
    down: impl Future<Output = Result<(), StreamError>>,
    moved: impl Fn() -> Moved,
    limits: StreamConfig,
    cut: impl Future<Output = ()>,
) -> Result<(), StreamError> {
    let (mut up, mut down, mut cut) = (pin!(up), pin!(down), pin!(cut));
    let (mut up_ended, mut down_ended) = (false, false);
    while !(up_ended && down_ended) {
        let before = moved();
        let limit = if up_ended || down_ended { Some(limits.half_closed()) } else { limits.idle };
        let still = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            result = &mut up, if !up_ended => { result?; up_ended = true; }
            result = &mut down, if !down_ended => { result?; down_ended = true; }
            () = &mut cut => return Err(StreamError::Cut),
            () = still => match limit {
                Some(limit) if moved() == before => {
                    let half_closed = up_ended || down_ended;
                    return Err(if half_closed { StreamError::HalfClosed } else { StreamError::Idle }(limit));
                }
                _ => {}
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
