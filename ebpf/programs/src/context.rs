//! The kernel's contexts, behind methods that are safe to call.
//!
//! A field of a context is read and written by its own width, in one load or store: the verifier
//! rewrites each access to what the running kernel has there, and refuses an access that the
//! compiler merged with its neighbour or moved. So every access here is volatile.
//!
//! Where a field belongs to one address family, both families' fields are read before it is known
//! which one counts. If they were read in branches, the compiler would merge the branches into one
//! load at a computed offset, which the verifier refuses.
//!
//! A context's address fields hold network byte order in memory, whatever the word's numeric value
//! is. Ports differ from field to field; each accessor converts its own.
#![expect(unsafe_code, reason = "contexts are raw pointers, and aya has accessors for few of their fields")]

use core::ffi::c_void;

use adit_ebpf_common::address::{Address, UNSPECIFIED, from_v4_word, from_words, same};
use aya_ebpf::{
    bindings::bpf_sock,
    helpers::generated::{bpf_get_netns_cookie, bpf_setsockopt},
    programs::SockContext,
};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;
const SOCK_STREAM: u32 = 1;
const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;

/// What the programs return to the kernel.
pub mod verdict {
    /// The only value that programs of sendmsg, recvmsg, getpeername and getsockopt return: the
    /// call goes on.
    pub const PROCEED: i32 = 1;
    /// connect(2), bind(2) or socket(2) goes on.
    pub const ALLOW: i32 = 1;
    /// connect(2) fails with `EPERM`.
    pub const REFUSE: i32 = 0;
    /// The kernel ignores what sock_ops programs return, unless a callback asks for a value. None
    /// of ours does.
    pub const IGNORED: u32 = 1;
    /// The opener of the connection sees a reset; in a program of packets, no answer.
    pub const SK_DROP: u32 = 0;
    /// The connection, or the packet, goes to the assigned socket, or to the one that the kernel
    /// finds.
    pub const SK_PASS: u32 = 1;
}

/// Reads one field of a context.
macro_rules! read {
    ($context:expr, $($field:tt)+) => {{
        let context = $context;
        // SAFETY: `context` is the kernel's context of the running program: `new`, which makes the
        // only values of this type, takes it from aya's entry point. It lives until the program
        // returns. The verifier has accepted an access of this field, at this width, in this
        // program type.
        unsafe { (&raw const (*context).$($field)+).read_volatile() }
    }};
}

/// Writes one field of a context.
macro_rules! write {
    ($context:expr, $value:expr, $($field:tt)+) => {{
        let (context, value) = ($context, $value);
        // SAFETY: as in `read`; the verifier has accepted that this program type writes the field.
        // No reference into the context exists.
        unsafe { (&raw mut (*context).$($field)+).write_volatile(value) }
    }};
}

mod lookup;
mod packet;
mod sock_addr;
mod sock_ops;
mod sock_opt;

pub use lookup::Lookup;
pub use packet::Packet;
pub use sock_addr::SockAddr;
pub use sock_ops::SockOps;
pub use sock_opt::SockOpt;

/// A socket of the kernel; maybe null.
#[derive(Clone, Copy)]
pub struct Socket(*mut bpf_sock);

impl Socket {
    /// For the helpers that take a socket; null if there is none.
    #[inline(always)]
    pub fn as_ptr(self) -> *mut bpf_sock {
        self.0
    }

    /// Whether there is one.
    #[inline(always)]
    pub fn is_null(self) -> bool {
        self.0.is_null()
    }

    /// The number of the interface that it is bound to; 0: to none, or there is no socket.
    #[inline(always)]
    pub fn device(self) -> u32 {
        if self.is_null() { 0 } else { read!(self.0, bound_dev_if) }
    }

    /// The port that it is bound to, in host byte order; 0: to none, or there is no socket.
    #[inline(always)]
    pub fn source_port(self) -> u16 {
        if self.is_null() { 0 } else { read!(self.0, src_port) as u16 }
    }

    /// The address that a socket of the IPv4 family is bound to; unspecified: none, or there is no
    /// socket.
    #[inline(always)]
    pub fn source_v4(self) -> Address {
        if self.is_null() { UNSPECIFIED } else { from_v4_word(read!(self.0, src_ip4)) }
    }

    /// The address that a socket of the IPv6 family is bound to; unspecified: none, or there is no
    /// socket.
    #[inline(always)]
    pub fn source_v6(self) -> Address {
        if self.is_null() {
            return UNSPECIFIED;
        }
        from_words([
            read!(self.0, src_ip6[0]),
            read!(self.0, src_ip6[1]),
            read!(self.0, src_ip6[2]),
            read!(self.0, src_ip6[3]),
        ])
    }

    /// Whether there is a socket, without an IPv4 source address.
    #[inline(always)]
    pub fn lacks_source_v4(self) -> bool {
        !self.is_null() && read!(self.0, src_ip4) == 0
    }

    /// Whether there is a socket, without an IPv6 source address.
    #[inline(always)]
    pub fn lacks_source_v6(self) -> bool {
        !self.is_null() && same(&self.source_v6(), &UNSPECIFIED)
    }
}

/// The context of programs that run when a socket is created or bound.
pub struct SocketEvent(*mut bpf_sock);

impl SocketEvent {
    #[inline(always)]
    pub fn new(context: SockContext) -> Self {
        Self(context.sock)
    }

    #[inline(always)]
    pub fn socket(&self) -> Socket {
        Socket(self.0)
    }

    /// Whether it is a TCP or MPTCP socket, or another stream.
    #[inline(always)]
    pub fn is_stream(&self) -> bool {
        read!(self.0, type_) == SOCK_STREAM
    }

    /// The cookie of the netns that the socket was created in.
    #[inline(always)]
    pub fn netns_cookie(&self) -> u64 {
        // SAFETY: the helper takes the context of this program type (Linux 5.7), which lives until
        // the program returns.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }
}

/// `context` is that of a connect or a sock_ops program.
#[inline(always)]
fn clear_mark(context: *mut c_void) {
    let mut none = 0u32;
    // SAFETY: the two callers pass the context of a program type that may call this helper; the
    // value lives on the stack and has the option's size. If it fails, the mark stays, and the
    // connection fails visibly.
    let _ = unsafe { bpf_setsockopt(context, SOL_SOCKET, SO_MARK, (&raw mut none).cast(), 4) };
}
