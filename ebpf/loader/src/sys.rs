//! The system calls that no crate wraps for us: links by file descriptor, and the netns of a
//! socket.
//!
//! aya has `PinnedLink` and `FdLink`, but neither gives its descriptor away. Replacing the program
//! of a pinned link in place (`BPF_LINK_UPDATE`, which aya has for XDP and TCX only) and detaching
//! it whoever else holds it (`BPF_LINK_DETACH`) take that descriptor, so links are made, pinned and
//! opened here too.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya_obj::generated::{
    BPF_F_ALLOW_MULTI, bpf_attach_type,
    bpf_cmd::{
        self, BPF_LINK_CREATE, BPF_LINK_DETACH, BPF_LINK_UPDATE, BPF_MAP_LOOKUP_BATCH, BPF_OBJ_GET,
        BPF_OBJ_PIN, BPF_PROG_LOAD, BPF_PROG_QUERY, BPF_RAW_TRACEPOINT_OPEN,
    },
    bpf_insn,
    bpf_prog_type::BPF_PROG_TYPE_SK_LOOKUP,
};

/// Several programs may be attached at this cgroup and below it.
pub(crate) const ALLOW_MULTI: u32 = BPF_F_ALLOW_MULTI;

/// Attaches `program` to `target`, a cgroup directory or a netns.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr = [number(program), number(target), attach_type as u32, 0];
    let fd = bpf(BPF_LINK_CREATE, &mut attr)?;
    Ok(owned(fd))
}

/// Attaches `program` to a tracepoint. The link can be pinned from Linux 5.8 on; its program cannot
/// be replaced.
pub(crate) fn raw_tracepoint_open(program: BorrowedFd<'_>, tracepoint: &str) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        name: u64,
        program: u32,
        pad: u32,
    }
    let tracepoint = CString::new(tracepoint)?;
    let name = tracepoint.as_ptr().expose_provenance() as u64;
    let fd = bpf(BPF_RAW_TRACEPOINT_OPEN, &mut Attr { name, program: number(program), pad: 0 })?;
    Ok(owned(fd))
}

/// Makes `link` run `program` from its next run on. `ENOLINK`: what it was attached to is gone.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_UPDATE, &mut [number(link), number(program), 0, 0]).map(|_| ())
}

/// Detaches `link`, whoever else holds it.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &mut [number(link)]).map(|_| ())
}

/// Gives a program of sk_lookup to the kernel's verifier.
pub(crate) fn load_sk_lookup(name: &str, instructions: &[bpf_insn], license: &CStr) -> io::Result<OwnedFd> {
    /// The beginning of the structure that BPF_PROG_LOAD takes, as of Linux 4.17.
    #[repr(C)]
    struct Attr {
        program_type: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buffer: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        expected_attach_type: u32,
    }
    let mut attr = Attr {
        program_type: BPF_PROG_TYPE_SK_LOOKUP as u32,
        instruction_count: u32::try_from(instructions.len()).unwrap_or(u32::MAX),
        instructions: instructions.as_ptr().expose_provenance() as u64,
        license: license.as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        expected_attach_type: bpf_attach_type::BPF_SK_LOOKUP as u32,
    };
    // The last byte stays zero.
    let kept = name.len().min(15);
    attr.name[..kept].copy_from_slice(&name.as_bytes()[..kept]);
    Ok(owned(bpf(BPF_PROG_LOAD, &mut attr)?))
}

/// Gives `object` a name in a bpffs.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(
        BPF_OBJ_PIN,
        &mut PathAttr { path: path.as_ptr().expose_provenance() as u64, fd: number(object), flags: 0 },
    )
    .map(|_| ())
}

/// What was pinned at `path`.
pub(crate) fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = PathAttr { path: path.as_ptr().expose_provenance() as u64, fd: 0, flags: 0 };
    Ok(owned(bpf(BPF_OBJ_GET, &mut attr)?))
}

#[repr(C)]
struct PathAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The programs attached at exactly this cgroup, and the flags that hold for it.
pub(crate) fn attached(cgroup: &File, attach_type: bpf_attach_type) -> io::Result<(Vec<u32>, u32)> {
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
        attach_type: attach_type as u32,
        query_flags: 0,
        attach_flags: 0,
        program_ids: ids.as_mut_ptr().expose_provenance() as u64,
        count: 64,
        pad: 0,
    };
    bpf(BPF_PROG_QUERY, &mut attr)?;
    Ok((ids[..attr.count.min(64) as usize].to_vec(), attr.attach_flags))
}

/// One step through a map: where it begins (`None`: at the start), room for where the next one
/// begins, and room for `count` keys and values.
pub(crate) struct Batch<'a> {
    pub(crate) from: Option<&'a [u8]>,
    pub(crate) next: &'a mut [u8],
    pub(crate) keys: &'a mut [u8],
    pub(crate) values: &'a mut [u8],
    pub(crate) count: u32,
}

/// Reads entries of `map`: how many, and whether they were the last. The room must be of `count`
/// times the size of the map's keys and values, which the kernel fills.
pub(crate) fn lookup_batch(map: BorrowedFd<'_>, batch: &mut Batch<'_>) -> io::Result<(usize, bool)> {
    #[repr(C)]
    struct Attr {
        from: u64,
        next: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        element_flags: u64,
        flags: u64,
    }
    let mut attr = Attr {
        from: batch.from.map_or(0, |from| from.as_ptr().expose_provenance() as u64),
        next: batch.next.as_mut_ptr().expose_provenance() as u64,
        keys: batch.keys.as_mut_ptr().expose_provenance() as u64,
        values: batch.values.as_mut_ptr().expose_provenance() as u64,
        count: batch.count,
        map: number(map),
        element_flags: 0,
        flags: 0,
    };
    match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
        Ok(_) => Ok((attr.count as usize, false)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok((attr.count as usize, true)),
        Err(error) => Err(error),
    }
}

/// Calls bpf(2). `attr` is the beginning of the kernel's union as far as `command` uses it; the
/// kernel takes what is not given for zero.
#[expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]
fn bpf<T>(command: bpf_cmd, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: `attr` outlives the call and its size is given; the callers' types are plain numbers
    // in the layout of `union bpf_attr`, and the addresses in them point to buffers that they keep
    // alive and whose lengths they state.
    let rc =
        unsafe { libc::syscall(libc::SYS_bpf, command as u32, std::ptr::from_mut(attr), size_of::<T>()) };
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
pub(crate) fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    /// Same on all architectures that this runs on (asm-generic/socket.h).
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut len = libc::socklen_t::try_from(size_of_val(&cookie)).unwrap_or_default();
    let (fd, out) = (socket.as_raw_fd(), (&raw mut cookie).cast());
    // SAFETY: `out` and `len` outlive the call, `len` is the size of `cookie`, so the kernel writes
    // no further, and any eight bytes are a valid `u64`.
    let rc = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE, out, &raw mut len) };
    if rc == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
