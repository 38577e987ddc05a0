//! The read buffer that all connections of a worker share: an idle connection holds no memory.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead as _, ReadBuf},
    net::tcp::ReadHalf,
};

/// Most bytes of one read.
pub(super) const LARGE: usize = 256 << 10;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; LARGE].into_boxed_slice());
}

/// Reads at most `limit` bytes, which `take` must use at once: the next connection overwrites them.
/// No bytes: the end.
///
/// `try_read` would leave the socket marked as readable after it was emptied, so that each message
/// costs a second read that finds nothing; `poll_read` does not.
pub(super) fn poll_read<T>(
    cx: &mut Context<'_>,
    socket: &mut ReadHalf<'_>,
    limit: usize,
    take: impl FnOnce(&[u8]) -> T,
) -> Poll<io::Result<T>> {
    SCRATCH.with_borrow_mut(|scratch| {
        let room = limit.min(scratch.len());
        let mut buffer = ReadBuf::new(&mut scratch[..room]);
        ready!(Pin::new(socket).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(take(buffer.filled())))
    })
}
