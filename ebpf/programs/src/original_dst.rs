//! Where a connection was meant to go: SO_ORIGINAL_DST for the tunnel, getpeername for the
//! application.

use adit_ebpf_common::{
    address::{Address, is_v4, same},
    flows::{Destination, check},
};
use aya_ebpf::{
    macros::{cgroup_sock_addr, cgroup_sockopt},
    programs::{SockAddrContext, SockoptContext},
};

use crate::{
    context::{SockAddr, SockOpt, verdict::PROCEED},
    maps,
};

const SOL_IP: i32 = 0;
const SOL_IPV6: i32 = 41;
/// SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST.
const SO_ORIGINAL_DST: i32 = 80;

/// Answers SO_ORIGINAL_DST for redirected connections in the form that netfilter gives it: an IPv4
/// one at level SOL_IP, an IPv6 one at level SOL_IPV6. Everything else stays the kernel's own
/// answer.
#[cgroup_sockopt(getsockopt)]
pub fn adit_getsockopt(ctx: SockoptContext) -> i32 {
    answer(&SockOpt::new(ctx));
    PROCEED
}

#[inline(always)]
fn answer(option: &SockOpt) {
    let level = option.level();
    if option.name() != SO_ORIGINAL_DST || (level != SOL_IP && level != SOL_IPV6) {
        option.leave();
        return;
    }
    let Some(state) = maps::state(option.socket()) else { return };
    // On an application's own socket there is a redirect, and no question to answer.
    if !state.original.is_somewhere() || state.redirect.is_somewhere() {
        return;
    }
    if is_v4(&state.original.address) {
        if level == SOL_IP {
            option.answer_v4(&state.original);
        }
    } else if level == SOL_IPV6 {
        option.answer_v6(&state.original);
    }
}

#[cgroup_sock_addr(getpeername4)]
pub fn adit_peername4(ctx: SockAddrContext) -> i32 {
    show_original_v4(&SockAddr::new(ctx));
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
pub fn adit_peername6(ctx: SockAddrContext) -> i32 {
    show_original_v6(&SockAddr::new(ctx));
    PROCEED
}

/// In a program of the IPv4 family: puts where the socket wanted to go in place of where it was
/// redirected to, if that is what the context shows.
#[inline(always)]
pub fn show_original_v4(ctx: &SockAddr) {
    let original = original_of(ctx, &ctx.address_v4());
    if original.is_somewhere() {
        ctx.set_v4(&original);
    }
}

/// Like [`show_original_v4`], in a program of the IPv6 family.
#[inline(always)]
pub fn show_original_v6(ctx: &SockAddr) {
    let original = original_of(ctx, &ctx.address_v6());
    if original.is_somewhere() {
        ctx.set_v6(&original);
    }
}

/// Nowhere, if `peer` is not where the socket was redirected to.
#[inline(always)]
fn original_of(ctx: &SockAddr, peer: &Address) -> Destination {
    let mut looks = 0;
    // Another thread may be writing a state of UDP.
    while looks < 2 {
        let Some(state) = maps::redirected(ctx.socket()) else { return Destination::NOWHERE };
        if ctx.port() != state.redirect.port || !same(peer, &state.redirect.address) {
            return Destination::NOWHERE;
        }
        if state.check == 0 || state.check == check(&state.original, &state.redirect) {
            return state.original;
        }
        looks += 1;
    }
    Destination::NOWHERE
}
