//! The maps. Names, keys and values: `adit_ebpf_common`, whose table of maps a test of the loader
//! compares with the compiled object. What the decision lists learn from them: [`facts`].
#![expect(unsafe_code, reason = "references into maps, and helpers that take pointers")]

use core::{arch::asm, ptr::null_mut};

use adit_ebpf_common::{
    address::Address,
    enrolment::{CgroupInfo, NetnsInfo, PodRecord, flag},
    exclusions::{ExcludedCidr, ExcludedPorts},
    flows::{ACK_LIFETIME, Destination, Flow, Original, SYN_LIFETIME, SocketState, TunnelFlow},
    listeners::{AppListenerState, ListenerKey, MAX_APP_LISTENERS},
    sealed::{self, Sealed, Sum},
    settings::Settings,
    trace::TraceRecord,
};
use aya_ebpf::{
    bindings::{BPF_EXIST, BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE},
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
#[map(name = "original_dst")]
static ORIGINAL_DST: LruHashMap<Flow, Sealed<Original>> = LruHashMap::with_max_entries(65536, 0);
#[map(name = "tunnel_flows")]
static TUNNEL_FLOWS: LruHashMap<Flow, Sealed<TunnelFlow>> = LruHashMap::with_max_entries(65536, 0);
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

/// How often an entry is read that is being replaced. Whoever meets a replacement each time is
/// treated as closed. The compiler makes no loop of so few, whose end Linux 5.10 would not see.
const LOOKS: u32 = 2;

/// What was read of an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// It is there, whole.
    Whole,
    /// It is there, and was replaced whenever it was looked at.
    Torn,
    /// There is none.
    Missing,
}

/// Copies an entry, and tells whether the copy is whole and its key's own. The kernel may give the
/// memory of the entry to another one meanwhile.
///
/// # Safety
/// `entry` is a pointer that a look-up in a map gave to this program: the kernel frees its memory only
/// after the program.
#[inline(always)]
unsafe fn copy_whole<V: Sum>(entry: *const Sealed<V>, copy: &mut Sealed<V>, key: &impl Sum) -> bool {
    let (from, to) = (entry.cast::<u64>(), (&raw mut *copy).cast::<u64>());
    let mut sum = Sealed::<V>::begin(key);
    let mut at = 0;
    // SAFETY: the caller's, for `from`; both are aligned, and as long as `WORDS` says. Any bytes are a
    // value of the types of maps. Volatile, since the compiler may read memory again that it takes for
    // unchanged.
    unsafe {
        while at < Sealed::<V>::WORDS {
            let word = from.add(at).read_volatile();
            to.add(at).write(word);
            sum = sealed::word(sum, word);
            at += 1;
        }
        let seal = from.add(at).read_volatile();
        to.add(at).write(seal);
        sum == seal
    }
}

/// The same reference. The compiler does not know that, and so reads what it needs when it needs it.
/// Else it would load a whole value once and keep its parts apart, on the stack, where there is no room
/// for them.
#[inline(always)]
pub fn in_memory<T>(value: &T) -> &T {
    let same: *const T;
    // SAFETY: copies the pointer, so it is that of `value`, whose lifetime the result has.
    unsafe {
        asm!("{same} = {at}", at = in(reg) &raw const *value, same = lateout(reg) same, options(nostack, preserves_flags));
        &*same
    }
}

/// Reads the entry of `key`, which `find` gives a pointer to, into `copy`: one place, since the stack
/// is small.
#[inline(always)]
pub fn look<V: Copy + Sum>(
    key: &impl Sum,
    copy: &mut Sealed<V>,
    find: impl Fn() -> Option<*const Sealed<V>>,
) -> Look {
    let mut looks = 0;
    while looks < LOOKS {
        let Some(entry) = find() else { return Look::Missing };
        // SAFETY: the look-up found it just now.
        if unsafe { copy_whole(entry, copy, key) } {
            return Look::Whole;
        }
        looks += 1;
    }
    Look::Torn
}

/// What an entry of a cgroup is taken for that cannot be read.
pub const CLOSED: Sealed<CgroupInfo> = Sealed::broken(CgroupInfo::CLOSED);

/// The entry of a cgroup: its pointer, and its key.
#[derive(Clone, Copy)]
pub struct Entry {
    at: *const Sealed<CgroupInfo>,
    key: u64,
}

impl Entry {
    #[inline(always)]
    fn of(key: u64) -> Option<Self> {
        CGROUP_INFO.get_ptr(key).map(|at| Self { at, key })
    }

    /// Reads what it says into `copy`.
    #[inline(always)]
    pub fn read(&self, copy: &mut Sealed<CgroupInfo>) {
        read_cgroup(self.at, self.key, copy);
    }
}

