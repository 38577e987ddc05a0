//! Events of cgroups and processes, in ring buffer `lifecycle`; and which new cgroups are closed at
//! once.

use crate::plain_data;

/// A path has room for so many bytes, its ending zero included; a longer one is cut.
pub const PATH_BYTES: usize = 480;
/// As for a path, of what all paths of interest begin with.
pub const PREFIX_BYTES: usize = 192;
/// As for a path, of a directory's own name. A multiple of 8.
pub const NAME_BYTES: usize = 96;

/// The name of a cgroup's directory, as its bytes stand in memory, filled up with zeros. Key of
/// `expected_pods`, whose value is the `CgroupInfo` that a new cgroup of this name gets before
/// `mkdir(2)` returns.
pub type Name = [u64; NAME_BYTES / size_of::<u64>()];

/// `bytes` as a [`Name`]; `None`: it is too long.
#[must_use]
pub fn name(bytes: &[u8]) -> Option<Name> {
    // One zero at the end belongs to it.
    if bytes.len() >= NAME_BYTES {
        return None;
    }
    let mut name = [0; NAME_BYTES / size_of::<u64>()];
    for (word, bytes) in name.iter_mut().zip(bytes.chunks(size_of::<u64>())) {
        let mut filled = [0; size_of::<u64>()];
        filled[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(filled);
    }
    Some(name)
}

/// Which cgroups are of interest. Map `lifecycle_scope`, one entry, written by the loader. With a
/// `prefix_len` of [`PREFIX_BYTES`] nothing is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Scope {
    /// Only cgroups whose path in the kernel begins so.
    pub prefix: [u8; PREFIX_BYTES],
    /// In bytes.
    pub prefix_len: u32,
    /// The offset of the pointer `kn` in the kernel's `struct cgroup`; this and the next two are
    /// all zero if not known.
    pub kn_offset: u32,
    /// The offset of `id` in the kernel's `struct kernfs_node`.
    pub id_offset: u32,
    /// The offset of `name` in the kernel's `struct kernfs_node`.
    pub name_offset: u32,
}

/// One cgroup was made, removed, or given a process.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct PathEvent {
    /// A [`Kind`].
    pub kind: u32,
    /// Whether the programs changed its entry in `cgroup_info_map`: it was made and got that of
    /// `expected_pods`, or its last process went and they took the netns out.
    pub closed: u32,
    /// 0: not known.
    pub cgroup_id: u64,
    /// From the root of its hierarchy, ended by a zero.
    pub path: [u8; PATH_BYTES],
}

/// A process executed another program, or wants a port of the tunnel. Not every time is reported.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct ProcessEvent {
    /// A [`Kind`].
    pub kind: u32,
    /// Always zero.
    pub pad: u32,
    /// Where it is; of one that wants a port, the pod's cgroup.
    pub cgroup_id: u64,
}

plain_data!(Scope, PathEvent, ProcessEvent);

/// What happened.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A cgroup was made.
    Made = 1,
    /// A cgroup was removed.
    Removed = 2,
    /// A process was moved into a cgroup.
    Joined = 3,
    /// Its first process came, or its last one went.
    Populated = 4,
    /// A process executed another program.
    Executed = 5,
    /// A process wants a port that is the tunnel's in its netns: see
    /// [`ReservedBind`](crate::reserved_ports::ReservedBind).
    WantsPort = 6,
}

impl Kind {
    /// The kind with this number, if there is one.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Made),
            2 => Some(Self::Removed),
            3 => Some(Self::Joined),
            4 => Some(Self::Populated),
            5 => Some(Self::Executed),
            6 => Some(Self::WantsPort),
            _ => None,
        }
    }
}
