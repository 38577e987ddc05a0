//! Reports each verdict: a line in `trace_pipe` with the fixed tag "adit", and a record in the ring
//! buffer `trace`. The settings switch and filter this at run time; what nobody watches takes no
//! room in the buffer.

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED, is_v4, same},
    enrolment::CgroupInfo,
    flows::{Destination, Flow},
    settings::{Settings, trace_filter},
    trace::{Hook, Rule, TraceRecord, watched_cgroup, watched_netns},
};
use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    helpers::{bpf_get_current_cgroup_id, bpf_printk},
    macros::map,
    maps::{HashMap, LpmTrie, lpm_trie::Key},
};

use crate::maps;

#[map(name = "trace_watched")]
static WATCHED: HashMap<Address, u32> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map(name = "trace_left_out")]
static LEFT_OUT: LpmTrie<Address, u8> = LpmTrie::with_max_entries(1024, BPF_F_NO_PREALLOC);

const RULE_BYTES: usize = 52;

/// The rules' names by number, each ended by a zero. One flat array, since a table of pointers
/// would need relocations that no loader makes.
static RULE_NAMES: [[u8; RULE_BYTES]; Rule::ALL.len()] = {
    let mut names = [[0; RULE_BYTES]; Rule::ALL.len()];
    let mut number = 0;
    while number < Rule::ALL.len() {
        let name = Rule::ALL[number].as_str().as_bytes();
        let mut i = 0;
        while i < name.len() {
            names[number][i] = name[i];
            i += 1;
        }
        assert!(i < RULE_BYTES, "no room for the zero");
        number += 1;
    }
    names
};

/// A connect or a datagram of a caller with this entry.
#[inline(always)]
pub fn outbound(settings: &Settings, hook: Hook, rule: Rule, info: Option<&CgroupInfo>, to: &Destination) {
    let record = TraceRecord {
        cgroup_id: cgroup_id(),
        local: own_address(info, &to.address),
        remote: to.address,
        local_port: 0,
        remote_port: to.port,
        hook: hook as u16,
        rule: rule as u16,
    };
    emit(settings, &record, info.map_or(0, |info| info.netns_cookie));
}

/// An arrival at the pod of `cgroup_id`; `flow` is as its opener sees it, the record as the pod
/// does.
#[inline(always)]
pub fn inbound(settings: &Settings, rule: Rule, flow: &Flow, cgroup_id: u64) {
    let record = TraceRecord {
        cgroup_id,
        local: flow.remote,
        remote: flow.local,
        local_port: flow.remote_port,
        remote_port: flow.local_port,
        hook: Hook::SkLookup as u16,
        rule: rule as u16,
    };
    emit(settings, &record, 0);
}

/// The cgroup of the calling task.
#[inline(always)]
#[expect(unsafe_code, reason = "aya calls all helpers unsafe")]
fn cgroup_id() -> u64 {
    // SAFETY: a helper without arguments, which every program type that calls this has.
    unsafe { bpf_get_current_cgroup_id() }
}

/// The pod's address of the family of `destination`; all zero if it is not known.
#[inline(always)]
fn own_address(info: Option<&CgroupInfo>, destination: &Address) -> Address {
    match info {
        Some(info) if is_v4(destination) => info.v4,
        Some(info) => info.v6,
        None => UNSPECIFIED,
    }
}

#[inline(always)]
fn emit(settings: &Settings, record: &TraceRecord, netns_cookie: u64) {
    let port = settings.debug_port;
    if port != 0 && u32::from(record.local_port) != port && u32::from(record.remote_port) != port {
        return;
    }
    let address = &settings.debug_address;
    if !same(address, &UNSPECIFIED) && !same(address, &record.local) && !same(address, &record.remote) {
        return;
    }
    if settings.trace_filter & trace_filter::WATCHED != 0 && !is_watched(record, netns_cookie) {
        return;
    }
    if settings.trace_filter & trace_filter::LEFT_OUT != 0
        && (is_left_out(&record.local) || is_left_out(&record.remote))
    {
        return;
    }
    maps::trace(record);
    print(record);
}

/// Whether somebody watches an end of the connection, the caller's cgroup, or its pod's netns.
#[inline(always)]
fn is_watched(record: &TraceRecord, netns_cookie: u64) -> bool {
    has(&watched_cgroup(record.cgroup_id))
        || netns_cookie != 0 && has(&watched_netns(netns_cookie))
        || has(&record.local)
        || has(&record.remote)
}

#[inline(always)]
#[expect(unsafe_code, reason = "a reference into a map")]
fn has(key: &Address) -> bool {
    // SAFETY: only whether there is one is asked.
    unsafe { WATCHED.get(key) }.is_some()
}

#[inline(always)]
fn is_left_out(address: &Address) -> bool {
    LEFT_OUT.get(Key::new(128, *address)).is_some()
}

/// Prints the rule, and for a connect its destination, for an arrival its source and the port that
/// it dialled. Three values at most: more need Linux 5.16.
#[inline(always)]
#[expect(unsafe_code, reason = "bpf_printk takes pointers")]
fn print(record: &TraceRecord) {
    let Some(name) = RULE_NAMES.get(record.rule as usize) else { return };
    let name = name.as_ptr();
    let is_arrival = record.hook == Hook::SkLookup as u16;
    let port = if is_arrival { record.local_port } else { record.remote_port };
    // SAFETY: the helper reads the address and the name, which outlive the call: 4 bytes from the
    // twelfth on or 16, and up to the zero that ends every name. %pI4 and %pI6 exist since Linux
    // 5.13; before that it refuses the line, and the address is left out.
    unsafe {
        let printed = match (is_arrival, is_v4(&record.remote)) {
            (false, true) => {
                bpf_printk!(c"adit: connect to %pI4:%u: %s", record.remote.as_ptr().add(12), port, name)
            }
            (false, false) => {
                bpf_printk!(c"adit: connect to [%pI6]:%u: %s", record.remote.as_ptr(), port, name)
            }
            (true, true) => {
                bpf_printk!(
                    c"adit: arrival from %pI4 at port %u: %s",
                    record.remote.as_ptr().add(12),
                    port,
                    name
                )
            }
            (true, false) => {
                bpf_printk!(c"adit: arrival from %pI6 at port %u: %s", record.remote.as_ptr(), port, name)
            }
        };
        if printed < 0 {
            bpf_printk!(c"adit: port %u: %s", port, name);
        }
    }
}
