//! Owning and watching the descriptors of the ZDS connection.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

use tokio::io::unix::AsyncFd;

/// Takes over descriptors that `recvmsg` has just installed in this process (`SCM_RIGHTS`).
#[expect(unsafe_code, reason = "nix hands received descriptors over as bare numbers")]
pub(super) fn own(received: Vec<RawFd>) -> Vec<OwnedFd> {
    // SAFETY: the kernel has made each of these for us in this very `recvmsg`; the caller passes
    // the numbers on from its answer, once, so nobody else owns or closes them.
    received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect()
}

/// Registers a descriptor with the calling thread's runtime.
#[expect(unsafe_code, reason = "the registration relies on the descriptor staying open")]
pub(super) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open until it is dropped, its number does not change, and `AsyncFd`
    // owns it.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}
