//! The maps. Names, keys and values: `adit_ebpf_common`, whose table of maps a test of the loader
//! compares with the compiled object. What the decision lists learn from them: [`facts`].
#![expect(unsafe_code, reason = "references into maps, and helpers that take pointers")]

use core::{arch::asm, ptr::null_mut};

use adit_ebpf_common::{
    address::Address,
    enrolment::{CgroupInfo, NetnsInfo, PodRecord, flag},
    exclusions::{ExcludedCidr, ExcludedPorts},
    flows::{ACK_LIFETIME, Destination, Flow, SYN_LIFETIME, SocketState, TunnelFlow},
    listeners::{AppListenerState, ListenerKey, MAX_APP_LISTENERS},
    settings::Settings,
    trace::TraceRecord,
};
use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE},
    btf_maps::SkStorage,
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id,
        generated::{bpf_ktime_get_ns, bpf_sk_storage_get, bpf_sock_hash_update},
    },
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, RingBuf, SockHash, lpm_trie::Key},
};

use crate::context::{Packet, SockOps, Socket};

pub mod dns_clients;
pub mod facts;

/// A pod has at most 33, see `watcher/src/plan/desired.rs`: room for far more pods than a node can
/// have.
#[map(name = "cgroup_info_map")]
static CGROUP_INFO: HashMap<u64, CgroupInfo> = HashMap::with_max_entries(65536, 0);
#[map(name = "pod_by_addr")]
static POD_BY_ADDR: HashMap<Address, PodRecord> = HashMap::with_max_entries(4096, 0);
/// Twice as many as cgroups could be pods: a netns whose record finds no room is closed, not open.
#[map(name = "pod_by_netns")]
static POD_BY_NETNS: HashMap<u64, NetnsInfo> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);
#[map(name = "settings")]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);
#[map(name = "exclusion_ports")]
static EXCLUSION_PORTS: LpmTrie<ExcludedPorts, u8> = LpmTrie::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map(name = "exclusion_cidrs")]
static EXCLUSION_CIDRS: LpmTrie<ExcludedCidr, u8> = LpmTrie::with_max_entries(131_072, BPF_F_NO_PREALLOC);
#[map(name = "original_dst")]
static ORIGINAL_DST: LruHashMap<Flow, Destination> = LruHashMap::with_max_entries(65536, 0);
#[map(name = "tunnel_flows")]
static TUNNEL_FLOWS: LruHashMap<Flow, TunnelFlow> = LruHashMap::with_max_entries(65536, 0);
#[map(name = "pinned_connections")]
static PINNED_CONNECTIONS: HashMap<u64, u64> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);
#[map(name = "tunnel_listeners")]
static TUNNEL_LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(4096, 0);
#[map(name = "app_listeners")]
static APP_LISTENERS: HashMap<ListenerKey, u32> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map(name = "app_listener_state")]
static APP_LISTENER_STATE: HashMap<u64, AppListenerState> =
    HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);
#[map(name = "trace")]
static TRACE: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);
#[btf_map(name = "socket_state")]
static SOCKET_STATE: SkStorage<SocketState> = SkStorage::new();

/// How deep a pod's cgroup may lie. Kubernetes in Kind is at ten.
const DEEPEST_CGROUP: i32 = 24;

#[inline(always)]
pub fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

/// The entry of a cgroup, with the key by which it was found.
#[derive(Clone, Copy)]
pub struct Entry {
    pub info: &'static CgroupInfo,
    key: u64,
}

impl Entry {
    #[inline(always)]
    fn of(key: u64) -> Option<Self> {
        // SAFETY: the watcher replaces entries whole, and the kernel frees a replaced one only after
        // this program. It may reuse its memory for another entry before: whoever acts on what he
        // read asks `is_current` first.
        unsafe { CGROUP_INFO.get(key) }.map(|info| Self { info, key })
    }

    /// Whether all that was read of the entry so far is this cgroup's.
    #[inline(always)]
    pub fn is_current(&self) -> bool {
        // SAFETY: no instruction; the compiler moves no read of memory across it. The field is
        // aligned, and lives as long as the map.
        unsafe {
            asm!("", options(nostack, preserves_flags));
            (&raw const self.info.cgroup_id).read_volatile() == self.key
        }
    }
}

