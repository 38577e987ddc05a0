//! Reports cgroups that come and go and processes in them, and closes expected pods as their cgroup
//! is made: the entry is in the map before `mkdir(2)` returns, so no process can ever have been in
//! the cgroup without it. When the last process of a closed pod goes, they forget its netns: so
//! they close both ways what comes next there, whichever netns it is in.
//!
//! Raw tracepoints, since these need no tracefs, which a container seldom has. Events that are not
//! below the scope's cgroup are dropped here, before they wake anybody.
#![expect(
    unsafe_code,
    reason = "kernel memory behind a tracepoint's arguments, and helpers that take pointers"
)]

use adit_ebpf_common::{
    enrolment::CgroupInfo,
    lifecycle::{Kind, NAME_BYTES, Name, PATH_BYTES, PREFIX_BYTES, PathEvent, ProcessEvent, Scope},
    sealed::Sealed,
};
use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    helpers::{
        bpf_get_current_cgroup_id, bpf_ktime_get_ns, bpf_probe_read_kernel,
        generated::bpf_probe_read_kernel_str,
    },
    macros::{map, raw_tracepoint},
    maps::{Array, CgroupArray, HashMap, LruHashMap, PerCpuArray, RingBuf},
    programs::RawTracePointContext,
};

use crate::maps::{
    pods,
    whole::{self, Look},
};

/// The watcher looks again at a pod that is not in order within this time.
const QUIET_NS: u64 = 5_000_000;

#[map(name = "lifecycle")]
static LIFECYCLE: RingBuf = RingBuf::with_byte_size(1024 * 1024, 0);
#[map(name = "lifecycle_scope")]
static SCOPE: Array<Scope> = Array::with_max_entries(1, 0);
#[map(name = "lifecycle_base")]
static BASE: CgroupArray = CgroupArray::with_max_entries(1, 0);
#[map(name = "lifecycle_lost")]
static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
/// An event is too long for the stack. Each program has its own entry, by its [`Kind`]: where
/// tracepoints can be preempted, one program may interrupt another on the same CPU. None interrupts
/// itself: kernels of that kind skip a program of a raw tracepoint that runs already on this CPU,
/// the others run tracepoints with preemption off.
#[map(name = "lifecycle_event")]
static EVENT: PerCpuArray<PathEvent> = PerCpuArray::with_max_entries(5, 0);
#[map(name = "lifecycle_execs")]
static EXECS: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);
#[map(name = "expected_pods")]
static EXPECTED: HashMap<Name, Sealed<CgroupInfo>> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

// The first arguments of all four tracepoints of cgroups: `struct cgroup *cgroup, const char
// *path`.

#[raw_tracepoint(tracepoint = "cgroup_mkdir")]
pub fn adit_cgroup_made(context: RawTracePointContext) -> i32 {
    report_path(&context, Kind::Made)
}

#[raw_tracepoint(tracepoint = "cgroup_rmdir")]
pub fn adit_cgroup_removed(context: RawTracePointContext) -> i32 {
    report_path(&context, Kind::Removed)
}

#[raw_tracepoint(tracepoint = "cgroup_attach_task")]
pub fn adit_cgroup_attach(context: RawTracePointContext) -> i32 {
    report_path(&context, Kind::Joined)
}

/// Its first process came, or its last one went. With sched_process_exit the watcher would have to
/// count processes.
#[raw_tracepoint(tracepoint = "cgroup_notify_populated")]
pub fn adit_cgroup_populated(context: RawTracePointContext) -> i32 {
    report_path(&context, Kind::Populated)
}

#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn adit_exec(_context: RawTracePointContext) -> i32 {
    report_exec();
    0
}

/// Reports an exec. The first rule that applies wins:
///
/// 1. not below the base: nothing
/// 2. in a cgroup of a pod that a tunnel serves: nothing, it has all that it needs
/// 3. one of this cgroup was reported a moment ago: nothing, the watcher looks at it again by
///    itself
/// 4. otherwise: an event
///
/// So a storm of processes costs what these look-ups cost, and wakes nobody.
#[inline(always)]
fn report_exec() {
    if BASE.current_task_under_cgroup(0) != Ok(true) {
        return;
    }
    // SAFETY: helpers without arguments, which this program type has.
    let (cgroup_id, now) = unsafe { (bpf_get_current_cgroup_id(), bpf_ktime_get_ns()) };
    if pods::is_ready(cgroup_id) {
        return;
    }
    // SAFETY: an aligned number, read at once; the kernel frees it only after this program. If two
    // CPUs race, both report.
    if let Some(last) = unsafe { EXECS.get(cgroup_id) }
        && now.wrapping_sub(*last) < QUIET_NS
    {
        return;
    }
    let _ = EXECS.insert(cgroup_id, now, 0);
    report_process(Kind::Executed, cgroup_id);
}

