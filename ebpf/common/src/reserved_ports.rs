//! Applications that want a port which is the tunnel's in their pod's netns.

use crate::plain_data;

/// A port that an application wanted. Key of `reserved_binds`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct ReservedPort {
    /// The netns of the application's socket.
    pub netns_cookie: u64,
    /// In host byte order.
    pub port: u16,
    /// 1: of UDP; 0: of TCP.
    pub is_udp: u16,
    /// Always zero.
    pub pad: u32,
}

/// Who wanted it last. Value of `reserved_binds`. It only tells: the watcher may read what two
/// programs wrote in one moment.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct ReservedBind {
    /// When: nanoseconds of `CLOCK_MONOTONIC`.
    pub at: u64,
    /// The process, as the node numbers it.
    pub pid: u32,
    /// Always zero.
    pub pad: u32,
    /// What it is called, filled up with zeros.
    pub name: [u8; 16],
}

plain_data!(ReservedPort, ReservedBind);
