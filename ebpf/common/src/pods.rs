//! Which cgroup is which pod, and what is done with its traffic.

use crate::{address::Address, plain_data};

/// Flags of [`CgroupInfo`] and [`PodRecord`].
pub mod flag {
    /// The pod is enrolled: its traffic is redirected.
    pub const IN_MESH: u32 = 1;
    /// The cgroup is a node tunnel's: its traffic is never redirected.
    pub const TUNNEL: u32 = 1 << 1;
    /// A sidecar carries this pod's traffic; left alone.
    pub const SIDECAR: u32 = 1 << 2;
    /// The tunnel acknowledged the pod's netns.
    pub const READY: u32 = 1 << 3;
    /// While no tunnel serves the pod its traffic passes in clear. Without this flag it is refused.
    pub const FAIL_OPEN: u32 = 1 << 4;
    /// The pod's DNS queries are redirected to the tunnel, while it answers any.
    pub const NAMES: u32 = 1 << 8;
}

/// What a cgroup stands for. Map `cgroup_info_map`, keyed by cgroup id (`u64`): written by the
/// watcher, read by the connect programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupInfo {
    /// The pod's IPv4 address in mapped form, or all zero.
    pub v4: Address,
    /// The pod's IPv6 address, or all zero.
    pub v6: Address,
    /// Where an IPv4 connect is redirected to (mapped); with `mode: pod` the pod's own address.
    pub redirect_v4: Address,
    /// Where an IPv6 connect is redirected to.
    pub redirect_v6: Address,
    /// The pod's netns: first half of the key of its [`ListenerKey`]s.
    pub netns_cookie: u64,
    /// What was asked for: bits of [`flag`].
    pub flags: u32,
    /// What was found by looking at the pod (such as a sidecar): bits of [`flag`].
    pub detected: u32,
    /// The pod's entries in the exclusion maps; 0: none.
    pub policy_id: u32,
    /// Host byte order.
    pub redirect_port: u16,
    /// Always zero. Spelt out, since hidden padding would reach the map uninitialised.
    pub pad: u16,
}

/// The pod that owns an address. Map `pod_by_addr`, keyed by [`Address`]: written by the watcher,
/// read by `sk_lookup`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodRecord {
    /// As in [`CgroupInfo`].
    pub netns_cookie: u64,
    /// Bits of [`flag`].
    pub flags: u32,
    pub policy_id: u32,
}

/// Key of `listeners` (sockhash): filled by the kernel when the tunnel calls `listen(2)`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerKey {
    /// The netns that the listener was created in.
    pub netns_cookie: u64,
    /// Host byte order.
    pub port: u32,
    /// 4 or 6. A tunnel may have one socket for both families (6, which then serves 4 as well) or two.
    pub family: u32,
}

/// What is known of the ports that applications of a pod listen on. Map `listened`, keyed by [`ListenerKey`] (the value
/// says nothing): written when one of the pods' sockets listens, and by the watcher, which finds what was there before,
/// what is not in the pods' cgroups, and what has ended. The tunnel's own listeners may be among them.
impl ListenerKey {
    /// No port. With this family an entry's value counts the netns' entries that a program made since the watcher
    /// counted; without this entry programs make none.
    pub const COUNT: u32 = 4;
    /// With this one and no port: everything that listens is known, so that who dials another port is refused.
    pub const COMPLETE: u32 = 6;
    /// Of one netns, or a pod could fill the map.
    pub const MOST_LISTENED: u32 = 1024;

    /// The entry about the netns itself.
    #[must_use]
    pub const fn about(netns_cookie: u64, family: u32) -> Self {
        Self { netns_cookie, port: 0, family }
    }
}

/// Key of `excluded_ports`; the value is one byte, 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExcludedPort {
    pub policy_id: u32,
    /// Host byte order.
    pub port: u16,
    /// [`OUTBOUND`] or [`INBOUND`].
    pub direction: u16,
}

/// As the pod sees it: it dials.
pub const OUTBOUND: u16 = 0;
/// As the pod sees it: it is dialled.
pub const INBOUND: u16 = 1;

/// Data part of the key of `excluded_cidrs` (LPM trie). Prefix lengths count from the first bit of
/// the policy id: 32 for the id, 96 more for an IPv4 range in mapped form.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExcludedCidr {
    /// Big endian, since the trie compares from the most significant bit.
    pub policy_id_be: [u8; 4],
    pub address: Address,
}

plain_data!(CgroupInfo: 88, PodRecord: 16, ListenerKey: 16, ExcludedPort: 8, ExcludedCidr: 20);
