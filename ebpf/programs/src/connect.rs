//! connect(2) of a pod's TCP socket: asks the decision list, redirects.
//!
//! The kernel calls `connect6` for every AF_INET6 socket, also when it dials a v4-mapped address; the
//! redirect of such a call stays mapped, or the kernel would refuse it.

use adit_ebpf_common::{
    address::Address,
    flows::Destination,
    trace::{Hook, Rule},
};
use aya_ebpf::{bindings::bpf_sock_addr, macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    address::{from_v4_word, from_words, to_words},
    decide::{self, Connect, NOWHERE, Outbound},
    dns, maps, trace,
};

const ALLOW: i32 = 1;
/// connect(2) fails with EPERM.
const REFUSE: i32 = 0;

const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;

#[cgroup_sock_addr(connect4)]
pub fn adit_connect4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    // SAFETY: the context of a connect4 program; every field is read and written by its own width.
    unsafe {
        let address = from_v4_word((&raw const (*ctx).user_ip4).read_volatile());
        let (verdict, redirect) = run(ctx, address, Hook::Connect4);
        if redirect.port != 0 {
            let word = to_words(&redirect.address)[3];
            (&raw mut (*ctx).user_ip4).write_volatile(word);
            write_port(ctx, redirect.port);
        }
        verdict
    }
}

#[cgroup_sock_addr(connect6)]
pub fn adit_connect6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    // SAFETY: as in `adit_connect4`.
    unsafe {
        let word = |index: usize| (&raw const (*ctx).user_ip6[index]).read_volatile();
        let address = from_words([word(0), word(1), word(2), word(3)]);
        let (verdict, redirect) = run(ctx, address, Hook::Connect6);
        if redirect.port != 0 {
            let words = to_words(&redirect.address);
            (&raw mut (*ctx).user_ip6[0]).write_volatile(words[0]);
            (&raw mut (*ctx).user_ip6[1]).write_volatile(words[1]);
            (&raw mut (*ctx).user_ip6[2]).write_volatile(words[2]);
            (&raw mut (*ctx).user_ip6[3]).write_volatile(words[3]);
            write_port(ctx, redirect.port);
        }
        verdict
    }
}

/// What to tell the kernel, and where to redirect to; port 0: nowhere.
///
/// # Safety
/// `ctx` is the program's context.
#[inline(always)]
unsafe fn run(ctx: *mut bpf_sock_addr, address: Address, hook: Hook) -> (i32, Destination) {
    let Some(settings) = maps::settings() else { return (ALLOW, NOWHERE) };
    // SAFETY: the caller's.
    let (call, is_udp) = unsafe {
        let port = (&raw const (*ctx).user_port).read_volatile();
        let protocol = (&raw const (*ctx).protocol).read_volatile();
        let call = Connect {
            is_tcp: protocol == IPPROTO_TCP,
            socket: (&raw const (*ctx).__bindgen_anon_1.sk).read_volatile(),
            destination: Destination { address, port: u16::from_be(port as u16), pad: 0 },
        };
        (call, protocol == IPPROTO_UDP)
    };
    let is_query = call.destination.port == dns::PORT && (call.is_tcp || is_udp);
    let info = if call.is_tcp || is_query { maps::caller() } else { None };
    if is_query && let Some(info) = info {
        let to = dns::redirect(settings, info, call.socket, &call.destination);
        if to.port != 0 {
            if settings.debug != 0 {
                let own = decide::own_address(Some(info), &address);
                trace::outbound(settings, hook, Rule::Names, &own, &call.destination);
            }
            return (ALLOW, to);
        }
    }
    let (rule, verdict, to) = match decide::outbound(&call, settings, info) {
        Outbound::Leave(rule) => {
            // What an earlier connect on this socket recorded does not hold any more.
            if call.is_tcp || is_udp {
                maps::forget_redirect(call.socket);
            }
            (rule, ALLOW, NOWHERE)
        }
        Outbound::Refuse(rule) => (rule, REFUSE, NOWHERE),
        Outbound::Redirect(to) => (Rule::Redirect, ALLOW, to),
    };
    if settings.debug != 0 && call.is_tcp {
        trace::outbound(settings, hook, rule, &decide::own_address(info, &address), &call.destination);
    }
    (verdict, to)
}

/// # Safety
/// `ctx` is the program's context.
#[inline(always)]
unsafe fn write_port(ctx: *mut bpf_sock_addr, port: u16) {
    // SAFETY: the caller's.
    unsafe { (&raw mut (*ctx).user_port).write_volatile(u32::from(port.to_be())) };
}
