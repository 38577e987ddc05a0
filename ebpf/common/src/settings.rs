//! What holds for the whole node. Map `settings`, an array of one: written by the watcher, read by
//! every program, so that each field can be switched while the programs run.

use crate::{address::Address, plain_data};

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where the tunnel listens, in host byte order.
    pub outbound_port: u16,
    pub inbound_port: u16,
    pub hbone_port: u16,
    /// 1: a tunnel is connected. 0: every pod follows its fail mode, whatever its own flags say.
    pub tunnel_up: u16,
    /// 0: silent. 1: a line in `trace_pipe` and a record in `trace` for each verdict that fits the filter.
    pub debug: u32,
    /// Only verdicts about this port (either end, host byte order); 0: any.
    pub debug_port: u32,
    /// Only verdicts about this address (either end); all zero: any.
    pub debug_address: Address,
    /// Whose DNS queries are captured (mapped where IPv4). The first one unspecified: all resolvers'.
    pub resolvers: [Address; 3],
    /// Where the tunnel answers DNS on the loopback of each pod, in host byte order; 0: queries are nobody's affair.
    pub names_port: u16,
    /// Always zero.
    pub pad: u16,
}

plain_data!(Settings: 84);
