//! The maps, and the questions that the programs ask them. Keys and values: `adit-ebpf-common`.

use core::{arch::asm, ptr::null_mut};

use adit_ebpf_common::{
    address::Address,
    flows::{Destination, Flow, SocketState},
    pods::{CgroupInfo, ExcludedCidr, ExcludedPort, ListenerKey, PodRecord, flag},
    settings::Settings,
};
use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_ops},
    btf_maps::SkStorage,
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_sk_release,
        generated::{bpf_map_lookup_elem, bpf_sk_storage_get, bpf_sock_hash_update},
    },
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, RingBuf, SockHash, lpm_trie::Key},
};

#[map(name = "cgroup_info_map")]
static CGROUP_INFO: HashMap<u64, CgroupInfo> = HashMap::with_max_entries(16384, 0);
#[map(name = "pod_by_addr")]
static POD_BY_ADDR: HashMap<Address, PodRecord> = HashMap::with_max_entries(4096, 0);
#[map(name = "settings")]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);
#[map(name = "excluded_ports")]
static EXCLUDED_PORTS: HashMap<ExcludedPort, u8> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map(name = "excluded_cidrs")]
static EXCLUDED_CIDRS: LpmTrie<ExcludedCidr, u8> = LpmTrie::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map(name = "original_dst")]
static ORIGINAL_DST: LruHashMap<Flow, Destination> = LruHashMap::with_max_entries(65536, 0);
#[map(name = "tunnel_flows")]
static TUNNEL_FLOWS: LruHashMap<Flow, u64> = LruHashMap::with_max_entries(65536, 0);
#[map(name = "deliveries")]
static DELIVERIES: HashMap<u64, u64> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);
#[map(name = "listeners")]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(4096, 0);
#[map(name = "listened")]
static LISTENED: HashMap<ListenerKey, u32> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map(name = "trace")]
pub static TRACE: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);
#[btf_map(name = "socket_state")]
static SOCKET_STATE: SkStorage<SocketState> = SkStorage::new();

/// How deep a pod's cgroup may lie. Kubernetes in Kind is at ten.
const DEEPEST_CGROUP: i32 = 24;

#[inline(always)]
pub fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

/// What is known of the calling task's cgroup: its own entry, else its nearest ancestor's. So a new
/// container of a known pod needs no entry of its own, and none can be late.
#[inline(always)]
pub fn caller() -> Option<&'static CgroupInfo> {
    // SAFETY: entries are replaced whole by the watcher; a reader may see an old one, never half of one
    // whose mixture matters, since addresses change only together with the cgroup id.
    unsafe {
        if let Some(info) = CGROUP_INFO.get(bpf_get_current_cgroup_id()) {
            return Some(info);
        }
        let mut level = DEEPEST_CGROUP;
        while level > 0 {
            // 0 below the task's own level.
            let id = bpf_get_current_ancestor_cgroup_id(level);
            if id != 0
                && let Some(info) = CGROUP_INFO.get(id)
            {
                return Some(info);
            }
            level -= 1;
        }
    }
    None
}

/// Whether a tunnel serves the pod of exactly this cgroup.
#[inline(always)]
pub fn is_ready(cgroup_id: u64) -> bool {
    // SAFETY: as in `caller`.
    unsafe { CGROUP_INFO.get(cgroup_id) }.is_some_and(|info| info.flags & flag::READY != 0)
}

/// Gives a cgroup its entry; whether there was room.
#[inline(always)]
pub fn set_cgroup(id: u64, info: &CgroupInfo) -> bool {
    CGROUP_INFO.insert(id, info, 0).is_ok()
}

#[inline(always)]
pub fn pod(address: &Address) -> Option<&'static PodRecord> {
    // SAFETY: as in `caller`.
    unsafe { POD_BY_ADDR.get(address) }
}

#[inline(always)]
pub fn is_port_excluded(policy_id: u32, port: u16, direction: u16) -> bool {
    policy_id != 0 && EXCLUDED_PORTS.get_ptr(ExcludedPort { policy_id, port, direction }).is_some()
}

#[inline(always)]
pub fn is_cidr_excluded(policy_id: u32, address: &Address) -> bool {
    let data = ExcludedCidr { policy_id_be: policy_id.to_be_bytes(), address: *address };
    policy_id != 0 && EXCLUDED_CIDRS.get(Key::new(160, data)).is_some()
}

/// Publishes where the opener of `flow` wanted to go.
#[inline(always)]
pub fn publish_original(flow: &Flow, original: &Destination) {
    // Failing leaves the tunnel without an answer: it refuses the connection.
    let _ = ORIGINAL_DST.insert(flow, original, 0);
}

#[inline(always)]
pub fn published_original(flow: &Flow) -> Option<Destination> {
    // SAFETY: one writer per key: the socket that has this flow.
    unsafe { ORIGINAL_DST.get(flow) }.copied()
}

#[inline(always)]
pub fn withdraw_original(flow: &Flow) {
    let _ = ORIGINAL_DST.remove(flow);
}

#[inline(always)]
pub fn note_tunnel_flow(flow: &Flow, netns_cookie: u64) -> Result<(), i32> {
    TUNNEL_FLOWS.insert(flow, netns_cookie, 0)
}

