//! The size of reads.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::net::tcp::ReadHalf;
use tokio_util::io::poll_read_buf;

use super::scratch::{self, LARGE};

/// Reads start at this size and grow while they are filled. Up to here they go through the worker's
/// scratch, and what was read is copied.
const SMALL: usize = 16 << 10;

/// The reads of one direction of a connection. Between transfers it holds no memory.
pub(super) struct AdaptiveReads {
    /// For reads larger than `SMALL`, which are not copied.
    buffer: BytesMut,
    /// Size of the next read.
    pub size: usize,
}

impl AdaptiveReads {
    pub(super) fn new() -> Self {
        Self { buffer: BytesMut::new(), size: SMALL }
    }

    /// One read of at most `limit` bytes, and how much memory it keeps. Empty bytes: the end.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut ReadHalf<'_>,
        limit: usize,
    ) -> Poll<io::Result<(Bytes, usize)>> {
        let wanted = self.size.min(limit);
        let (data, memory) = if wanted <= SMALL {
            let data = ready!(scratch::poll_read(cx, socket, wanted, Bytes::copy_from_slice))?;
            let memory = data.len();
            (data, memory)
        } else {
            ready!(self.poll_read_large(cx, socket, wanted))?
        };
        if data.len() == wanted {
            self.size = (self.size * 2).min(LARGE);
        } else if data.len() < self.size / 8 && self.size > SMALL {
            self.size /= 2;
        }
        Poll::Ready(Ok((data, memory)))
    }

    fn poll_read_large(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut ReadHalf<'_>,
        wanted: usize,
    ) -> Poll<io::Result<(Bytes, usize)>> {
        let is_new = self.buffer.capacity() < wanted / 4;
        if is_new {
            self.buffer = BytesMut::with_capacity(wanted);
        }
        let room = self.buffer.capacity().min(wanted);
        ready!(poll_read_buf(Pin::new(socket), cx, &mut (&mut self.buffer).limit(room)))?;
        let data = self.buffer.split().freeze();
        // Whatever is left of a buffer, a slice keeps all of it: the first one counts for that.
        let memory = data.len() + if is_new { self.buffer.capacity() } else { 0 };
        Poll::Ready(Ok((data, memory)))
    }

    /// Gives back the memory, since nothing is there to read.
    pub(super) fn sleep(&mut self) {
        self.buffer = BytesMut::new();
    }
}
