//! A connection for a listener of a pod whose netns the watcher has not found yet.
//!
//! Arrivals are [`crate::sk_lookup`]'s, once that is attached to the pod's netns, which the watcher
//! finds by the pod's first process. An application may listen before. Its cgroup is closed since it
//! was made, so what arrives for a listener of such a cgroup is dropped, without an answer: its
//! sender repeats it after a second, and is then answered by whom the rules say.
//!
//! A program for each packet is attached only while such pods are expected.

use adit_ebpf_common::enrolment::flag;
use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};

use crate::{
    context::{
        Packet,
        verdict::{SK_DROP, SK_PASS},
    },
    maps::pods,
};

#[cgroup_skb(ingress)]
pub fn adit_ingress(ctx: SkBuffContext) -> i32 {
    let packet = Packet::new(ctx);
    let verdict = if packet.is_for_listener() && is_closed(&packet) { SK_DROP } else { SK_PASS };
    verdict as i32
}

#[inline(always)]
fn is_closed(packet: &Packet) -> bool {
    const CLOSED: u32 = flag::IN_MESH;
    const DECIDES: u32 = flag::IN_MESH | flag::FAIL_OPEN | flag::TUNNEL | flag::SIDECAR;
    let Some(entry) = pods::receiver(packet) else { return false };
    // Whoever meets an entry that is being replaced each time is dropped, and asks again.
    let mut copy = pods::CLOSED;
    entry.read(&mut copy);
    let info = copy.unchecked();
    let is_unknown = info.netns_cookie == 0 && (info.flags | info.detected) & DECIDES == CLOSED;
    // A pod that talks to itself is no matter of the mesh.
    is_unknown && !packet.is_from_itself()
}