/// The entry of cgroup `own`, else that of its nearest ancestor. So a new container of a known pod
/// needs no entry of its own, and none can be late. `ancestor` gives the ancestor at a level, 0 below
/// the cgroup's own.
#[inline(always)]
fn nearest(own: u64, ancestor: impl Fn(i32) -> u64) -> Option<Entry> {
    if let Some(entry) = Entry::of(own) {
        return Some(entry);
    }
    let mut level = DEEPEST_CGROUP;
    while level > 0 {
        let id = ancestor(level);
        if id != 0
            && let Some(entry) = Entry::of(id)
        {
            return Some(entry);
        }
        level -= 1;
    }
    None
}

/// What is known of the calling task's cgroup.
#[inline(always)]
pub fn caller() -> Option<Entry> {
    // SAFETY: the helper takes no pointers.
    let own = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: the helper takes no pointers.
    nearest(own, |level| unsafe { bpf_get_current_ancestor_cgroup_id(level) })
}

/// What is known of the cgroup of the socket that a packet is for.
#[inline(always)]
pub fn receiver(packet: &Packet) -> Option<Entry> {
    nearest(packet.cgroup_id(), |level| packet.ancestor_cgroup_id(level))
}

/// Whether a tunnel serves the pod of exactly this cgroup.
#[inline(always)]
pub fn is_ready(cgroup_id: u64) -> bool {
    Entry::of(cgroup_id).is_some_and(|entry| entry.info.flags & flag::READY != 0)
}

/// Gives a cgroup its entry; whether there was room.
#[inline(always)]
pub fn set_cgroup(id: u64, info: &CgroupInfo) -> bool {
    CGROUP_INFO.insert(id, info, 0).is_ok()
}

#[inline(always)]
pub fn pod(address: &Address) -> Option<&'static PodRecord> {
    // SAFETY: as in `Entry`; of a record that became another one's, the cookie is that of a netns in
    // which nobody is who asks.
    unsafe { POD_BY_ADDR.get(address) }
}

/// A copy, of a record that was still this netns's when all of it was read. A replaced record has a
/// successor, which the second look finds.
#[inline(always)]
fn netns(cookie: u64) -> Option<NetnsInfo> {
    let mut looks = 0;
    while looks < 2 {
        // SAFETY: as in `Entry`. The copy is made before the key is read again.
        unsafe {
            let found = POD_BY_NETNS.get_ptr(cookie)?;
            let copy = found.read_volatile();
            if (&raw const (*found).netns_cookie).read_volatile() == cookie {
                return Some(copy);
            }
        }
        looks += 1;
    }
    None
}

#[inline(always)]
fn is_port_excluded(exclusion_id: u32, port: u16, direction: u16) -> bool {
    let key = ExcludedPorts::new(exclusion_id, direction, port);
    exclusion_id != 0 && EXCLUSION_PORTS.get(Key::new(ExcludedPorts::BITS, key)).is_some()
}

#[inline(always)]
fn is_cidr_excluded(exclusion_id: u32, address: &Address) -> bool {
    let key = ExcludedCidr::new(exclusion_id, address);
    exclusion_id != 0 && EXCLUSION_CIDRS.get(Key::new(ExcludedCidr::BITS, key)).is_some()
}

/// The cgroup of the pod that is known to have that netns; 0: none is.
#[inline(always)]
pub fn cgroup_in(netns_cookie: u64) -> u64 {
    netns(netns_cookie).map_or(0, |netns| netns.cgroup_id)
}

/// The entry of the pod that is known to have that netns.
#[inline(always)]
fn pod_in(netns_cookie: u64) -> Option<Entry> {
    Entry::of(netns(netns_cookie)?.cgroup_id)
}

/// Publishes where the opener of `flow` wanted to go. If that fails, the tunnel gets no answer and
/// refuses the connection.
#[inline(always)]
pub fn publish_original(flow: &Flow, original: &Destination) {
    let _ = ORIGINAL_DST.insert(flow, original, 0);
}

#[inline(always)]
pub fn published_original(flow: &Flow) -> Option<Destination> {
    // SAFETY: one writer per key, the socket that has this flow; the value is copied at once.
    unsafe { ORIGINAL_DST.get(flow) }.copied()
}

#[inline(always)]
pub fn withdraw_original(flow: &Flow) {
    let _ = ORIGINAL_DST.remove(flow);
}

#[inline(always)]
pub fn record_tunnel_flow(flow: &Flow, netns_cookie: u64) -> Result<(), i32> {
    TUNNEL_FLOWS.insert(flow, TunnelFlow { netns_cookie, valid_until: now() + SYN_LIFETIME }, 0)
}

