//! The size of reads.

use std::io;

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::net::TcpStream;

/// Buffers start here and grow while reads fill them.
const SMALL: usize = 16 << 10;
/// Maximum bytes in memory per direction of a connection.
pub(super) const LARGE: usize = 256 << 10;

/// A read buffer that grows while reads fill it, and releases its memory when they no longer do.
pub(super) struct Adaptive {
    buffer: BytesMut,
    /// Size of the next read.
    pub size: usize,
}

impl Adaptive {
    pub(super) fn new() -> Self {
        Self { buffer: BytesMut::new(), size: SMALL }
    }

    /// One read of at most `limit` bytes; `Ok(None)`: nothing there yet. Empty bytes: the end.
    pub(super) fn read(&mut self, socket: &TcpStream, limit: usize) -> io::Result<Option<Bytes>> {
        if self.buffer.capacity() < self.size / 4 {
            self.buffer = BytesMut::with_capacity(self.size);
        }
        let room = self.buffer.capacity().min(limit);
        match socket.try_read_buf(&mut (&mut self.buffer).limit(room)) {
            Ok(n) => {
                if n == self.size.min(limit) {
                    self.size = (self.size * 2).min(LARGE);
                } else if n < self.size / 8 && self.size > SMALL {
                    self.size /= 2;
                }
                Ok(Some(self.buffer.split().freeze()))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if self.buffer.capacity() > SMALL {
                    self.buffer = BytesMut::new(); // an idle connection holds no large buffer
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
