//! Copies from a socket into an HBONE stream.

use std::{
    future::poll_fn,
    task::{Context, Poll, Waker},
};

use h2::{Reason, SendStream};
use tokio::net::tcp::ReadHalf;

use super::{adaptive::AdaptiveReads, error::StreamError};
use crate::memory::{SendData, SendQueue};

/// Copies until the socket ends, or the stream takes no more.
pub(super) async fn socket_to_stream(
    mut socket: ReadHalf<'_>,
    send: &mut SendStream<SendData>,
    queue: &SendQueue,
    moved: impl Fn(u64),
) -> Result<(), StreamError> {
    let mut from = Source { send, queue, reads: AdaptiveReads::new(), reserved: false };
    loop {
        let room = async {
            poll_fn(|cx| from.poll_readable(cx, &socket)).await?;
            from.capacity().await
        };
        let room = match room.await {
            // The peer accepts no more data, but what it sent earlier may still be on its way to
            // the application.
            Err(StreamError::Reset(Reason::CANCEL | Reason::NO_ERROR)) => return Ok(()),
            other => other?,
        };
        let read = poll_fn(|cx| Poll::Ready(from.reads.poll_read(cx, &mut socket, room))).await;
        let Poll::Ready(data) = read else { continue };
        let (data, memory) = data.map_err(StreamError::Socket)?;
        let (n, ended) = (data.len(), data.is_empty());
        let data = queue.data(data, memory);
        if let Err(error) = from.send.send_data(data, ended) {
            // The stream has the more precise reason.
            return Err(from.known_reset().await.unwrap_or(StreamError::Tunnel(error)));
        }
        if ended {
            return Ok(());
        }
        moved(n as u64);
    }
}

/// The sending half of a stream, and how much of the tunnel's window it has reserved. h2 takes what
/// it assigns to a stream away from all others, so a stream reserves when its socket has something
/// to send, and gives back what it did not use before it sleeps.
struct Source<'a> {
    send: &'a mut SendStream<SendData>,
    queue: &'a SendQueue,
    reads: AdaptiveReads,
    reserved: bool,
}

impl Source<'_> {
    /// Ready when the socket has data, or has ended. Also wakes when the peer resets the stream:
    /// nothing else checks while the application is silent.
    fn poll_readable(
        &mut self,
        cx: &mut Context<'_>,
        socket: &ReadHalf<'_>,
    ) -> Poll<Result<(), StreamError>> {
        if let Poll::Ready(reset) = self.send.poll_reset(cx) {
            return Poll::Ready(Err(reset.map_or_else(StreamError::Tunnel, StreamError::Reset)));
        }
        let ready = socket.as_ref().poll_read_ready(cx);
        if ready.is_pending() {
            self.reads.sleep();
            self.give_back();
        }
        ready.map_err(StreamError::Socket)
    }

    fn give_back(&mut self) {
        if std::mem::take(&mut self.reserved) {
            self.send.reserve_capacity(0);
        }
    }

    /// Waits until there is memory for a part of the next read.
    async fn memory(&mut self) -> Result<usize, StreamError> {
        let room = self.queue.room();
        if room > 0 {
            return Ok(room);
        }
        self.reads.sleep();
        self.give_back();
        poll_fn(|cx| {
            if let Poll::Ready(reset) = self.send.poll_reset(cx) {
                return Poll::Ready(Err(reset.map_or_else(StreamError::Tunnel, StreamError::Reset)));
            }
            self.queue.poll_room(cx).map(Ok)
        })
        .await
    }

    /// Waits until a part of the next read may be sent, and says how much. Meanwhile the data stays
    /// in the socket.
    async fn capacity(&mut self) -> Result<usize, StreamError> {
        let memory = self.memory().await?;
        self.reserved = true;
        // What h2 assigns at once is read below. It would wake this task for it all the same, once for
        // each message, if the task were registered.
        let _ = self.send.poll_reset(&mut Context::from_waker(Waker::noop()));
        self.send.reserve_capacity(self.reads.size.min(memory));
        loop {
            // `poll_capacity` reports only changes; existing capacity must be read first.
            let now = self.send.capacity();
            if now > 0 {
                return Ok(now.min(memory));
            }
            self.reads.sleep();
            let grown = poll_fn(|cx| {
                if let Poll::Ready(reset) = self.send.poll_reset(cx) {
                    return Poll::Ready(Err(reset.map_or_else(StreamError::Tunnel, StreamError::Reset)));
                }
                self.send.poll_capacity(cx).map(Ok)
            });
            match grown.await? {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(StreamError::Tunnel(error)),
                None => {
                    let unknown = StreamError::Reset(Reason::INTERNAL_ERROR);
                    return Err(self.known_reset().await.unwrap_or(unknown));
                }
            }
        }
    }

    /// The reset that has already happened, if there was one.
    async fn known_reset(&mut self) -> Option<StreamError> {
        poll_fn(|cx| {
            Poll::Ready(match self.send.poll_reset(cx) {
                Poll::Ready(Ok(reason)) => Some(StreamError::Reset(reason)),
                Poll::Ready(Err(error)) => Some(StreamError::Tunnel(error)),
                Poll::Pending => None,
            })
        })
        .await
    }
}