/// The tunnel's end of `flow` is established.
#[inline(always)]
pub fn shorten_tunnel_flow(flow: &Flow) {
    let Some(found) = TUNNEL_FLOWS.get_ptr_mut(flow) else { return };
    // SAFETY: `found` points to an entry of the map, which the kernel frees or reuses only after
    // this program; its only writer is the socket that has this flow.
    unsafe { (*found).valid_until = now() + ACK_LIFETIME };
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
    // SAFETY: `count` points to an entry of the map, which the kernel frees only after this
    // program; values of 8 bytes are aligned, and only these programs change them, always by this
    // instruction.
    unsafe { asm!("lock *(u64 *)({count} + 0) += {number}", count = in(reg) count, number = in(reg) number) };
    true
}

/// Registers the listening socket of `ops`. The latest wins, so that a successor takes over by
/// listening.
#[inline(always)]
pub fn register_tunnel_listener(ops: &SockOps, mut key: ListenerKey) {
    let map = (&raw const TUNNEL_LISTENERS).cast_mut().cast();
    // SAFETY: `ops` is the context of the running sock_ops program, whose type may call this
    // helper; the key is of the map's type and lives on the stack.
    let _ = unsafe { bpf_sock_hash_update(ops.as_ptr(), map, (&raw mut key).cast(), 0) };
}

/// Records that an application listens at `key`, if the watcher wants to know that of its netns. If
/// there is no room, not every listener of the netns is known, and no port is refused there.
#[inline(always)]
pub fn record_app_listener(key: &ListenerKey) {
    let Some(state) = APP_LISTENER_STATE.get_ptr_mut(key.netns_cookie) else { return };
    if APP_LISTENERS.get_ptr(key).is_some() {
        return;
    }
    // SAFETY: `state` points to an entry of the map, which the kernel frees only after the programs
    // that saw it; its fields are aligned. Two programs that count at once may count one.
    unsafe {
        let count = (&raw const (*state).count).read_volatile();
        if count < MAX_APP_LISTENERS && APP_LISTENERS.insert(key, 1, 0).is_ok() {
            (&raw mut (*state).count).write_volatile(count + 1);
        } else {
            (&raw mut (*state).complete).write_volatile(0);
        }
    }
}

/// Writes a record for whoever watches. A full buffer loses records; nobody waits.
#[inline(always)]
pub fn trace(record: &TraceRecord) {
    let _ = TRACE.output::<TraceRecord>(record, 0);
}

/// What the programs remember of `socket`, which may be null.
#[inline(always)]
pub fn state(socket: Socket) -> Option<&'static mut SocketState> {
    get_state(socket, 0)
}

/// What the programs remember of `socket`, all zero at first. `None` when memory is short.
#[inline(always)]
pub fn state_or_new(socket: Socket) -> Option<&'static mut SocketState> {
    get_state(socket, u64::from(BPF_SK_STORAGE_GET_F_CREATE))
}

#[inline(always)]
fn get_state(socket: Socket, flags: u64) -> Option<&'static mut SocketState> {
    if socket.is_null() {
        return None;
    }
    let map = (&raw const SOCKET_STATE).cast_mut().cast();
    // SAFETY: the kernel returns null, or a value of the map's type that lives as long as the
    // socket, which the context holds until the program returns. Programs about one TCP socket run
    // one at a time, under its lock, and each has only one such reference at a time. Of UDP only
    // sendmsg, recvmsg and connect have states: they write and read whole fields, and `redirected`
    // finds out when these do not belong together.
    unsafe {
        bpf_sk_storage_get(map, socket.as_ptr().cast(), null_mut(), flags).cast::<SocketState>().as_mut()
    }
}

/// A copy of the state of a socket that connect or sendmsg redirected.
#[inline(always)]
pub fn redirected(socket: Socket) -> Option<SocketState> {
    let state: *const SocketState = state(socket)?;
    // SAFETY: the reference is valid, see `get_state`. Volatile, since another thread that uses the
    // socket may write at the same time: what was read is what is looked at.
    let state = unsafe { state.read_volatile() };
    (state.original.is_somewhere() && state.redirect.is_somewhere()).then_some(state)
}

/// Forgets what an earlier connect on `socket` recorded. The rest of the state stays: on a socket
/// of the tunnel, whose cgroup may be below the pods' cgroup, it holds the netns.
#[inline(always)]
pub fn forget_redirect(socket: Socket) {
    if let Some(state) = state(socket) {
        state.original.port = 0;
        state.redirect.port = 0;
    }
}
