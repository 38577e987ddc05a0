//! A connection that arrives in a pod's netns: asks the inbound list, steers to the tunnel's
//! listener.
//!
//! Nothing is rewritten: the socket that the tunnel accepts has the dialled address as its own.

use adit_ebpf_common::{
    decide::{self, Inbound},
    trace::Rule,
};
use aya_ebpf::{macros::sk_lookup, programs::SkLookupContext};

use crate::{
    context::{
        Lookup,
        verdict::{SK_DROP, SK_PASS},
    },
    maps::{self, facts::Arriving, pods},
    trace,
};

#[sk_lookup]
pub fn adit_sk_lookup(ctx: SkLookupContext) -> u32 {
    let lookup = Lookup::new(ctx);
    let Some(arrival) = lookup.arrival() else { return SK_PASS };
    let Some(settings) = maps::settings() else { return SK_PASS };
    let verdict = decide::inbound(&Arriving { settings, lookup: &lookup }, &arrival);
    // A pod that talks to itself is no matter of the mesh, and of a redirect connect(2) told.
    let rule = verdict.rule() as u16;
    if rule != Rule::SameHost as u16 && rule != Rule::SteerOutbound as u16 {
        maps::verdicts::count(lookup.netns_cookie(), verdict.rule());
        if settings.debug != 0 {
            trace::inbound(settings, verdict.rule(), &arrival.flow, pods::cgroup_in(lookup.netns_cookie()));
        }
    }
    match verdict {
        Inbound::Pass(_) => SK_PASS,
        Inbound::Drop(_) => SK_DROP,
    }
}
