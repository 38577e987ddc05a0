//! Where a connection was meant to go: SO_ORIGINAL_DST for the tunnel, getpeername for the
//! application.

use adit_ebpf_common::{
    address::{Address, is_v4, same},
    flows::SocketState,
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
    if let Some(state) = redirected(ctx)
        && shows_redirect(ctx, &ctx.address_v4(), state)
    {
        ctx.set_v4(&state.original);
    }
}

/// Like [`show_original_v4`], in a program of the IPv6 family.
#[inline(always)]
pub fn show_original_v6(ctx: &SockAddr) {
    if let Some(state) = redirected(ctx)
        && shows_redirect(ctx, &ctx.address_v6(), state)
    {
        ctx.set_v6(&state.original);
    }
}

#[inline(always)]
fn redirected(ctx: &SockAddr) -> Option<&'static SocketState> {
    let state = maps::state(ctx.socket())?;
    (state.original.is_somewhere() && state.redirect.is_somewhere()).then_some(state)
}

#[inline(always)]
fn shows_redirect(ctx: &SockAddr, peer: &Address, state: &SocketState) -> bool {
    ctx.port() == state.redirect.port && same(peer, &state.redirect.address)
}
