//! How often each rule decided.

use core::arch::asm;

use adit_ebpf_common::{
    decide::ConnectFacts as _,
    enrolment::flag,
    trace::Rule,
    verdicts::{ELSEWHERE, MAX_RULES, Verdicts},
};

use super::{VERDICTS, facts::Caller};

/// Counts a verdict about a connection of `caller`, if that is a pod: the many that are not
/// enrolled, and the tunnels, are no matter of the mesh.
#[inline(always)]
pub fn count_outbound(caller: &Caller, rule: Rule) {
    let pods = match caller.entry() {
        Some(info) if info.flags & flag::TUNNEL != 0 => return,
        // Of a socket in another netns it is the pod's count.
        Some(info) => info.netns_cookie,
        None if rule as u16 == Rule::NoEntry as u16 => 0,
        None => return,
    };
    count(if pods == 0 { caller.netns_cookie } else { pods }, rule);
}

/// Counts a verdict for the pod in that netns.
#[inline(always)]
pub fn count(netns_cookie: u64, rule: Rule) {
    let Some(counts) = VERDICTS.get_ptr_mut(netns_cookie).or_else(|| VERDICTS.get_ptr_mut(ELSEWHERE)) else {
        return;
    };
    add_one(counts, rule);
}

#[inline(always)]
fn add_one(counts: *mut Verdicts, rule: Rule) {
    const { assert!(MAX_RULES == 32, "the mask below") };
    let at = rule as u64;
    // One atomic step, since on the same processor a packet may interrupt a connect, and one process
    // another. The compiler knows that the number is small, and would leave out the mask by which the
    // verifier learns it.
    // SAFETY: `counts` points to a value of the map, whose memory the kernel frees only after this
    // program; the mask keeps the address within it, aligned.
    unsafe {
        asm!(
            "{at} &= 31",
            "{at} <<= 3",
            "{counts} += {at}",
            "lock *(u64 *)({counts} + 0) += {one}",
            at = inout(reg) at => _,
            counts = inout(reg) counts => _,
            one = in(reg) 1_u64,
        );
    }
}
