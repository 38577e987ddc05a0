//! connect(2) of a pod's socket: asks the outbound list, redirects.
//!
//! The kernel calls `connect6` for every AF_INET6 socket, also when it dials a v4-mapped address.
//! The redirect of such a call stays mapped, or the kernel would refuse it.
//!
//! Each program is one function: the stack frames of functions that call each other share 512 bytes.

use adit_ebpf_common::{
    address::Address,
    decide::{self, Connect, ConnectFacts as _, Outbound},
    flows::Destination,
    trace::Hook,
};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    context::{
        SockAddr,
        verdict::{ALLOW, REFUSE},
    },
    maps::{self, facts::Caller, pods},
    trace,
};

#[cgroup_sock_addr(connect4)]
#[inline(always)]
pub fn adit_connect4(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(ctx);
    let (verdict, redirect) = run(&call, call.address_v4(), call.socket().source_v4(), Hook::Connect4);
    if redirect.is_somewhere() {
        call.set_v4(&redirect);
    }
    verdict
}

#[cgroup_sock_addr(connect6)]
#[inline(always)]
pub fn adit_connect6(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(ctx);
    let (verdict, redirect) = run(&call, call.address_v6(), call.socket().source_v6(), Hook::Connect6);
    if redirect.is_somewhere() {
        call.set_v6(&redirect);
    }
    verdict
}

/// What to return to the kernel, and where to redirect to.
#[inline(always)]
fn run(ctx: &SockAddr, address: Address, source: Address, hook: Hook) -> (i32, Destination) {
    let Some(settings) = maps::settings() else { return (ALLOW, Destination::NOWHERE) };
    let socket = ctx.socket();
    let call = Connect {
        is_tcp: ctx.is_tcp(),
        is_udp: ctx.is_udp(),
        destination: Destination::new(address, ctx.port()),
    };
    let own = if call.is_tcp || call.is_query() { pods::caller() } else { None };
    let caller = Caller::new(settings, ctx.netns_cookie(), socket, source, own);
    let outbound = decide::outbound(&caller, &call);
    let (verdict, to) = match outbound {
        Outbound::Leave(_) => {
            // What an earlier connect on this socket recorded does not apply any more.
            if call.is_tcp || call.is_udp {
                maps::forget_redirect(socket);
            }
            (ALLOW, Destination::NOWHERE)
        }
        Outbound::Refuse(_) => (REFUSE, Destination::NOWHERE),
        Outbound::Redirect(_, to) => (ALLOW, to),
    };
    // UDP that is not a captured query is no matter of the mesh.
    if call.is_tcp || to.is_somewhere() {
        maps::verdicts::count_outbound(&caller, outbound.rule());
        if settings.debug != 0 {
            trace::outbound(settings, hook, outbound.rule(), caller.entry(), &call.destination);
        }
    }
    (verdict, to)
}
