//! getsockopt: the program that answers SO_ORIGINAL_DST.

use adit_ebpf_common::{address::to_words, flows::Destination};
use aya_ebpf::{bindings::bpf_sockopt, programs::SockoptContext};

use super::{AF_INET, AF_INET6, Socket};

/// The kernel shows at most this much of an option to a program.
const PAGE: i32 = 4096;

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

    /// Leaves the kernel's answer as it is. Before Linux 6.5 an answer of more than a page, such as
    /// the tables that `iptables-save` reads, fails with `EFAULT` unless the program sets the
    /// length to 0.
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
        // SAFETY: the kernel's buffer for the answer reaches from `start` to `end`, has room for a
        // `T` as compared above, and is aligned to more than the four bytes that the two types of
        // sockaddr ask for.
        unsafe { start.cast::<T>().write(sockaddr) };
        // Two volatile stores: the compiler would merge plain ones into one of eight bytes, which
        // the verifier refuses.
        write!(self.0, size_of::<T>() as i32, optlen);
        write!(self.0, 0, retval);
    }
}
