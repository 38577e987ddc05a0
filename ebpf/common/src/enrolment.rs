//! Which cgroup is which pod, and what happens to its traffic.

use crate::{
    address::{Address, UNSPECIFIED},
    plain_data,
    sealed::{Sum, halves, quarters, word},
};

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
    /// The pod's list has users or groups in `exclusion_ids`.
    pub const GUARDS_IDS: u32 = 1 << 10;
    /// The cgroup is that of a container whose processes are left alone.
    pub const GUARDED: u32 = 1 << 11;
    /// The pod's list has interfaces in `exclusion_ids`.
    pub const EXCLUDES_DEVICES: u32 = 1 << 12;
    /// In no entry: user space shows one with a broken seal so, which is then as nobody wants it.
    pub const BROKEN: u32 = 1 << 31;
}

/// What the programs know of a cgroup. Value of `cgroup_info_map`, sealed, keyed by cgroup id
/// (`u64`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct CgroupInfo {
    /// The pod's first IPv4 address in mapped form, where its IPv4 connects are redirected to; all
    /// zero: it has none.
    pub v4: Address,
    /// The pod's first IPv6 address, where its IPv6 connects are redirected to; all zero: it has
    /// none.
    pub v6: Address,
    /// The pod's netns, where the sk_lookup program is attached. 0: not known, so what arrives for a
    /// closed pod is dropped, and no [`ListenerKey`](crate::listeners::ListenerKey) fits.
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

impl CgroupInfo {
    /// Of a pod that no tunnel serves, and that fails closed: what an entry is taken for that cannot
    /// be read whole.
    pub const CLOSED: Self = Self {
        v4: UNSPECIFIED,
        v6: UNSPECIFIED,
        netns_cookie: 0,
        flags: flag::IN_MESH,
        detected: 0,
        exclusion_id: 0,
        redirect_port: 0,
        pad: 0,
    };

    /// The entry of the same pod while nobody knows its netns, or nothing is attached there yet that
    /// decides about arrivals.
    #[inline(always)]
    #[must_use]
    pub const fn without_netns(&self) -> Self {
        Self {
            flags: self.flags & (flag::IN_MESH | flag::TUNNEL | flag::SIDECAR | flag::FAIL_OPEN),
            detected: self.detected,
            redirect_port: self.redirect_port,
            ..Self::CLOSED
        }
    }
}

impl Sum for CgroupInfo {
    #[inline(always)]
    fn sum(&self, sum: u64) -> u64 {
        let sum = word(self.v6.sum(self.v4.sum(sum)), self.netns_cookie);
        let ports = quarters(self.redirect_port, self.pad);
        halves(halves(sum, self.flags, self.detected), self.exclusion_id, ports)
    }
}

/// The pod whose netns it is. Value of `pod_by_netns`, sealed, keyed by netns cookie (`u64`).
/// It decides
/// about whatever arrives there, at any address: the copy of the program that is attached to a
/// netns knows the cookie of that netns, see [`NETNS_COOKIE_PLACEHOLDER`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct NetnsInfo {
    /// The pod's own cgroup; 0: it is not known.
    pub cgroup_id: u64,
    /// Bits of [`flag`].
    pub flags: u32,
    /// As in [`CgroupInfo`].
    pub exclusion_id: u32,
}

impl NetnsInfo {
    /// As [`CgroupInfo::CLOSED`].
    pub const CLOSED: Self = Self { cgroup_id: 0, flags: flag::IN_MESH, exclusion_id: 0 };
}

impl Sum for NetnsInfo {
    #[inline(always)]
    fn sum(&self, sum: u64) -> u64 {
        halves(word(sum, self.cgroup_id), self.flags, self.exclusion_id)
    }
}

/// Stands in the compiled sk_lookup program where the cookie of its netns belongs: no kernel tells
/// programs of this type where they run. The loader puts the cookie in before it loads the copy for
/// a netns. The kernel counts cookies up from 1 and reaches this number never.
pub const NETNS_COOKIE_PLACEHOLDER: u64 = 0x6164_6974_2d6e_6574;

/// The enrolled pod that has an address. Value of `pod_by_addr`, sealed, keyed by [`Address`]. It says
/// what
/// is a pod's own address; [`NetnsInfo`] decides about arrivals.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct PodRecord {
    /// As in [`CgroupInfo`].
    pub netns_cookie: u64,
    /// Bits of [`flag`].
    pub flags: u32,
    /// The number of the interface that has the address, in the pod's netns.
    pub device: u32,
}

impl PodRecord {
    /// No pod has the address.
    pub const NOBODY: Self = Self { netns_cookie: 0, flags: 0, device: 0 };

    /// Whether the pod that has the address is the one in that netns, and has it on that interface. No
    /// pod is in netns 0; interface 0 is any.
    #[inline(always)]
    #[must_use]
    pub const fn is_at(&self, netns_cookie: u64, device: u32) -> bool {
        netns_cookie != 0 && self.netns_cookie == netns_cookie && (device == 0 || self.device == device)
    }
}

impl Sum for PodRecord {
    #[inline(always)]
    fn sum(&self, sum: u64) -> u64 {
        halves(word(sum, self.netns_cookie), self.flags, self.device)
    }
}

plain_data!(CgroupInfo, NetnsInfo, PodRecord);
