//! The tunnel's own connects: its mark stays on the last hop only, and a connect to a client of its
//! DNS proxy leads to the resolver that this client asked.
//!
//! A tunnel that also works under an iptables agent marks every socket that it opens, listeners
//! too. With our route in the pod's netns the mark means one thing: this connection uses the
//! client's address, and its answers stay on this host. Such a socket is bound to that address
//! before it connects. Any other socket loses the mark when it connects or listens, or the route
//! would keep its packets from leaving the pod.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    context::{SockAddr, verdict::PROCEED},
    dns,
};

#[cgroup_sock_addr(connect4)]
pub fn adit_tunnel_mark4(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(ctx);
    if call.socket().lacks_source_v4() {
        call.clear_mark();
    }
    let resolver = dns::asked_by_v4(&call);
    if resolver.is_somewhere() {
        call.set_v4(&resolver);
    }
    PROCEED
}

#[cgroup_sock_addr(connect6)]
pub fn adit_tunnel_mark6(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(ctx);
    if call.socket().lacks_source_v6() {
        call.clear_mark();
    }
    let resolver = dns::asked_by_v6(&call);
    if resolver.is_somewhere() {
        call.set_v6(&resolver);
    }
    PROCEED
}