/// The netns from which the tunnel opened `flow`.
#[inline(always)]
pub fn tunnel_flow(flow: &Flow) -> Option<u64> {
    // SAFETY: as in `published_original`.
    unsafe { TUNNEL_FLOWS.get(flow) }.copied()
}

#[inline(always)]
pub fn forget_tunnel_flow(flow: &Flow) {
    let _ = TUNNEL_FLOWS.remove(flow);
}

/// Counts a connection of the tunnel in that netns. Whether it could.
#[inline(always)]
pub fn count_delivery(netns_cookie: u64) -> bool {
    if DELIVERIES.get_ptr_mut(netns_cookie).is_none() {
        // Another processor's may be there by now.
        let _ = DELIVERIES.insert(netns_cookie, 0, u64::from(BPF_NOEXIST));
    }
    add_deliveries(netns_cookie, 1)
}

#[inline(always)]
pub fn uncount_delivery(netns_cookie: u64) {
    add_deliveries(netns_cookie, u64::MAX);
}

#[inline(always)]
fn add_deliveries(netns_cookie: u64, number: u64) -> bool {
    let Some(count) = DELIVERIES.get_ptr_mut(netns_cookie) else { return false };
    // Added as one step, since a socket may close on another processor, or in an interrupt on this one. Without asking
    // for the sum, which Linux before 5.12 could not give.
    // SAFETY: an entry of the map, which only these programs change; aligned, as all values of 8 bytes are.
    unsafe { asm!("lock *(u64 *)({count} + 0) += {number}", count = in(reg) count, number = in(reg) number) };
    true
}

/// Registers the listening socket of `ops`. The latest wins, so that a successor takes over by listening.
#[inline(always)]
pub fn register_listener(ops: *mut bpf_sock_ops, mut key: ListenerKey) {
    let map = (&raw const LISTENERS).cast_mut().cast();
    // SAFETY: `ops` is the program's context, the key is of the map's type and lives on the stack.
    let _ = unsafe { bpf_sock_hash_update(ops, map, (&raw mut key).cast(), 0) };
}

/// Whether the tunnel's listener of `key` is there. Its entry goes with the socket, however the tunnel ended.
#[inline(always)]
pub fn is_listening(mut key: ListenerKey) -> bool {
    let map = (&raw const LISTENERS).cast_mut().cast();
    // SAFETY: the key is of the map's type and lives on the stack; a socket that was found is held until it
    // is released.
    unsafe {
        let socket = bpf_map_lookup_elem(map, (&raw mut key).cast());
        !socket.is_null() && {
            bpf_sk_release(socket);
            true
        }
    }
}

/// Notes that an application listens at `key`. What cannot be noted makes the netns one of which not everything is
/// known, where nobody is refused.
#[inline(always)]
pub fn note_listened(key: &ListenerKey) {
    let Some(count) = LISTENED.get_ptr_mut(ListenerKey::about(key.netns_cookie, ListenerKey::COUNT)) else {
        return;
    };
    if LISTENED.get_ptr(key).is_some() {
        return;
    }
    // SAFETY: the kernel frees a value only after the programs that saw it. Two that count at once may count one.
    let counted = unsafe { count.read_volatile() };
    if counted < ListenerKey::MOST_LISTENED && LISTENED.insert(key, 1, 0).is_ok() {
        // SAFETY: as above.
        unsafe { count.write_volatile(counted + 1) };
    } else {
        let _ = LISTENED.remove(ListenerKey::about(key.netns_cookie, ListenerKey::COMPLETE));
    }
}

/// Whether an application may listen at `key`: where not everything is known it may.
#[inline(always)]
pub fn may_be_listened(mut key: ListenerKey) -> bool {
    if LISTENED.get_ptr(key).is_some() {
        return true;
    }
    // A socket of IPv6 may serve IPv4 too.
    if key.family == 4 {
        key.family = 6;
        if LISTENED.get_ptr(key).is_some() {
            return true;
        }
    }
    LISTENED.get_ptr(ListenerKey::about(key.netns_cookie, ListenerKey::COMPLETE)).is_none()
}

/// What is remembered of `socket`, which may be null.
#[inline(always)]
pub fn state(socket: *mut bpf_sock) -> Option<&'static mut SocketState> {
    get_state(socket, 0)
}

/// What is remembered of `socket`, all zero at first. `None` when memory is short.
#[inline(always)]
pub fn state_or_new(socket: *mut bpf_sock) -> Option<&'static mut SocketState> {
    get_state(socket, u64::from(BPF_SK_STORAGE_GET_F_CREATE))
}

#[inline(always)]
fn get_state(socket: *mut bpf_sock, flags: u64) -> Option<&'static mut SocketState> {
    if socket.is_null() {
        return None;
    }
    let map = (&raw const SOCKET_STATE).cast_mut().cast();
    // SAFETY: the kernel returns null, or a value of the map's type that lives as long as the socket,
    // which the context holds; the socket's owner runs programs on it one at a time.
    unsafe { bpf_sk_storage_get(map, socket.cast(), null_mut(), flags).cast::<SocketState>().as_mut() }
}

/// What an earlier connect on `socket` recorded does not hold any more. The rest of the state stays: on a
/// tunnel's socket, which may live below the pods' cgroup, it tells the netns.
#[inline(always)]
pub fn forget_redirect(socket: *mut bpf_sock) {
    if let Some(state) = state(socket) {
        state.original.port = 0;
        state.redirect.port = 0;
    }
}
