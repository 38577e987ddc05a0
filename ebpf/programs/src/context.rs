//! The kernel's contexts, behind methods that are safe to call.
//!
//! A field of a context is read and written by its own width, in one load or store: the verifier rewrites each access
//! to what the running kernel has there, and refuses an access that the compiler merged with its neighbour or moved.
//! So every access here is volatile.
//!
//! Where a field belongs to one address family, both families' fields are read before it is known which one counts. If
//! they were read in branches, the compiler would merge the branches into one load at a computed offset, which the
//! verifier refuses.
//!
//! A context's address fields hold network byte order in memory, whatever the word's numeric value is. Ports differ
//! from field to field; each accessor converts its own.
#![expect(unsafe_code, reason = "contexts are raw pointers, and aya has accessors for few of their fields")]

use adit_ebpf_common::{
    address::{Address, from_v4_word, from_words, to_words},
    decide::Arrival,
    flows::{Destination, Flow},
};
use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE, bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops,
        bpf_sockopt,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_setsockopt, bpf_sock_ops_cb_flags_set},
    programs::{SkLookupContext, SockAddrContext, SockContext, SockOpsContext, SockoptContext},
};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
const SOCK_STREAM: u32 = 1;
const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
/// The kernel shows at most this much of an option to a program.
const PAGE: i32 = 4096;

/// What the programs return to the kernel.
pub mod verdict {
    /// The only value that programs of sendmsg, recvmsg, getpeername and getsockopt return: the call goes on.
    pub const PROCEED: i32 = 1;
    /// connect(2), bind(2) or socket(2) goes on.
    pub const ALLOW: i32 = 1;
    /// connect(2) fails with `EPERM`.
    pub const REFUSE: i32 = 0;
    /// The kernel ignores what sock_ops programs return, unless a callback asks for a value. None of ours does.
    pub const IGNORED: u32 = 1;
    /// The opener of the connection sees a reset.
    pub const SK_DROP: u32 = 0;
    /// The connection goes to the assigned socket, or to the one that the kernel finds.
    pub const SK_PASS: u32 = 1;
}

/// Reads one field of a context.
macro_rules! read {
    ($context:expr, $($field:tt)+) => {{
        let context = $context;
        // SAFETY: `context` is the kernel's context of the running program: `new`, which makes the only values
        // of this type, takes it from aya's entry point. It lives until the program returns. The verifier has
        // accepted an access of this field, at this width, in this program type.
        unsafe { (&raw const (*context).$($field)+).read_volatile() }
    }};
}

/// Writes one field of a context.
macro_rules! write {
    ($context:expr, $value:expr, $($field:tt)+) => {{
        let (context, value) = ($context, $value);
        // SAFETY: as in `read`; the verifier has accepted that this program type writes the field. No reference
        // into the context exists.
        unsafe { (&raw mut (*context).$($field)+).write_volatile(value) }
    }};
}

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

    /// Whether it is bound to a device.
    #[inline(always)]
    pub fn is_bound_to_device(self) -> bool {
        !self.is_null() && read!(self.0, bound_dev_if) != 0
    }

    /// Whether there is a socket, without an IPv4 source address.
    #[inline(always)]
    pub fn lacks_source_v4(self) -> bool {
        !self.is_null() && read!(self.0, src_ip4) == 0
    }

    /// Whether there is a socket, without an IPv6 source address.
    #[inline(always)]
    pub fn lacks_source_v6(self) -> bool {
        if self.is_null() {
            return false;
        }
        let words = [
            read!(self.0, src_ip6[0]),
            read!(self.0, src_ip6[1]),
            read!(self.0, src_ip6[2]),
            read!(self.0, src_ip6[3]),
        ];
        words[0] | words[1] | words[2] | words[3] == 0
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
        // SAFETY: the helper takes the context of this program type (Linux 5.7), which lives until the program returns.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }
}

/// The context of programs about an address that an application gives or gets: connect, sendmsg, recvmsg, getpeername.
pub struct SockAddr(*mut bpf_sock_addr);

