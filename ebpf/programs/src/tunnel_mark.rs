//! The tunnel's mark stays on the last hop only.
//!
//! A tunnel that works under an iptables agent marks every socket that it opens, listeners too. With our
//! route in the pod's netns the mark means one thing: this connection spends the client's address, its
//! answers stay on this host. Such a socket is bound to that address before it connects; any other loses
//! the mark when it connects or listens, or the route would keep its packets from leaving the pod.

use core::ffi::c_void;

use aya_ebpf::{helpers::generated::bpf_setsockopt, macros::cgroup_sock_addr, programs::SockAddrContext};

const PROCEED: i32 = 1;
const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;

#[cgroup_sock_addr(connect4)]
pub fn adit_tunnel_mark4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the program's context; the socket is null-checked before it is read.
    unsafe {
        let socket = (&raw const (*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile();
        if !socket.is_null() && (&raw const (*socket).src_ip4).read_volatile() == 0 {
            clear_mark(ctx.sock_addr.cast());
        }
    }
    PROCEED
}

#[cgroup_sock_addr(connect6)]
pub fn adit_tunnel_mark6(ctx: SockAddrContext) -> i32 {
    // SAFETY: as above.
    unsafe {
        let socket = (&raw const (*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile();
        if socket.is_null() {
            return PROCEED;
        }
        let word = |index: usize| (&raw const (*socket).src_ip6[index]).read_volatile();
        if word(0) | word(1) | word(2) | word(3) == 0 {
            clear_mark(ctx.sock_addr.cast());
        }
    }
    PROCEED
}

/// # Safety
/// `ctx` is the context of a program about one socket: connect or sock_ops.
#[inline(always)]
pub unsafe fn clear_mark(ctx: *mut c_void) {
    let mut none = 0u32;
    // SAFETY: the value lives on the stack and has the option's size. Failing leaves the mark, and with it
    // a connection that fails visibly. Linux 5.8.
    let _ = unsafe { bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, (&raw mut none).cast(), 4) };
}
