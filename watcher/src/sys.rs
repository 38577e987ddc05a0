//! Calls that no safe wrapper offers.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use tokio::io::unix::AsyncFd;

/// `fd`, which must be in non-blocking mode, with its readiness known to the runtime.
#[expect(unsafe_code, reason = "AsyncFd asks its caller to vouch for the fd")]
pub(crate) fn pollable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: `as_raw_fd` of an `OwnedFd` always gives the same fd, which stays open until the
    // `OwnedFd` is dropped, and the `AsyncFd` owns it until then.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// The user namespace that owns the namespace `of` (ioctl_ns(2)). Linux 4.9.
///
/// # Errors
/// `EPERM`: it is not the caller's own, nor below it.
#[expect(unsafe_code, reason = "libc's ioctl is unsafe, and gives a bare number")]
pub(crate) fn owner_of(of: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: this request of a namespace's descriptor takes no argument and writes no memory.
    let fd = unsafe { libc::ioctl(of.as_raw_fd(), NS_GET_USERNS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made the descriptor for this process, and no other code knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