impl SockAddr {
    #[inline(always)]
    pub fn new(context: SockAddrContext) -> Self {
        Self(context.sock_addr)
    }

    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        read!(self.0, protocol) == IPPROTO_TCP
    }

    #[inline(always)]
    pub fn is_udp(&self) -> bool {
        read!(self.0, protocol) == IPPROTO_UDP
    }

    #[inline(always)]
    pub fn socket(&self) -> Socket {
        Socket(read!(self.0, __bindgen_anon_1.sk))
    }

    /// In host byte order.
    #[inline(always)]
    pub fn port(&self) -> u16 {
        u16::from_be(read!(self.0, user_port) as u16)
    }

    /// The address of a program of the IPv4 family.
    #[inline(always)]
    pub fn address_v4(&self) -> Address {
        from_v4_word(read!(self.0, user_ip4))
    }

    /// The address of a program of the IPv6 family.
    #[inline(always)]
    pub fn address_v6(&self) -> Address {
        from_words([
            read!(self.0, user_ip6[0]),
            read!(self.0, user_ip6[1]),
            read!(self.0, user_ip6[2]),
            read!(self.0, user_ip6[3]),
        ])
    }

    /// Replaces the address in a program of the IPv4 family by `to`, which is IPv4 in mapped form.
    #[inline(always)]
    pub fn set_v4(&self, to: &Destination) {
        write!(self.0, to_words(&to.address)[3], user_ip4);
        self.set_port(to.port);
    }

    /// Replaces the address in a program of the IPv6 family.
    #[inline(always)]
    pub fn set_v6(&self, to: &Destination) {
        let words = to_words(&to.address);
        write!(self.0, words[0], user_ip6[0]);
        write!(self.0, words[1], user_ip6[1]);
        write!(self.0, words[2], user_ip6[2]);
        write!(self.0, words[3], user_ip6[3]);
        self.set_port(to.port);
    }

    #[inline(always)]
    fn set_port(&self, port: u16) {
        write!(self.0, u32::from(port.to_be()), user_port);
    }

    /// In a program of connect: takes the mark off the socket. Linux 5.8.
    #[inline(always)]
    pub fn clear_mark(&self) {
        clear_mark(self.0.cast());
    }
}

/// The context of sock_ops programs.
pub struct SockOps(*mut bpf_sock_ops);

impl SockOps {
    #[inline(always)]
    pub fn new(context: SockOpsContext) -> Self {
        Self(context.ops)
    }

    /// For the helpers that take this context.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut bpf_sock_ops {
        self.0
    }

    /// Which callback this is: `BPF_SOCK_OPS_…`.
    #[inline(always)]
    pub fn op(&self) -> u32 {
        read!(self.0, op)
    }

    /// In the state callback: whether the socket closes.
    #[inline(always)]
    pub fn is_closing(&self) -> bool {
        read!(self.0, __bindgen_anon_1.args[1]) == BPF_TCP_CLOSE
    }

    /// Null while there is only half a socket.
    #[inline(always)]
    pub fn socket(&self) -> Socket {
        Socket(read!(self.0, __bindgen_anon_2.sk))
    }

    /// Calls the state callback for this socket too.
    #[inline(always)]
    pub fn watch_close(&self) {
        let flags = read!(self.0, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
        // SAFETY: the helper takes the context of this program type, which lives until the program returns.
        let _ = unsafe { bpf_sock_ops_cb_flags_set(self.0, flags as i32) };
    }

    /// The address, port (host byte order) and family of the socket's own end.
    #[inline(always)]
    pub fn local(&self) -> Local {
        let port = read!(self.0, local_port) as u16;
        let is_v4 = read!(self.0, family) == AF_INET;
        let v4 = read!(self.0, local_ip4);
        let v6 = self.local_v6();
        Local { address: if is_v4 { from_v4_word(v4) } else { from_words(v6) }, port, is_v4 }
    }

    /// The connection, as this end sees it; `None` if it is neither IPv4 nor IPv6.
    #[inline(always)]
    pub fn flow(&self) -> Option<Flow> {
        // The local port is in host byte order, the remote one in the upper half of a big-endian word.
        let local_port = read!(self.0, local_port) as u16;
        let remote_port = u32::from_be(read!(self.0, remote_port)) as u16;
        let family = read!(self.0, family);
        let local_v4 = read!(self.0, local_ip4);
        let remote_v4 = read!(self.0, remote_ip4);
        let local_v6 = self.local_v6();
        let remote_v6 = [
            read!(self.0, remote_ip6[0]),
            read!(self.0, remote_ip6[1]),
            read!(self.0, remote_ip6[2]),
            read!(self.0, remote_ip6[3]),
        ];
        let (local, remote) = match family {
            AF_INET => (from_v4_word(local_v4), from_v4_word(remote_v4)),
            AF_INET6 => (from_words(local_v6), from_words(remote_v6)),
            _ => return None,
        };
        Some(Flow { local, remote, local_port, remote_port })
    }

    #[inline(always)]
    fn local_v6(&self) -> [u32; 4] {
        [
            read!(self.0, local_ip6[0]),
            read!(self.0, local_ip6[1]),
            read!(self.0, local_ip6[2]),
            read!(self.0, local_ip6[3]),
        ]
    }

    /// Takes the mark off the socket. Linux 5.8.
    #[inline(always)]
    pub fn clear_mark(&self) {
        clear_mark(self.0.cast());
    }
}

/// One end of a connection, or a listener.
pub struct Local {
    pub address: Address,
    /// Host byte order.
    pub port: u16,
    /// The family of the socket.
    pub is_v4: bool,
}

/// `context` is that of a connect or a sock_ops program.
#[inline(always)]
fn clear_mark(context: *mut core::ffi::c_void) {
    let mut none = 0u32;
    // SAFETY: the two callers pass the context of a program type that may call this helper; the value lives on the
    // stack and has the option's size. If it fails, the mark stays, and the connection fails visibly.
    let _ = unsafe { bpf_setsockopt(context, SOL_SOCKET, SO_MARK, (&raw mut none).cast(), 4) };
}

