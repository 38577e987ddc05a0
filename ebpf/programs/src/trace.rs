//! What was decided, for whoever watches: a line in `trace_pipe` with the fixed tag "adit", and a record
//! in the ring buffer. Switched and filtered by the settings, at run time.

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED, is_v4},
    flows::{Destination, Flow},
    settings::Settings,
    trace::{Hook, Rule, TraceRecord},
};
use aya_ebpf::helpers::{bpf_get_current_cgroup_id, bpf_printk};

use crate::{address::same, maps};

const RULE_BYTES: usize = 52;

/// The rules' names by number, each ended by a zero: one flat array, since a table of pointers would need
/// relocations that no loader makes.
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

/// A connect from `own` (a pod's address, or zero).
#[inline(always)]
pub fn outbound(settings: &Settings, hook: Hook, rule: Rule, own: &Address, to: &Destination) {
    let record = TraceRecord {
        // SAFETY: a helper without arguments.
        cgroup_id: unsafe { bpf_get_current_cgroup_id() },
        local: *own,
        remote: to.address,
        local_port: 0,
        remote_port: to.port,
        hook: hook as u16,
        rule: rule as u16,
    };
    emit(settings, &record);
}

/// An arrival; `flow` is as its opener sees it, the record as the pod does.
#[inline(always)]
pub fn inbound(settings: &Settings, rule: Rule, flow: &Flow) {
    let record = TraceRecord {
        cgroup_id: 0,
        local: flow.remote,
        remote: flow.local,
        local_port: flow.remote_port,
        remote_port: flow.local_port,
        hook: Hook::SkLookup as u16,
        rule: rule as u16,
    };
    emit(settings, &record);
}

#[inline(always)]
fn emit(settings: &Settings, record: &TraceRecord) {
    let port = settings.debug_port;
    if port != 0 && u32::from(record.local_port) != port && u32::from(record.remote_port) != port {
        return;
    }
    let address = &settings.debug_address;
    if !same(address, &UNSPECIFIED) && !same(address, &record.local) && !same(address, &record.remote) {
        return;
    }
    // A full buffer loses records; its reader sees less, nobody waits.
    let _ = maps::TRACE.output::<TraceRecord>(record, 0);
    print(record);
}

/// The line: the verdict, and the interesting end (a connect's destination, an arrival's source is in the
/// record; its line shows the port that was dialled). Three values at most: more need Linux 5.16.
#[inline(always)]
fn print(record: &TraceRecord) {
    let Some(name) = RULE_NAMES.get(record.rule as usize) else { return };
    let name = name.as_ptr();
    let is_arrival = record.hook == Hook::SkLookup as u16;
    let port = if is_arrival { record.local_port } else { record.remote_port };
    // SAFETY: a helper that copies what it is given; %pI4 and %pI6 exist since Linux 5.13, before that it
    // refuses the line, and the address is left out.
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
