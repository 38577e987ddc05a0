//! Copies both ways until both sides end, or one fails.
//!
//! * An end (FIN, END_STREAM) is passed on; the other direction continues.
//! * A reset stays a reset (RFC 9113 §8.5): RST on the socket becomes RST_STREAM(CONNECT_ERROR),
//!   and a reset stream becomes RST on the socket. Exception: CANCEL and NO_ERROR end cleanly,
//!   because Istio's tunnel sends them for connections that ended well.
//! * Back-pressure: data is read only if it can be passed on.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::{Future, poll_fn},
    io::{self, IoSlice},
    net::Shutdown,
    pin::pin,
    task::Poll,
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use tokio::net::TcpStream;

use crate::{config::StreamConfig, record::Counters};

mod adaptive;
mod error;

use self::adaptive::{Adaptive, LARGE};

pub use self::error::StreamError;

/// Both halves of an HBONE stream. If dropped before [`finished`](Self::finished), it is reset like
/// the TCP connection that it carries: h2 alone would send CANCEL, which peers take for a clean
/// end.
#[derive(Debug)]
pub struct Stream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    finished: bool,
}

impl Stream {
    pub fn new(send: SendStream<Bytes>, recv: RecvStream) -> Self {
        Self { send, recv, finished: false }
    }

    fn finished(mut self) {
        self.finished = true;
    }

    /// For uses other than copying to a socket.
    pub(crate) fn halves(&mut self) -> (&mut SendStream<Bytes>, &mut RecvStream) {
        (&mut self.send, &mut self.recv)
    }

    /// Ends the sending side. A stream that is dropped afterwards ends cleanly.
    pub(crate) fn end(&mut self) -> Result<(), h2::Error> {
        if !self.finished {
            self.finished = true;
            self.send.send_data(Bytes::new(), true)?;
        }
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.finished {
            self.send.send_reset(Reason::CONNECT_ERROR);
        }
    }
}

/// A socket that is reset when dropped, also if its task or the whole process is killed: a
/// truncated transfer must not look complete to the application.
struct Unfinished(TcpStream);

impl Unfinished {
    fn new(socket: TcpStream) -> Result<Self, StreamError> {
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
pub enum SocketIs {
    Client,
    Server,
}

/// Copies between a socket and an HBONE stream until both end, or until `cut`. On return both are
/// closed, by FIN or by RST.
pub async fn tunnel(
    socket: TcpStream,
    mut stream: Stream,
    side: SocketIs,
    counters: &Counters,
    limits: StreamConfig,
    cut: impl Future<Output = ()>,
) -> Result<(), StreamError> {
    let from_socket = |n| if side == SocketIs::Client { counters.sent(n) } else { counters.received(n) };
    let to_socket = |n| if side == SocketIs::Client { counters.received(n) } else { counters.sent(n) };
    let socket = Unfinished::new(socket)?;
    let result = both(
        socket_to_stream(&socket.0, &mut stream.send, from_socket),
        stream_to_socket(&mut stream.recv, &socket.0, to_socket),
        || counters.totals(),
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
/// by RST.
pub async fn relay(
    client: TcpStream,
    server: TcpStream,
    counters: &Counters,
    limits: StreamConfig,
    cut: impl Future<Output = ()>,
) -> Result<(), StreamError> {
    let (client, server) = (Unfinished::new(client)?, Unfinished::new(server)?);
    both(
        socket_to_socket(&client.0, &server.0, |n| counters.sent(n)),
        socket_to_socket(&server.0, &client.0, |n| counters.received(n)),
        || counters.totals(),
        limits,
        cut,
    )
    .await?;
    client.finished();
    server.finished();
    Ok(())
}

/// Runs both directions to their ends; the first failure ends both. A connection that is idle for
/// as long as `limits` allow is closed, at the latest after twice that time.
async fn both(
    up: impl Future<Output = Result<(), StreamError>>,
    down: impl Future<Output = Result<(), StreamError>>,
    moved: impl Fn() -> (u64, u64),
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

async fn socket_to_stream(
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

async fn stream_to_socket(
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

/// Writes what the socket takes, straight from the received frames. Returns how many bytes that were.
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

async fn socket_to_socket(from: &TcpStream, to: &TcpStream, moved: impl Fn(u64)) -> Result<(), StreamError> {
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

#[cfg(test)]
mod tests;
