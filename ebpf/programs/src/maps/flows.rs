//! Connections on their way: where their openers wanted to go, which the tunnel and the kubelet
//! opened, and which need a netns prepared.

use core::arch::asm;

use adit_ebpf_common::{
    flows::{ACK_LIFETIME, Destination, Flow, Original, SYN_LIFETIME, TunnelFlow},
    sealed::Sealed,
};
use aya_ebpf::{
    bindings::{BPF_EXIST, BPF_NOEXIST},
    helpers::generated::bpf_ktime_get_ns,
    maps::LruHashMap,
};

use super::{
    KUBELET_FLOWS, ORIGINAL_DST, PINNED_CONNECTIONS, TUNNEL_FLOWS,
    whole::{Look, in_memory, look},
};

/// Publishes where the opener of `flow` wanted to go. If that fails, the tunnel gets no answer and
/// refuses the connection.
#[inline(always)]
pub fn publish_original(flow: &Flow, original: &Destination) {
    let original = Original { destination: *in_memory(original), pad: 0 };
    let _ = ORIGINAL_DST.insert(flow, Sealed::new(in_memory(flow), original), 0);
}

#[inline(always)]
pub fn published_original(flow: &Flow) -> Option<Destination> {
    let mut copy = Sealed::broken(Original { destination: Destination::NOWHERE, pad: 0 });
    let look = look(flow, &mut copy, || ORIGINAL_DST.get_ptr(flow));
    if look == Look::Whole { Some(copy.unchecked().destination) } else { None }
}

#[inline(always)]
pub fn withdraw_original(flow: &Flow) {
    let _ = ORIGINAL_DST.remove(flow);
}

/// Flows that pass during their handshake.
type PassingFlows = LruHashMap<Flow, Sealed<TunnelFlow>>;

#[inline(always)]
pub fn record_tunnel_flow(flow: &Flow, netns_cookie: u64) -> Result<(), i32> {
    record(&TUNNEL_FLOWS, flow, netns_cookie)
}

/// The tunnel's end of `flow` is established. Its socket is the one writer of the entry.
#[inline(always)]
pub fn shorten_tunnel_flow(flow: &Flow) {
    shorten(&TUNNEL_FLOWS, flow);
}

/// The netns from which the tunnel opened `flow`, while that may still be on its way.
#[inline(always)]
pub fn tunnel_flow(flow: &Flow) -> Option<u64> {
    let found = recorded(&TUNNEL_FLOWS, flow)?;
    if now() < found.valid_until { Some(found.netns_cookie) } else { None }
}

#[inline(always)]
pub fn record_kubelet_flow(flow: &Flow) -> Result<(), i32> {
    record(&KUBELET_FLOWS, flow, 0)
}

/// The kubelet's end of `flow` is established.
#[inline(always)]
pub fn shorten_kubelet_flow(flow: &Flow) {
    shorten(&KUBELET_FLOWS, flow);
}

/// Whether the kubelet opened `flow`, and it may still be on its way.
#[inline(always)]
pub fn is_kubelet_flow(flow: &Flow) -> bool {
    recorded(&KUBELET_FLOWS, flow).is_some_and(|found| now() < found.valid_until)
}

#[inline(always)]
pub fn forget_kubelet_flow(flow: &Flow) {
    let _ = KUBELET_FLOWS.remove(flow);
}

#[inline(always)]
fn record(map: &PassingFlows, flow: &Flow, netns_cookie: u64) -> Result<(), i32> {
    let passes = TunnelFlow { netns_cookie, valid_until: now() + SYN_LIFETIME };
    map.insert(flow, Sealed::new(flow, passes), 0)
}

#[inline(always)]
fn shorten(map: &PassingFlows, flow: &Flow) {
    let Some(found) = recorded(map, flow) else { return };
    let shorter = TunnelFlow { valid_until: now() + ACK_LIFETIME, ..found };
    let _ = map.insert(flow, Sealed::new(flow, shorter), u64::from(BPF_EXIST));
}

#[inline(always)]
fn recorded(map: &PassingFlows, flow: &Flow) -> Option<TunnelFlow> {
    let mut copy = Sealed::broken(TunnelFlow { netns_cookie: 0, valid_until: 0 });
    let look = look(flow, &mut copy, || map.get_ptr(flow));
    if look == Look::Whole { Some(*copy.unchecked()) } else { None }
}

/// `CLOCK_MONOTONIC`, in nanoseconds.
#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes nothing.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
pub fn forget_tunnel_flow(flow: &Flow) {
    let _ = TUNNEL_FLOWS.remove(flow);
}

/// Counts a connection of the tunnel that needs the netns prepared. Whether it could.
#[inline(always)]
pub fn count_pinned_connection(netns_cookie: u64) -> bool {
    if PINNED_CONNECTIONS.get_ptr_mut(netns_cookie).is_none() {
        // Another processor's entry may be there by now.
        let _ = PINNED_CONNECTIONS.insert(netns_cookie, 0, u64::from(BPF_NOEXIST));
    }
    add_pinned_connections(netns_cookie, 1)
}

#[inline(always)]
pub fn uncount_pinned_connection(netns_cookie: u64) {
    add_pinned_connections(netns_cookie, u64::MAX);
}

#[inline(always)]
fn add_pinned_connections(netns_cookie: u64, number: u64) -> bool {
    let Some(count) = PINNED_CONNECTIONS.get_ptr_mut(netns_cookie) else { return false };
    // One atomic step, since a socket may close on another processor, or in an interrupt on this
    // one. Without asking for the sum, which Linux before 5.12 cannot give.
    // SAFETY: `count` points to an entry of the map, whose memory the kernel frees only after this
    // program; values of 8 bytes are aligned, and only these programs change them, always by this
    // instruction. If the watcher removes the entry meanwhile, another netns may have its memory, and
    // counts one too many or too few: such a netns stays prepared, or is restored early.
    unsafe { asm!("lock *(u64 *)({count} + 0) += {number}", count = in(reg) count, number = in(reg) number) };
    true
}
