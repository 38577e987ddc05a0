//! Where a connection was meant to go: SO_ORIGINAL_DST for the tunnel, getpeername for the application.

use adit_ebpf_common::{
    address::is_v4,
    flows::{Destination, SocketState},
};
use aya_ebpf::{
    bindings::{bpf_sock_addr, bpf_sockopt},
    macros::{cgroup_sock_addr, cgroup_sockopt},
    programs::{SockAddrContext, SockoptContext},
};

use crate::{
    address::{from_v4_word, from_words, same, to_words},
    maps,
};

/// The only value that getpeername programs may return, and "as it stands" for getsockopt.
const GO_ON: i32 = 1;

const SOL_IP: i32 = 0;
const SOL_IPV6: i32 = 41;
/// SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST.
const SO_ORIGINAL_DST: i32 = 80;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
/// The kernel shows at most this much of an option to a program.
const PAGE: i32 = 4096;

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

/// Answers SO_ORIGINAL_DST for redirected connections in the form that netfilter gives it: an IPv4 one at
/// level SOL_IP, an IPv6 one at level SOL_IPV6. Everything else stays the kernel's own answer.
#[cgroup_sockopt(getsockopt)]
pub fn adit_getsockopt(ctx: SockoptContext) -> i32 {
    // SAFETY: the program's context.
    unsafe { answer(ctx.sockopt) }
    GO_ON
}

/// # Safety
/// `ctx` is the program's context.
#[inline(always)]
unsafe fn answer(ctx: *mut bpf_sockopt) {
    // SAFETY: the caller's.
    unsafe {
        let level = (&raw const (*ctx).level).read_volatile();
        if (&raw const (*ctx).optname).read_volatile() != SO_ORIGINAL_DST
            || (level != SOL_IP && level != SOL_IPV6)
        {
            leave(ctx);
            return;
        }
        let Some(state) = maps::state((&raw const (*ctx).__bindgen_anon_1.sk).read_volatile()) else {
            return;
        };
        // On an application's own socket there is a redirect, and no question to answer.
        if state.original.port == 0 || state.redirect.port != 0 {
            return;
        }
        let start = (&raw const (*ctx).__bindgen_anon_2.optval).read_volatile();
        let end = (&raw const (*ctx).__bindgen_anon_3.optval_end).read_volatile() as usize;
        let words = to_words(&state.original.address);
        let port_be = state.original.port.to_be();
        if is_v4(&state.original.address) {
            if level != SOL_IP || start as usize + size_of::<SockaddrIn>() > end {
                return;
            }
            let sockaddr = SockaddrIn { family: AF_INET, port_be, address: words[3], zero: [0; 2] };
            start.cast::<SockaddrIn>().write(sockaddr);
            succeed(ctx, size_of::<SockaddrIn>());
        } else {
            if level != SOL_IPV6 || start as usize + size_of::<SockaddrIn6>() > end {
                return;
            }
            let (flowinfo, scope_id) = (0, 0);
            let sockaddr = SockaddrIn6 { family: AF_INET6, port_be, flowinfo, address: words, scope_id };
            start.cast::<SockaddrIn6>().write(sockaddr);
            succeed(ctx, size_of::<SockaddrIn6>());
        }
    }
}

/// Before Linux 6.5 an answer of more than a page, such as the tables that `iptables-save` reads, fails
/// with EFAULT when a program leaves it alone; length 0 says that it did.
///
/// # Safety
/// `ctx` is the program's context.
#[inline(always)]
unsafe fn leave(ctx: *mut bpf_sockopt) {
    // SAFETY: the caller's.
    unsafe {
        if (&raw const (*ctx).optlen).read_volatile() > PAGE {
            (&raw mut (*ctx).optlen).write_volatile(0);
        }
    }
}

/// Volatile, since the compiler would merge the two stores into one of eight bytes, which the verifier refuses.
///
/// # Safety
/// `ctx` is the program's context.
#[inline(always)]
unsafe fn succeed(ctx: *mut bpf_sockopt, len: usize) {
    // SAFETY: the caller's.
    unsafe {
        (&raw mut (*ctx).optlen).write_volatile(len as i32);
        (&raw mut (*ctx).retval).write_volatile(0);
    }
}

#[cgroup_sock_addr(getpeername4)]
pub fn adit_peername4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the program's context.
    unsafe { show_original_v4(ctx.sock_addr) }
    GO_ON
}

#[cgroup_sock_addr(getpeername6)]
pub fn adit_peername6(ctx: SockAddrContext) -> i32 {
    // SAFETY: the program's context.
    unsafe { show_original_v6(ctx.sock_addr) }
    GO_ON
}

/// Puts where the socket wanted to go in place of where it was redirected to, if that is what the context shows.
///
/// # Safety
/// `ctx` is the context of a program that may write an IPv4 address.
#[inline(always)]
pub unsafe fn show_original_v4(ctx: *mut bpf_sock_addr) {
    // SAFETY: the caller's.
    unsafe {
        if let Some(state) = redirected(ctx) {
            let peer = from_v4_word((&raw const (*ctx).user_ip4).read_volatile());
            if is_at(ctx, &peer, &state.redirect) {
                let words = to_words(&state.original.address);
                (&raw mut (*ctx).user_ip4).write_volatile(words[3]);
                write_port(ctx, state.original.port);
            }
        }
    }
}

/// As [`show_original_v4`].
///
/// # Safety
/// `ctx` is the context of a program that may write an IPv6 address.
#[inline(always)]
pub unsafe fn show_original_v6(ctx: *mut bpf_sock_addr) {
    // SAFETY: the caller's.
    unsafe {
        if let Some(state) = redirected(ctx) {
            let word = |index: usize| (&raw const (*ctx).user_ip6[index]).read_volatile();
            let peer = from_words([word(0), word(1), word(2), word(3)]);
            if is_at(ctx, &peer, &state.redirect) {
                let words = to_words(&state.original.address);
                (&raw mut (*ctx).user_ip6[0]).write_volatile(words[0]);
                (&raw mut (*ctx).user_ip6[1]).write_volatile(words[1]);
                (&raw mut (*ctx).user_ip6[2]).write_volatile(words[2]);
                (&raw mut (*ctx).user_ip6[3]).write_volatile(words[3]);
                write_port(ctx, state.original.port);
            }
        }
    }
}

/// # Safety
/// `ctx` is the program's context.
#[inline(always)]
unsafe fn redirected(ctx: *mut bpf_sock_addr) -> Option<&'static SocketState> {
    // SAFETY: the caller's.
    let state = maps::state(unsafe { (&raw const (*ctx).__bindgen_anon_1.sk).read_volatile() })?;
    (state.original.port != 0 && state.redirect.port != 0).then_some(state)
}

/// # Safety
/// `ctx` is the program's context.
#[inline(always)]
unsafe fn is_at(ctx: *mut bpf_sock_addr, peer: &[u8; 16], redirect: &Destination) -> bool {
    // SAFETY: the caller's.
    let port = u16::from_be(unsafe { (&raw const (*ctx).user_port).read_volatile() } as u16);
    port == redirect.port && same(peer, &redirect.address)
}

/// # Safety
/// `ctx` is the program's context.
#[inline(always)]
unsafe fn write_port(ctx: *mut bpf_sock_addr, port: u16) {
    // SAFETY: the caller's.
    unsafe { (&raw mut (*ctx).user_port).write_volatile(u32::from(port.to_be())) };
}
