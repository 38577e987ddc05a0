//! Which cgroup is which pod, and what happens to its traffic.

use crate::{address::Address, plain_data};

/// Flags of [`CgroupInfo`], [`NetnsInfo`] and [`PodRecord`].
pub mod flag {
    /// The pod is enrolled: its traffic is redirected.
    pub const IN_MESH: u32 = 1;
    /// The cgroup is a node tunnel's: its traffic is never redirected.
    pub const TUNNEL: u32 = 1 << 1;
    /// A sidecar carries this pod's traffic. The programs leave it alone.
    pub const SIDECAR: u32 = 1 << 2;
    /// The tunnel acknowledged the pod's netns.
    pub const READY: u32 = 1 << 3;
    /// While no tunnel serves the pod, its traffic passes in clear. Without this flag it is
    /// refused.
    pub const FAIL_OPEN: u32 = 1 << 4;
    /// The pod's DNS queries are redirected to the tunnel, while it answers them. Bits 5 to 7 are
    /// unused: their number is kept so that maps that an earlier build filled still read the same.
    pub const DNS_CAPTURE: u32 = 1 << 8;
    /// Connections are redirected to [`crate::redirect_ports`], not all to one port: the programs
    /// of the pod's netns and of the tunnels know these.
    pub const SPREAD: u32 = 1 << 9;
}

/// What the programs know of a cgroup. Value of `cgroup_info_map`, keyed by cgroup id (`u64`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct CgroupInfo {
    /// The key once more: see [`NetnsInfo::netns_cookie`]. The loader fills it in. First, since the
    /// kernel writes values from their beginning on.
    pub cgroup_id: u64,
    /// The pod's first IPv4 address in mapped form, or all zero.
    pub v4: Address,
    /// The pod's first IPv6 address, or all zero.
    pub v6: Address,
    /// Where an IPv4 connect is redirected to (mapped): the pod's own address.
    pub redirect_v4: Address,
    /// Where an IPv6 connect is redirected to: the pod's own address.
    pub redirect_v6: Address,
    /// The pod's netns; 0: not known, so no [`ListenerKey`](crate::listeners::ListenerKey) fits.
    pub netns_cookie: u64,
    /// What the pod's configuration says: bits of [`flag`].
    pub flags: u32,
    /// What the watcher found in the pod, such as a sidecar: bits of [`flag`].
    pub detected: u32,
    /// The pod's list in `exclusion_ports` and `exclusion_cidrs`; 0: none.
    pub exclusion_id: u32,
    /// The port of the tunnel's outbound listener, in host byte order.
    pub redirect_port: u16,
    /// Always zero.
    pub pad: u16,
}

/// The pod whose netns it is. Value of `pod_by_netns`, keyed by netns cookie (`u64`). It decides
/// about whatever arrives there, at any address: the copy of the program that is attached to a
/// netns knows the cookie of that netns, see [`NETNS_COOKIE_PLACEHOLDER`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct NetnsInfo {
    /// The key once more. The memory of a replaced entry becomes another one's, maybe while a program
    /// reads it: if the key is still there when all has been read, all of it was this entry's.
    pub netns_cookie: u64,
    /// The pod's own cgroup.
    pub cgroup_id: u64,
    /// Bits of [`flag`].
    pub flags: u32,
    /// As in [`CgroupInfo`].
    pub exclusion_id: u32,
}

/// Stands in the compiled sk_lookup program where the cookie of its netns belongs: no kernel tells
/// programs of this type where they run. The loader puts the cookie in before it loads the copy for
/// a netns. The kernel counts cookies up from 1 and reaches this number never.
pub const NETNS_COOKIE_PLACEHOLDER: u64 = 0x6164_6974_2d6e_6574;

/// The enrolled pod that has an address. Value of `pod_by_addr`, keyed by [`Address`]. It says what
/// is a pod's own address; [`NetnsInfo`] decides about arrivals.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct PodRecord {
    /// As in [`CgroupInfo`].
    pub netns_cookie: u64,
    /// Bits of [`flag`].
    pub flags: u32,
    /// As in [`CgroupInfo`].
    pub exclusion_id: u32,
}

plain_data!(CgroupInfo, NetnsInfo, PodRecord);
