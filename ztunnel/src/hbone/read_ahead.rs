//! A read buffer in front of a socket, which grows and shrinks with what arrives: of peers that say
//! nothing there may be many.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Size of the first read: a handshake fits.
const SMALLEST: usize = 4 << 10;
/// After so many reads in a row that filled less than a quarter the buffer shrinks: the end of each
/// burst is small, too, and must not cost an allocation.
const SMALL_READS: u32 = 32;

/// Size of a read while as much arrives. rustls alone asks for 4 KiB at a time.
const LARGEST: usize = 64 << 10;

/// Reads ahead. Writes pass through.
#[derive(Debug)]
pub(crate) struct ReadAhead<T> {
    io: T,
    /// Empty until something arrives.
    buffer: Vec<u8>,
    /// The part of `buffer` that was not taken yet.
    rest: std::ops::Range<usize>,
    /// How many reads in a row filled little of it.
    small: u32,
    /// Bytes that were written so far.
    written: u64,
}

impl<T> ReadAhead<T> {
    pub(super) fn new(io: T) -> Self {
        Self { io, buffer: Vec::new(), rest: 0..0, small: 0, written: 0 }
    }

    /// Bytes that the connection has taken so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Size of the buffer beyond the smallest.
    pub(super) fn kept(&self) -> usize {
        self.buffer.len().saturating_sub(SMALLEST)
    }

    fn count(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = &written {
            self.written += *count as u64;
        }
        written
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for ReadAhead<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.rest.is_empty() {
            if this.buffer.is_empty() {
                // The first bytes go into the caller's own buffer, and only those that follow need
                // one.
                let before = into.filled().len();
                ready!(Pin::new(&mut this.io).poll_read(cx, into))?;
                if into.filled().len() > before {
                    this.buffer.resize(SMALLEST, 0);
                }
                return Poll::Ready(Ok(()));
            }
            let mut read = ReadBuf::new(&mut this.buffer);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut read))?;
            this.rest = 0..read.filled().len();
        }
        let count = this.rest.len().min(into.remaining());
        into.put_slice(&this.buffer[this.rest.start..this.rest.start + count]);
        this.rest.start += count;
        if this.rest.is_empty() {
            let (filled, size) = (this.rest.end, this.buffer.len());
            let is_small = filled < size / 4;
            this.small = if is_small && size > SMALLEST { this.small + 1 } else { 0 };
            if filled == size && size < LARGEST {
                // It was full: more has probably arrived.
                this.buffer.resize(size * 2, 0);
            } else if this.small == SMALL_READS {
                this.small = 0;
                this.buffer.truncate(size / 2);
                this.buffer.shrink_to_fit();
            }
            this.rest = 0..0;
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for ReadAhead<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, data);
        self.count(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, data);
        self.count(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    #[tokio::test]
    async fn nothing_is_held_before_the_first_byte_and_the_buffer_grows_with_what_arrives() {
        let (mut far, near) = duplex(1 << 20);
        let mut near = ReadAhead::new(near);
        let nothing = tokio::time::timeout(std::time::Duration::from_millis(5), near.read_u8()).await;
        assert!(nothing.is_err());
        assert_eq!(near.buffer.capacity(), 0);
        far.write_all(b"a").await.unwrap();
        assert_eq!(near.read_u8().await.unwrap(), b'a');
        assert_eq!(near.buffer.len(), SMALLEST);
        let sent: Vec<u8> = (0..500_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        far.write_all(&sent).await.unwrap();
        let mut received = vec![0; sent.len()];
        near.read_exact(&mut received).await.unwrap();
        assert!(received == sent);
        assert_eq!(near.buffer.len(), LARGEST);
        for _ in 0..4 * SMALL_READS {
            far.write_all(b"a").await.unwrap();
            near.read_u8().await.unwrap();
        }
        assert_eq!(near.buffer.capacity(), SMALLEST, "little arrives again");
        assert_eq!(near.kept(), 0);
    }
}