/// Reads the entry `at` of the cgroup `key`.
#[inline(always)]
fn read_cgroup(at: *const Sealed<CgroupInfo>, key: u64, copy: &mut Sealed<CgroupInfo>) {
    let mut at = Some(at);
    let mut looks = 0;
    while let Some(entry) = at
        && looks < LOOKS
    {
        // SAFETY: this program looked it up.
        if unsafe { copy_whole(entry, copy, &key) } {
            return;
        }
        at = CGROUP_INFO.get_ptr(key);
        looks += 1;
    }
    // It was there when it was looked for.
    *copy = CLOSED;
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
    let mut copy = CLOSED;
    match Entry::of(cgroup_id) {
        Some(entry) => entry.read(&mut copy),
        None => return false,
    }
    copy.unchecked().flags & flag::READY != 0
}

/// Gives a cgroup its entry, sealed anew; whether there was room.
#[inline(always)]
pub fn set_cgroup(id: u64, info: &mut Sealed<CgroupInfo>) -> bool {
    info.seal_for(&id);
    CGROUP_INFO.insert(id, in_memory(info), 0).is_ok()
}

/// The netns cookie of the pod that has `address`. One that cannot be read is nobody's own.
#[inline(always)]
pub fn owner(address: &Address) -> Option<u64> {
    let mut copy = Sealed::broken(PodRecord { netns_cookie: 0, flags: 0, exclusion_id: 0 });
    let look = look(address, &mut copy, || POD_BY_ADDR.get_ptr(address));
    if look == Look::Whole { Some(copy.unchecked().netns_cookie) } else { None }
}

/// What is known of a netns.
#[inline(always)]
fn netns(cookie: u64) -> Option<NetnsInfo> {
    let mut copy = Sealed::broken(NetnsInfo::CLOSED);
    match look(&cookie, &mut copy, || POD_BY_NETNS.get_ptr(cookie)) {
        Look::Whole => Some(*copy.unchecked()),
        Look::Torn => Some(NetnsInfo::CLOSED),
        Look::Missing => None,
    }
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
    let original = Original { destination: *in_memory(original), pad: 0 };
    let _ = ORIGINAL_DST.insert(flow, Sealed::new(in_memory(flow), original), 0);
}

#[inline(always)]
pub fn published_original(flow: &Flow) -> Option<Destination> {
    let mut copy = Sealed::broken(Original { destination: Destination::NOWHERE, pad: 0 });
    let look = look(flow, &mut copy, || ORIGINAL_DST.get_ptr(flow));
    if look == Look::Whole { Some(copy.unchecked().destination) } else { None }
}

#[inline(always)]
pub fn withdraw_original(flow: &Flow) {
    let _ = ORIGINAL_DST.remove(flow);
}

#[inline(always)]
pub fn record_tunnel_flow(flow: &Flow, netns_cookie: u64) -> Result<(), i32> {
    let of_netns = TunnelFlow { netns_cookie, valid_until: now() + SYN_LIFETIME };
    TUNNEL_FLOWS.insert(flow, Sealed::new(flow, of_netns), 0)
}

/// The tunnel's end of `flow` is established. Its socket is the one writer of the entry.
#[inline(always)]
pub fn shorten_tunnel_flow(flow: &Flow) {
    let Some(found) = recorded_tunnel_flow(flow) else { return };
    let shorter = TunnelFlow { valid_until: now() + ACK_LIFETIME, ..found };
    let _ = TUNNEL_FLOWS.insert(flow, Sealed::new(flow, shorter), u64::from(BPF_EXIST));
}

#[inline(always)]
fn recorded_tunnel_flow(flow: &Flow) -> Option<TunnelFlow> {
    let mut copy = Sealed::broken(TunnelFlow { netns_cookie: 0, valid_until: 0 });
    let look = look(flow, &mut copy, || TUNNEL_FLOWS.get_ptr(flow));
    if look == Look::Whole { Some(*copy.unchecked()) } else { None }
}

/// The netns from which the tunnel opened `flow`, while that may still be on its way.
#[inline(always)]
fn tunnel_flow(flow: &Flow) -> Option<u64> {
    let found = recorded_tunnel_flow(flow)?;
    if now() < found.valid_until { Some(found.netns_cookie) } else { None }
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
    // SAFETY: `count` points to an entry of the map, whose memory the kernel frees only after this
    // program; values of 8 bytes are aligned, and only these programs change them, always by this
    // instruction. If the watcher removes the entry meanwhile, another netns may have its memory, and
    // counts one too many or too few: such a netns stays prepared, or is restored early.
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
