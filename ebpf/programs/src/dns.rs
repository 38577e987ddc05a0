//! DNS queries of pods: to the tunnel's port on the loopback, with answers shown as the resolver's
//! own.
//!
//! [`crate::connect`] redirects connected sockets, TCP or UDP. A datagram with an address of its
//! own is redirected by `sendmsg`, and `recvmsg` corrects the address of what is received. For IPv4
//! destinations of IPv6 sockets the kernel calls the IPv4 program of `sendmsg` and the IPv6 one of
//! `recvmsg`; with addresses in mapped form both speak of the same.
//!
//! A datagram does not tell the tunnel which resolver it was sent to. The tunnel learns it by a
//! connect of a UDP socket to the client that sent it: a socket with the client's address exists in
//! that netns, and knows where it was redirected from.

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED, is_loopback},
    decide::{self, ConnectFacts as _},
    flows::Destination,
    trace::{Hook, Rule},
};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    context::{SockAddr, verdict::PROCEED},
    maps::{self, facts::Caller, pods},
    original_dst::{show_original_v4, show_original_v6},
    trace,
};

#[cgroup_sock_addr(sendmsg4)]
pub fn adit_sendmsg4(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(ctx);
    let to = captured(&call, call.address_v4(), Hook::Sendmsg4);
    if to.is_somewhere() {
        call.set_v4(&to);
    }
    PROCEED
}

#[cgroup_sock_addr(sendmsg6)]
pub fn adit_sendmsg6(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(ctx);
    let to = captured(&call, call.address_v6(), Hook::Sendmsg6);
    if to.is_somewhere() {
        call.set_v6(&to);
    }
    PROCEED
}

#[inline(always)]
fn captured(ctx: &SockAddr, address: Address, hook: Hook) -> Destination {
    let resolver = Destination::new(address, ctx.port());
    if resolver.port != decide::DNS_PORT {
        return Destination::NOWHERE;
    }
    let Some(settings) = maps::settings() else { return Destination::NOWHERE };
    let caller = Caller::new(settings, ctx.netns_cookie(), ctx.socket(), UNSPECIFIED, pods::caller());
    let to = decide::dns_redirect(&caller, &resolver);
    if to.is_somewhere() {
        maps::verdicts::count_outbound(&caller, Rule::DnsRedirect);
        if settings.debug != 0 {
            trace::outbound(settings, hook, Rule::DnsRedirect, caller.entry(), &resolver);
        }
    }
    to
}

/// An answer shows the resolver that its socket queried last. If a socket queries several at once,
/// the answer may be another one's; it was one of them, and that is all that resolver libraries
/// check.
#[cgroup_sock_addr(recvmsg4)]
pub fn adit_recvmsg4(ctx: SockAddrContext) -> i32 {
    show_original_v4(&SockAddr::new(ctx));
    PROCEED
}

#[cgroup_sock_addr(recvmsg6)]
pub fn adit_recvmsg6(ctx: SockAddrContext) -> i32 {
    show_original_v6(&SockAddr::new(ctx));
    PROCEED
}

/// For a connect of the tunnel to a client of its DNS proxy: the resolver that the client asked
/// last. Nowhere for other connects.
#[inline(always)]
pub fn asked_by_v4(call: &SockAddr) -> Destination {
    let Some((client, port)) = dns_client(call, call.address_v4()) else { return Destination::NOWHERE };
    maps::dns_clients::original_v4(call, &client, port)
}

/// Like [`asked_by_v4`], in a program of the IPv6 family.
#[inline(always)]
pub fn asked_by_v6(call: &SockAddr) -> Destination {
    let Some((client, port)) = dns_client(call, call.address_v6()) else { return Destination::NOWHERE };
    maps::dns_clients::original_v6(call, &client, port)
}

/// Where the tunnel connects to, if it may be such a client, and the port of the DNS proxy.
#[inline(always)]
fn dns_client(call: &SockAddr, address: Address) -> Option<(Destination, u16)> {
    if !call.is_udp() || !is_loopback(&address) {
        return None;
    }
    let settings = maps::settings()?;
    Some((Destination::new(address, call.port()), settings.dns_port))
}
