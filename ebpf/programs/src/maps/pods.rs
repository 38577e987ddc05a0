//! Which cgroup, netns and address is which pod's.

use adit_ebpf_common::{
    address::Address,
    enrolment::{CgroupInfo, NetnsInfo, PodRecord, flag},
    sealed::Sealed,
};
use aya_ebpf::helpers::{bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id};

use super::{
    CGROUP_INFO, POD_BY_ADDR, POD_BY_NETNS,
    whole::{Look, in_memory, look},
};
use crate::context::Packet;

/// How deep a pod's cgroup may lie. Kubernetes in Kind is at ten.
const DEEPEST_CGROUP: i32 = 24;

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
        // The first look is at what was found already.
        let mut found = Some(self.at);
        let again = || CGROUP_INFO.get_ptr(self.key);
        if look(&self.key, copy, || found.take().or_else(again)) != Look::Whole {
            // It was there when it was looked for.
            *copy = CLOSED;
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

/// Takes the netns out of the entry of a closed pod whose last process went: its next one may be in
/// another, which a sandbox that is made anew has. Whether there was one to take out.
#[inline(always)]
pub fn forget_netns(id: u64) -> bool {
    const DECIDES: u32 = flag::IN_MESH | flag::FAIL_OPEN | flag::TUNNEL | flag::SIDECAR;
    let mut copy = CLOSED;
    match Entry::of(id) {
        Some(entry) => entry.read(&mut copy),
        None => return false,
    }
    let info = copy.unchecked();
    if info.netns_cookie == 0 || info.flags & DECIDES != flag::IN_MESH {
        return false;
    }
    let mut info = Sealed::broken(info.without_netns());
    set_cgroup(id, &mut info)
}

/// The pod that has `address`. One that cannot be read is nobody's own.
#[inline(always)]
pub fn owner(address: &Address) -> PodRecord {
    let mut copy = Sealed::broken(PodRecord::NOBODY);
    let look = look(address, &mut copy, || POD_BY_ADDR.get_ptr(address));
    if look == Look::Whole { *copy.unchecked() } else { PodRecord::NOBODY }
}

/// Whether the pod in that netns has `address`, on that interface; 0: on whichever.
#[inline(always)]
pub fn has_address(netns_cookie: u64, address: &Address, device: u32) -> bool {
    owner(address).is_at(netns_cookie, device)
}

/// What is known of a netns.
#[inline(always)]
pub fn netns(cookie: u64) -> Option<NetnsInfo> {
    let mut copy = Sealed::broken(NetnsInfo::CLOSED);
    match look(&cookie, &mut copy, || POD_BY_NETNS.get_ptr(cookie)) {
        Look::Whole => Some(*copy.unchecked()),
        Look::Torn => Some(NetnsInfo::CLOSED),
        Look::Missing => None,
    }
}

/// The cgroup of the pod that is known to have that netns; 0: none is.
#[inline(always)]
pub fn cgroup_in(netns_cookie: u64) -> u64 {
    netns(netns_cookie).map_or(0, |netns| netns.cgroup_id)
}

/// The entry of the pod that is known to have that netns.
#[inline(always)]
pub fn pod_in(netns_cookie: u64) -> Option<Entry> {
    Entry::of(netns(netns_cookie)?.cgroup_id)
}
