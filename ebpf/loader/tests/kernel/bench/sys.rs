//! The system calls of the tests that no crate wraps.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// connect(2) to AF_UNSPEC: the socket is unconnected again.
#[expect(unsafe_code, reason = "no safe wrapper takes AF_UNSPEC")]
pub fn dissolve(socket: BorrowedFd<'_>) -> io::Result<()> {
    const AF_UNSPEC: libc::sa_family_t = 0;
    let nowhere = libc::sockaddr { sa_family: AF_UNSPEC, sa_data: [0; 14] };
    let len = libc::socklen_t::try_from(size_of_val(&nowhere)).unwrap_or_default();
    // SAFETY: `nowhere` outlives the call and `len` is its size.
    let rc = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, len) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// BPF_PROG_ATTACH (`attach`) or BPF_PROG_DETACH of `program` at `cgroup`, the old way and without BPF_F_ALLOW_MULTI.
#[expect(unsafe_code, reason = "aya attaches by links only, which always allow others")]
pub fn attach_alone(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    kind: u32,
    attach: bool,
) -> io::Result<()> {
    let mut attr = [cgroup.as_raw_fd().cast_unsigned(), program.as_raw_fd().cast_unsigned(), kind, 0];
    let command = if attach { 8 } else { 9 };
    // SAFETY: `attr` is the head of the kernel's union for these commands, its size is given.
    let rc = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(&attr)) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
