//! The system calls that no crate wraps: links by file descriptor, and what netns a socket is in.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Commands of bpf(2).
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;
const LINK_DETACH: libc::c_int = 34;

/// Several programs may be attached at this cgroup and below it.
pub const ALLOW_MULTI: u32 = 1 << 1;

/// Attaches `program` to `target`, a cgroup directory or a netns.
pub fn link_create(program: BorrowedFd<'_>, target: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    let mut attr = [number(program), number(target), attach_type, 0];
    let fd = bpf(LINK_CREATE, &mut attr)?;
    Ok(owned(fd))
}

/// Makes `link` run `program` from its next run on. `ENOLINK`: what it was attached to is gone.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(LINK_UPDATE, &mut [number(link), number(program), 0, 0]).map(|_| ())
}

/// Detaches `link`, whoever else holds it.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(LINK_DETACH, &mut [number(link)]).map(|_| ())
}

/// The id of the program that `link` runs.
pub fn link_program_id(link: BorrowedFd<'_>) -> io::Result<u32> {
    /// The head of `struct bpf_link_info`, which differs by type only after the program's id.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        link_type: u32,
        id: u32,
        program_id: u32,
        rest: [u32; 29],
    }
    #[repr(C)]
    struct Attr {
        fd: u32,
        info_len: u32,
        info: u64,
    }
    let mut info = Info::default();
    let info_len = u32::try_from(size_of::<Info>()).unwrap_or(u32::MAX);
    let mut attr = Attr { fd: number(link), info_len, info: (&raw mut info).addr() as u64 };
    // Exposed, since the kernel gets it as a number.
    let _ = (&raw mut info).expose_provenance();
    bpf(OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info.program_id)
}

/// Gives `object` a name in a bpffs.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(
        OBJ_PIN,
        &mut PathAttr { path: path.as_ptr().expose_provenance() as u64, fd: number(object), flags: 0 },
    )
    .map(|_| ())
}

/// What was pinned at `path`.
pub fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = PathAttr { path: path.as_ptr().expose_provenance() as u64, fd: 0, flags: 0 };
    Ok(owned(bpf(OBJ_GET, &mut attr)?))
}

#[repr(C)]
struct PathAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The programs attached at exactly this cgroup, and the flags that hold for it.
pub fn attached(cgroup: &File, attach_type: u32) -> io::Result<(Vec<u32>, u32)> {
    #[repr(C)]
    struct Attr {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        program_ids: u64,
        count: u32,
        pad: u32,
    }
    let mut ids = [0u32; 64];
    let mut attr = Attr {
        target: cgroup.as_raw_fd().cast_unsigned(),
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        program_ids: ids.as_mut_ptr().expose_provenance() as u64,
        count: 64,
        pad: 0,
    };
    bpf(PROG_QUERY, &mut attr)?;
    Ok((ids[..attr.count.min(64) as usize].to_vec(), attr.attach_flags))
}

/// Calls bpf(2). `attr` is the beginning of the kernel's union as far as `command` uses it; the kernel
/// takes what is not given for zero.
#[expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]
fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: `attr` outlives the call and its size is given; the callers' types are plain numbers in the
    // layout of `union bpf_attr`, and the addresses in them point to buffers that they keep alive and
    // whose lengths they state.
    let rc = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    match RawFd::try_from(rc) {
        Ok(fd) if fd >= 0 => Ok(fd),
        _ => Err(io::Error::last_os_error()),
    }
}

#[expect(unsafe_code, reason = "bpf(2) gives bare file descriptors")]
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it for us; nobody else knows it. bpf(2) sets close-on-exec.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// The cookie of the netns `socket` was created in. Linux 5.14 or later, else `ENOPROTOOPT`.
#[expect(unsafe_code, reason = "no safe wrapper offers SO_NETNS_COOKIE")]
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    /// Same on all architectures that this runs on (asm-generic/socket.h).
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut len = libc::socklen_t::try_from(size_of_val(&cookie)).unwrap_or_default();
    let (fd, out) = (socket.as_raw_fd(), (&raw mut cookie).cast());
    // SAFETY: `out` and `len` outlive the call, `len` is the size of `cookie`, so the kernel writes no
    // further, and any eight bytes are a valid `u64`.
    let rc = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE, out, &raw mut len) };
    if rc == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
