//! The maps. Names, keys and values: `adit_ebpf_common`, whose table of maps a test of the loader
//! compares with the compiled object.
//!
//! * [`facts`]: what the decision lists learn from them
//! * [`pods`]: which cgroup, netns and address is which pod's
//! * [`flows`]: connections on their way
//! * [`dns_clients`]: whom clients of the tunnel's DNS proxy asked
//! * [`verdicts`]: how often each rule decided
//! * [`whole`]: reading entries that others replace meanwhile
#![expect(unsafe_code, reason = "references into maps, and helpers that take pointers")]

use core::ptr::null_mut;

use adit_ebpf_common::{
    address::Address,
    enrolment::{CgroupInfo, NetnsInfo, PodRecord},
    exclusions::{DEVICE, ExcludedCidr, ExcludedId, ExcludedPorts, GROUP, Listed, USER},
    flows::{Flow, Original, SocketState, TunnelFlow},
    listeners::{AppListenerState, ListenerKey, MAX_APP_LISTENERS},
    sealed::Sealed,
    settings::Settings,
    trace::TraceRecord,
    verdicts::Verdicts,
};
use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE},
    btf_maps::SkStorage,
    helpers::{
        bpf_get_current_uid_gid,
        generated::{bpf_sk_storage_get, bpf_sock_hash_update},
    },
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuHashMap, RingBuf, SockHash, lpm_trie::Key},
};

use crate::context::{SockOps, Socket};

pub mod dns_clients;
pub mod facts;
pub mod flows;
pub mod pods;
pub mod verdicts;
pub mod whole;

/// A pod has at most 33, see `watcher/src/plan/desired.rs`: room for far more pods than a node can
/// have.
#[map(name = "cgroup_info_map")]
static CGROUP_INFO: HashMap<u64, Sealed<CgroupInfo>> = HashMap::with_max_entries(65536, 0);
#[map(name = "pod_by_addr")]
static POD_BY_ADDR: HashMap<Address, Sealed<PodRecord>> = HashMap::with_max_entries(4096, 0);
/// Twice as many as cgroups could be pods: a netns whose record finds no room is closed, not open.
#[map(name = "pod_by_netns")]
static POD_BY_NETNS: HashMap<u64, Sealed<NetnsInfo>> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);
#[map(name = "settings")]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);
#[map(name = "exclusion_ports")]
static EXCLUSION_PORTS: LpmTrie<ExcludedPorts, u8> = LpmTrie::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map(name = "exclusion_cidrs")]
static EXCLUSION_CIDRS: LpmTrie<ExcludedCidr, u8> = LpmTrie::with_max_entries(131_072, BPF_F_NO_PREALLOC);
#[map(name = "exclusion_ids")]
static EXCLUSION_IDS: HashMap<ExcludedId, u8> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map(name = "original_dst")]
static ORIGINAL_DST: LruHashMap<Flow, Sealed<Original>> = LruHashMap::with_max_entries(65536, 0);
#[map(name = "tunnel_flows")]
static TUNNEL_FLOWS: LruHashMap<Flow, Sealed<TunnelFlow>> = LruHashMap::with_max_entries(65536, 0);
#[map(name = "kubelet_flows")]
static KUBELET_FLOWS: LruHashMap<Flow, Sealed<TunnelFlow>> = LruHashMap::with_max_entries(4096, 0);
#[map(name = "pinned_connections")]
static PINNED_CONNECTIONS: HashMap<u64, u64> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);
#[map(name = "tunnel_listeners")]
static TUNNEL_LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(4096, 0);
#[map(name = "app_listeners")]
static APP_LISTENERS: HashMap<ListenerKey, u32> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map(name = "app_listener_state")]
static APP_LISTENER_STATE: HashMap<u64, AppListenerState> =
    HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);
/// As many as enrolled pods could be; what finds no room is counted with all others.
#[map(name = "verdicts")]
static VERDICTS: PerCpuHashMap<u64, Verdicts> = PerCpuHashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);
#[map(name = "trace")]
static TRACE: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);
#[btf_map(name = "socket_state")]
static SOCKET_STATE: SkStorage<SocketState> = SkStorage::new();

#[inline(always)]
pub fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

#[inline(always)]
fn port_listed(exclusion_id: u32, port: u16, direction: u16) -> Listed {
    if exclusion_id == 0 {
        return Listed::NO;
    }
    let key = ExcludedPorts::new(exclusion_id, direction, port);
    EXCLUSION_PORTS
        .get(Key::new(ExcludedPorts::BITS, key))
        .map_or(Listed::NO, |value| Listed::of_value(*value))
}

#[inline(always)]
fn address_listed(exclusion_id: u32, address: &Address) -> Listed {
    if exclusion_id == 0 {
        return Listed::NO;
    }
    let key = ExcludedCidr::new(exclusion_id, address);
    EXCLUSION_CIDRS
        .get(Key::new(ExcludedCidr::BITS, key))
        .map_or(Listed::NO, |value| Listed::of_value(*value))
}

/// Whether the list leaves the user or the group of the calling task alone, by its real ids.
#[inline(always)]
fn is_guarded_id(exclusion_id: u32) -> bool {
    let ids = bpf_get_current_uid_gid();
    let has = |kind, id| EXCLUSION_IDS.get_ptr(ExcludedId { exclusion_id, kind, id }).is_some();
    has(USER, ids as u32) || has(GROUP, (ids >> 32) as u32)
}

#[inline(always)]
fn is_excluded_device(exclusion_id: u32, device: u32) -> bool {
    EXCLUSION_IDS.get_ptr(ExcludedId { exclusion_id, kind: DEVICE, id: device }).is_some()
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