/// Tells the watcher of a process of this cgroup.
#[inline(always)]
pub fn report_process(kind: Kind, cgroup_id: u64) {
    let event = ProcessEvent { kind: kind as u32, pad: 0, cgroup_id };
    if LIFECYCLE.output::<ProcessEvent>(event, 0).is_err() {
        count_lost();
    }
}

#[inline(always)]
fn report_path(context: &RawTracePointContext, kind: Kind) -> i32 {
    let (Some(scope), Some(event)) = (SCOPE.get(0), EVENT.get_ptr_mut(kind as u32)) else { return 0 };
    // SAFETY: this CPU's own entry: no other program uses it before this one returns, see `EVENT`.
    let event = unsafe { &mut *event };
    let path: *const u8 = context.arg(1);
    // SAFETY: the destination has the length that is passed, and the helper checks the source.
    let read =
        unsafe { bpf_probe_read_kernel_str(event.path.as_mut_ptr().cast(), PATH_BYTES as u32, path.cast()) };
    if read < 0 || !begins_with(&event.path, scope) {
        return 0;
    }
    event.kind = kind as u32;
    event.closed = 0;
    event.cgroup_id = 0;
    if let Some(node) = node(context, scope) {
        event.cgroup_id = read_at::<u64>(node, scope.id_offset).unwrap_or(0);
        let closed = match kind {
            Kind::Made => close_if_expected(node, scope, event.cgroup_id),
            // The third argument is the new number of processes, as 0 or 1.
            Kind::Populated => context.arg::<u64>(2) as u32 == 0 && pods::forget_netns(event.cgroup_id),
            _ => false,
        };
        event.closed = u32::from(closed);
    }
    if LIFECYCLE.output::<PathEvent>(&*event, 0).is_err() {
        count_lost();
    }
    0
}

#[inline(always)]
fn begins_with(path: &[u8; PATH_BYTES], scope: &Scope) -> bool {
    let mut i = 0;
    while i < PREFIX_BYTES {
        if i as u32 >= scope.prefix_len {
            return true;
        }
        if path[i] != scope.prefix[i] {
            return false;
        }
        i += 1;
    }
    false
}

/// The `struct kernfs_node` of the cgroup.
#[inline(always)]
fn node(context: &RawTracePointContext, scope: &Scope) -> Option<*const u8> {
    if scope.kn_offset == 0 {
        return None;
    }
    let cgroup: *const u8 = context.arg(0);
    read_at::<*const u8>(cgroup, scope.kn_offset)
}

#[inline(always)]
fn read_at<T: Copy>(base: *const u8, offset: u32) -> Option<T> {
    // SAFETY: the helper checks the address and copies; the callers read numbers and pointers,
    // which any bytes are.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset as usize).cast::<T>()) }.ok()
}

/// Gives the new cgroup its entry, if a pod of its name is expected.
#[inline(always)]
fn close_if_expected(node: *const u8, scope: &Scope, cgroup_id: u64) -> bool {
    let Some(name_at) = read_at::<*const u8>(node, scope.name_offset) else { return false };
    let mut name: Name = [0; NAME_BYTES / size_of::<u64>()];
    // SAFETY: as in `report_path`. What is not read stays zero, as in the map's keys.
    let read =
        unsafe { bpf_probe_read_kernel_str(name.as_mut_ptr().cast(), NAME_BYTES as u32, name_at.cast()) };
    if read <= 0 || cgroup_id == 0 {
        return false;
    }
    let name = whole::in_memory(&name);
    let mut expected = pods::CLOSED;
    match whole::look(name, &mut expected, || EXPECTED.get_ptr(name)) {
        Look::Whole => {}
        // Which pod it is, the watcher finds out; it is one that is to begin closed.
        Look::Torn => expected = pods::CLOSED,
        Look::Missing => return false,
    }
    pods::set_cgroup(cgroup_id, &mut expected)
}

#[inline(always)]
fn count_lost() {
    if let Some(lost) = LOST.get_ptr_mut(0) {
        // SAFETY: this CPU's own counter, which no other program changes before this one returns.
        unsafe { *lost += 1 };
    }
}
