//! What applies to the whole node. Map `settings`, an array of one entry: the watcher can switch
//! each field while the programs run.

use crate::{address::Address, plain_data};

/// The value of `settings`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Settings {
    /// Where the tunnel takes outbound connections, in host byte order.
    pub outbound_port: u16,
    /// Where the tunnel takes inbound connections in clear, in host byte order.
    pub inbound_port: u16,
    /// Where the tunnel takes HBONE, in host byte order.
    pub hbone_port: u16,
    /// 1: a tunnel is connected. 0: every pod follows its fail mode, whatever its own flags say.
    pub tunnel_up: u16,
    /// 0: silent. 1: each verdict that fits the filter makes a line in `trace_pipe` and a record in
    /// `trace`.
    pub debug: u32,
    /// Only verdicts about this port (either end, host byte order); 0: any.
    pub debug_port: u32,
    /// Only verdicts about this address (either end); all zero: any.
    pub debug_address: Address,
    /// The resolvers whose DNS queries are captured (mapped where IPv4). The first one all zero:
    /// every resolver.
    pub resolvers: [Address; 3],
    /// Where the tunnel answers DNS on the loopback of each pod, in host byte order; 0: it answers
    /// none.
    pub dns_port: u16,
    /// Which verdicts are reported besides: bits of [`trace_filter`]. 0: all.
    pub trace_filter: u16,
}

impl Settings {
    /// Whether `port` is one that the tunnel takes connections at.
    #[inline(always)]
    #[must_use]
    pub const fn is_reserved(&self, port: u16) -> bool {
        port == self.outbound_port || port == self.inbound_port || port == self.hbone_port
    }

    /// Whether `port` is one where the tunnel answers DNS, of pods that want that.
    #[inline(always)]
    #[must_use]
    pub const fn is_of_dns(&self, port: u16) -> bool {
        port != 0 && port == self.dns_port
    }
}

/// Bits of [`Settings::trace_filter`].
pub mod trace_filter {
    /// Only verdicts about what `trace_watched` has.
    pub const WATCHED: u16 = 1;
    /// None whose either end is in a range of `trace_left_out`.
    pub const LEFT_OUT: u16 = 1 << 1;
}

plain_data!(Settings);
