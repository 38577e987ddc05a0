//! Original destinations, and flows that pass untouched.

use crate::{address::Address, plain_data};

/// An address and a port: where an application wanted to go.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    pub address: Address,
    /// Host byte order.
    pub port: u16,
    /// Always zero.
    pub pad: u16,
}

/// A connection as its opener sees it. Key of `original_dst` (value [`Destination`]) and of
/// `tunnel_flows` (value `u64`: the cookie of the netns that the tunnel's socket lives in).
///
/// A flow of `tunnel_flows` passes `sk_lookup` in the netns that it came from only: when the tunnel dials
/// on behalf of one pod of the node another one, the other's inbound policy must still see it.
///
/// In `original_dst` the remote end is the pod's own address (the redirect's target), which no two
/// pods of a node share; so a pod can only ever write keys of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    pub local: Address,
    pub remote: Address,
    /// Host byte order.
    pub local_port: u16,
    /// Host byte order.
    pub remote_port: u16,
}

/// What the programs remember of one socket, in a socket storage map: it lives and dies with the
/// socket, so it can be neither evicted nor mistaken for another's.
///
/// * on an application's socket: where it wanted to go, set by connect, read by getpeername
/// * on the tunnel's listeners: the netns, set when they are created
/// * on a socket by which the tunnel dials: whether it is one of `deliveries` (by netns cookie, how many of the tunnel's
///   connections need the netns prepared: those that speak from an address that is not the pod's, and those to the pod,
///   for which the tunnel is going to dial so)
/// * on a socket that the tunnel accepted: from the pod, the original destination, moved there from `original_dst`; to
///   the pod, that it is one of `deliveries`
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketState {
    /// The cookie of the netns that the socket was created in; 0: not noted.
    pub netns_cookie: u64,
    /// Where the application wanted to go; port 0: not redirected.
    pub original: Destination,
    /// Where it was redirected to instead.
    pub redirect: Destination,
    /// 1: counted in `deliveries`.
    pub delivers: u32,
    /// Always zero.
    pub pad: u32,
}

plain_data!(Destination: 20, Flow: 36, SocketState: 56);
