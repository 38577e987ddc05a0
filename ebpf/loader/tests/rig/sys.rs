//! The system calls of the tests that no crate wraps.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd},
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

/// BPF_PROG_ATTACH (`attach`) or BPF_PROG_DETACH of `program` at `cgroup`, the old way and without
/// BPF_F_ALLOW_MULTI.
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

/// The head of the kernel's union for BPF_PROG_LOAD.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach: u32,
}

/// A foreign load balancer in eight instructions: a connection to the IPv4 address `service`
/// reaches `endpoint`. Attached at `cgroup` by a link, as such programs are, until the returned
/// descriptor is closed.
#[expect(unsafe_code, reason = "a program in machine code, which only the raw system call loads")]
pub fn attach_balancer(
    cgroup: BorrowedFd<'_>,
    service: Ipv4Addr,
    endpoint: Ipv4Addr,
) -> io::Result<(OwnedFd, OwnedFd)> {
    const CONNECT4: u32 = 10;
    const USER_IP4: u64 = 4;
    let word = |ip: Ipv4Addr| u64::from(u32::from_ne_bytes(ip.octets()));
    let code = |opcode: u64, registers: u64, offset: u64, value: u64| {
        opcode | registers << 8 | offset << 16 | value << 32
    };
    // Kernel: Documentation/bpf/standardization/instruction-set.rst. Registers: source << 4 |
    // destination.
    let program = [
        code(0x61, 0x12, USER_IP4, 0),       // w2 = context.user_ip4
        code(0xb4, 0x03, 0, word(service)),  // w3 = service
        code(0x5e, 0x32, 2, 0),              // if w2 != w3, skip two
        code(0xb4, 0x02, 0, word(endpoint)), // w2 = endpoint
        code(0x63, 0x21, USER_IP4, 0),       // context.user_ip4 = w2
        code(0xb7, 0x00, 0, 1),              // return 1: allow
        code(0x95, 0, 0, 0),
    ];
    let load = Load {
        kind: 18, // BPF_PROG_TYPE_CGROUP_SOCK_ADDR
        count: u32::try_from(program.len()).unwrap_or(0),
        instructions: program.as_ptr().expose_provenance() as u64,
        license: c"GPL".as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel: 0,
        flags: 0,
        name: *b"balancer\0\0\0\0\0\0\0\0",
        interface: 0,
        attach: CONNECT4,
    };
    let call = |command: i32, attr: *const u8, size: usize| {
        // SAFETY: `attr` is the head of the kernel's union for `command` and `size` its size; what
        // it points to outlives the call. The result is a descriptor of ours.
        unsafe {
            match libc::syscall(libc::SYS_bpf, command, attr, size) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1))),
            }
        }
    };
    let program = call(5, (&raw const load).cast(), size_of_val(&load))?;
    let link = [program.as_raw_fd().cast_unsigned(), cgroup.as_raw_fd().cast_unsigned(), CONNECT4, 0];
    let link = call(28, link.as_ptr().cast(), size_of_val(&link))?;
    Ok((program, link))
}
