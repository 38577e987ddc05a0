//! The one call that no safe wrapper offers.

use std::{io, os::fd::OwnedFd};

use tokio::io::unix::AsyncFd;

/// `fd`, which must be in non-blocking mode, with its readiness known to the runtime.
#[expect(unsafe_code, reason = "AsyncFd asks its caller to vouch for the fd")]
pub(crate) fn pollable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: `as_raw_fd` of an `OwnedFd` always gives the same fd, which stays open until the
    // `OwnedFd` is dropped, and the `AsyncFd` owns it until then.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}
