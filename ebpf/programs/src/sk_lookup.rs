//! A connection that arrives in a pod's netns: asks the decision list, steers to the tunnel's listener.
//!
//! Nothing is rewritten: the socket that the tunnel accepts has the dialled address as its own.

use adit_ebpf_common::{flows::Flow, pods::ListenerKey, trace::Rule};
use aya_ebpf::{bindings::bpf_sk_lookup, macros::sk_lookup, programs::SkLookupContext};

use crate::{
    address::{from_v4_word, from_words},
    decide::{self, Arrival, Inbound},
    maps, trace,
};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;

#[sk_lookup]
pub fn adit_sk_lookup(ctx: SkLookupContext) -> u32 {
    // SAFETY: the program's context.
    let Some(arrival) = (unsafe { read(ctx.lookup) }) else { return SK_PASS };
    let Some(settings) = maps::settings() else { return SK_PASS };
    let verdict = match decide::inbound(&arrival, settings) {
        Inbound::Steer { to, rule, fail_open } => match steer(&ctx, to) {
            // What is dropped is given to nobody, whatever was assigned.
            Ok(()) => decide::steered(&arrival, to.netns_cookie, rule),
            Err(()) => decide::without_tunnel(fail_open),
        },
        verdict => verdict,
    };
    let (rule, result) = match verdict {
        Inbound::Pass(rule) => (rule, SK_PASS),
        Inbound::Drop(rule) => (rule, SK_DROP),
        Inbound::Steer { rule, .. } => (rule, SK_DROP),
    };
    // A pod that talks to itself concerns nobody.
    if settings.debug != 0 && rule as u16 != Rule::SameHost as u16 {
        trace::inbound(settings, rule, &arrival.flow);
    }
    result
}

/// Gives the connection to the listener of `key`. An AF_INET6 socket serves AF_INET too, where no other does.
#[inline(always)]
fn steer(ctx: &SkLookupContext, mut key: ListenerKey) -> Result<(), ()> {
    let lookup = || SkLookupContext::new(ctx.lookup);
    if maps::LISTENERS.redirect_sk_lookup(lookup(), key, 0).is_ok() {
        return Ok(());
    }
    if key.family == 6 {
        return Err(());
    }
    key.family = 6;
    maps::LISTENERS.redirect_sk_lookup(lookup(), key, 0).map_err(|_| ())
}

/// The connection, as its opener sees it; `None` if it is not TCP.
///
/// # Safety
/// `ctx` is the program's context.
#[inline(always)]
unsafe fn read(ctx: *mut bpf_sk_lookup) -> Option<Arrival> {
    // SAFETY: the caller's. Fields are copied to the stack: the kernel takes no pointer into a context
    // as a map key. The word around `remote_port` reads alike since before that field was 16 bits wide.
    unsafe {
        if (&raw const (*ctx).protocol).read_volatile() != IPPROTO_TCP {
            return None;
        }
        let is_v4 = (&raw const (*ctx).family).read_volatile() == AF_INET;
        // Both families' words before it is known which count: see `sock_ops::flow`.
        let remote_v4 = (&raw const (*ctx).remote_ip4).read_volatile();
        let local_v4 = (&raw const (*ctx).local_ip4).read_volatile();
        let theirs = |index: usize| (&raw const (*ctx).remote_ip6[index]).read_volatile();
        let ours = |index: usize| (&raw const (*ctx).local_ip6[index]).read_volatile();
        let remote_v6 = [theirs(0), theirs(1), theirs(2), theirs(3)];
        let local_v6 = [ours(0), ours(1), ours(2), ours(3)];
        let (local, remote) = if is_v4 {
            (from_v4_word(remote_v4), from_v4_word(local_v4))
        } else {
            (from_words(remote_v6), from_words(local_v6))
        };
        let flow = Flow {
            local,
            remote,
            local_port: u16::from_be((&raw const (*ctx).remote_port).read_volatile()),
            remote_port: (&raw const (*ctx).local_port).read_volatile() as u16,
        };
        Some(Arrival { flow, is_v4 })
    }
}