/// The context of sk_lookup programs.
pub struct Lookup(*mut bpf_sk_lookup);

impl Lookup {
    #[inline(always)]
    pub fn new(context: SkLookupContext) -> Self {
        Self(context.lookup)
    }

    /// For aya's method that assigns a socket, which consumes its context.
    #[inline(always)]
    pub fn to_aya(&self) -> SkLookupContext {
        SkLookupContext::new(self.0)
    }

    /// The connection, as its opener sees it; `None` if it is not TCP.
    ///
    /// All fields are copied to the stack: the kernel takes no pointer into a context as a map key.
    #[inline(always)]
    pub fn arrival(&self) -> Option<Arrival> {
        if read!(self.0, protocol) != IPPROTO_TCP {
            return None;
        }
        let is_v4 = read!(self.0, family) == AF_INET;
        let remote_v4 = read!(self.0, remote_ip4);
        let local_v4 = read!(self.0, local_ip4);
        let remote_v6 = [
            read!(self.0, remote_ip6[0]),
            read!(self.0, remote_ip6[1]),
            read!(self.0, remote_ip6[2]),
            read!(self.0, remote_ip6[3]),
        ];
        let local_v6 = [
            read!(self.0, local_ip6[0]),
            read!(self.0, local_ip6[1]),
            read!(self.0, local_ip6[2]),
            read!(self.0, local_ip6[3]),
        ];
        let (local, remote) = if is_v4 {
            (from_v4_word(remote_v4), from_v4_word(local_v4))
        } else {
            (from_words(remote_v6), from_words(local_v6))
        };
        // The word around `remote_port` reads the same as before Linux 5.18, where that field became 16 bits wide.
        let local_port = u16::from_be(read!(self.0, remote_port));
        let remote_port = read!(self.0, local_port) as u16;
        Some(Arrival { flow: Flow { local, remote, local_port, remote_port }, is_v4 })
    }
}

/// The context of getsockopt programs.
pub struct SockOpt(*mut bpf_sockopt);

#[repr(C)]
struct SockaddrIn {
    family: u16,
    port_be: u16,
    address: u32,
    zero: [u32; 2],
}

#[repr(C)]
struct SockaddrIn6 {
    family: u16,
    port_be: u16,
    flowinfo: u32,
    address: [u32; 4],
    scope_id: u32,
}

impl SockOpt {
    #[inline(always)]
    pub fn new(context: SockoptContext) -> Self {
        Self(context.sockopt)
    }

    /// `SOL_…`.
    #[inline(always)]
    pub fn level(&self) -> i32 {
        read!(self.0, level)
    }

    /// The option's number at its level.
    #[inline(always)]
    pub fn name(&self) -> i32 {
        read!(self.0, optname)
    }

    #[inline(always)]
    pub fn socket(&self) -> Socket {
        Socket(read!(self.0, __bindgen_anon_1.sk))
    }

    /// Leaves the kernel's answer as it is. Before Linux 6.5 an answer of more than a page, such as the tables that
    /// `iptables-save` reads, fails with `EFAULT` unless the program sets the length to 0.
    #[inline(always)]
    pub fn leave(&self) {
        if read!(self.0, optlen) > PAGE {
            write!(self.0, 0, optlen);
        }
    }

    /// Answers with `to` as a `struct sockaddr_in`, if there is room for it.
    #[inline(always)]
    pub fn answer_v4(&self, to: &Destination) {
        let sockaddr = SockaddrIn {
            family: AF_INET as u16,
            port_be: to.port.to_be(),
            address: to_words(&to.address)[3],
            zero: [0; 2],
        };
        self.answer(sockaddr);
    }

    /// Answers with `to` as a `struct sockaddr_in6`, if there is room for it.
    #[inline(always)]
    pub fn answer_v6(&self, to: &Destination) {
        let sockaddr = SockaddrIn6 {
            family: AF_INET6 as u16,
            port_be: to.port.to_be(),
            flowinfo: 0,
            address: to_words(&to.address),
            scope_id: 0,
        };
        self.answer(sockaddr);
    }

    #[inline(always)]
    fn answer<T>(&self, sockaddr: T) {
        let start = read!(self.0, __bindgen_anon_2.optval);
        let end = read!(self.0, __bindgen_anon_3.optval_end) as usize;
        if start as usize + size_of::<T>() > end {
            return;
        }
        // SAFETY: the kernel's buffer for the answer reaches from `start` to `end`, has room for a `T` as compared
        // above, and is aligned to more than the four bytes that the two types of sockaddr ask for.
        unsafe { start.cast::<T>().write(sockaddr) };
        // Two volatile stores: the compiler would merge plain ones into one of eight bytes, which the verifier refuses.
        write!(self.0, size_of::<T>() as i32, optlen);
        write!(self.0, 0, retval);
    }
}
