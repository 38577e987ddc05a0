//! bind(2) of a pod's application to a port that is the tunnel's in its netns: the watcher is told,
//! so that somebody learns why the application, or the tunnel, cannot have it.
//!
//! Before the call has its effect: that the port is taken shows nowhere else. Nothing is refused.
#![expect(unsafe_code, reason = "helpers without arguments")]

use adit_ebpf_common::{
    enrolment::flag,
    lifecycle::Kind,
    reserved_ports::{ReservedBind, ReservedPort},
};
use aya_ebpf::{
    helpers::{bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_ns},
    macros::{cgroup_sock_addr, map},
    maps::LruHashMap,
    programs::SockAddrContext,
};

use crate::{
    context::{SockAddr, verdict::ALLOW},
    lifecycle,
    maps::{self, pods},
};

/// A process that tries again and again is reported as often as this.
const QUIET_NS: u64 = 1_000_000_000;

#[map(name = "reserved_binds")]
static RESERVED_BINDS: LruHashMap<ReservedPort, ReservedBind> = LruHashMap::with_max_entries(4096, 0);

#[cgroup_sock_addr(bind4)]
pub fn adit_bind4(ctx: SockAddrContext) -> i32 {
    report(&SockAddr::new(ctx));
    ALLOW
}

#[cgroup_sock_addr(bind6)]
pub fn adit_bind6(ctx: SockAddrContext) -> i32 {
    report(&SockAddr::new(ctx));
    ALLOW
}

/// The first rule that applies wins:
///
/// 1. to another port than the tunnel's: nothing
/// 2. in a netns that is not known as an enrolled pod's: nothing
/// 3. a tunnel itself: nothing
/// 4. otherwise it is noted, and reported unless it was a moment ago
#[inline(always)]
fn report(ctx: &SockAddr) {
    let Some(settings) = maps::settings() else { return };
    let port = ctx.port();
    let is_udp = ctx.is_udp();
    let is_wanted = if is_udp {
        settings.is_of_dns(port)
    } else {
        ctx.is_tcp() && (settings.is_reserved(port) || settings.is_of_dns(port))
    };
    if !is_wanted {
        return;
    }
    let netns_cookie = ctx.netns_cookie();
    let Some(netns) = pods::netns(netns_cookie) else { return };
    if netns.flags & flag::IN_MESH == 0 {
        return;
    }
    if let Some(caller) = pods::caller() {
        let mut entry = pods::CLOSED;
        caller.read(&mut entry);
        if entry.unchecked().flags & flag::TUNNEL != 0 {
            return;
        }
    }
    let key = ReservedPort { netns_cookie, port, is_udp: u16::from(is_udp), pad: 0 };
    // SAFETY: helpers without arguments, which this program type has (Linux 5.7).
    let (at, pid) = unsafe { (bpf_ktime_get_ns(), bpf_get_current_pid_tgid() >> 32) };
    let name = bpf_get_current_comm().unwrap_or_default();
    // SAFETY: an aligned number, read at once; the kernel frees it only after this program. If two
    // CPUs race, both report.
    let last = unsafe { RESERVED_BINDS.get(key) }.map_or(0, |last| last.at);
    let _ = RESERVED_BINDS.insert(key, ReservedBind { at, pid: pid as u32, pad: 0, name }, 0);
    if last == 0 || at.wrapping_sub(last) >= QUIET_NS {
        lifecycle::report_process(Kind::WantsPort, netns.cgroup_id);
    }
}
