//! Original destinations, and flows that pass untouched.

use crate::{
    address::{Address, UNSPECIFIED, to_words},
    plain_data,
    sealed::{Sum, halves, quarters, word},
};

/// An address and a port, such as where an application wanted to go.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Destination {
    /// IPv4 in mapped form.
    pub address: Address,
    /// Host byte order.
    pub port: u16,
    /// Always zero.
    pub pad: u16,
}

impl Destination {
    /// No destination. A value with port 0, and not `None`: on older kernels the verifier refuses
    /// programs that read stack which they never wrote (5.10 does), and the compiler makes such a
    /// read of an absent payload.
    pub const NOWHERE: Self = Self::new(UNSPECIFIED, 0);

    /// `port` at `address`.
    #[inline(always)]
    #[must_use]
    pub const fn new(address: Address, port: u16) -> Self {
        Self { address, port, pad: 0 }
    }

    /// Whether this is a destination at all: port 0 is none.
    #[inline(always)]
    #[must_use]
    pub const fn is_somewhere(&self) -> bool {
        self.port != 0
    }
}

/// Where the opener of a flow wanted to go. Value of `original_dst`, sealed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Original {
    /// There.
    pub destination: Destination,
    /// Always zero.
    pub pad: u32,
}

impl Sum for Original {
    #[inline(always)]
    fn sum(&self, sum: u64) -> u64 {
        let to = &self.destination;
        halves(to.address.sum(sum), quarters(to.port, to.pad), self.pad)
    }
}

/// A connection as its opener sees it. Key of `original_dst` (value [`Original`]) and of
/// `tunnel_flows` (value [`TunnelFlow`]).
///
/// In `original_dst` the remote end is the pod's own address (the target of the redirect), which no
/// two pods of a node share. So a pod can only write keys of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Flow {
    /// The opener's address.
    pub local: Address,
    /// The address that it dialled.
    pub remote: Address,
    /// Host byte order.
    pub local_port: u16,
    /// Host byte order.
    pub remote_port: u16,
}

impl Flow {
    /// The same connection as the other end sees it.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self {
            local: self.remote,
            remote: self.local,
            local_port: self.remote_port,
            remote_port: self.local_port,
        }
    }
}

impl Sum for Flow {
    #[inline(always)]
    fn sum(&self, sum: u64) -> u64 {
        halves(self.remote.sum(self.local.sum(sum)), quarters(self.local_port, self.remote_port), 0)
    }
}

/// A connection that the tunnel opened. Value of `tunnel_flows`, sealed.
///
/// It passes `sk_lookup` only in the netns that it came from: when the tunnel dials one pod of the
/// node on behalf of another, the inbound policy of the dialled pod must still see it.
///
/// It passes only during its handshake, which is all that the kernel looks a listener up for.
/// Later the ports may be another's: the client's own next connection, or that of another pod with
/// the client's address, would reach the application without the tunnel. So the entry has an end,
/// whatever becomes of the socket, of the tunnel and of the program that removes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct TunnelFlow {
    /// The cookie of the netns that the tunnel's socket is in.
    pub netns_cookie: u64,
    /// Until when it passes: nanoseconds of `CLOCK_MONOTONIC`.
    pub valid_until: u64,
}

impl Sum for TunnelFlow {
    #[inline(always)]
    fn sum(&self, sum: u64) -> u64 {
        word(word(sum, self.netns_cookie), self.valid_until)
    }
}

/// How long a SYN and its repetitions pass, in nanoseconds. The tunnel gives up after 10 s.
pub const SYN_LIFETIME: u64 = 12_000_000_000;

/// How long a flow passes after the tunnel's end is established, in nanoseconds. With SYN cookies
/// (`tcp_syncookies`) the kernel looks the listener up once more for the ACK, and for what repeats
/// it when the listener's queue was full.
pub const ACK_LIFETIME: u64 = 2_000_000_000;

/// What the programs remember of one socket. Value of the socket storage `socket_state`: it lives
/// and dies with the socket, so the kernel cannot evict it, and no other socket can get it.
///
/// * on an application's socket: where it wanted to go, written by connect, read by getpeername
/// * on the tunnel's listeners: the netns, written when they are created
/// * on a socket by which the tunnel dials: whether it is one of `pinned_connections`
/// * on a socket that the tunnel accepted from the pod: the original destination, moved there from
///   `original_dst`
/// * on a socket that the tunnel accepted for the pod: that it is one of `pinned_connections`
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct SocketState {
    /// The cookie of the netns that the socket was created in; 0: not recorded.
    pub netns_cookie: u64,
    /// Where the application wanted to go; port 0: not redirected.
    pub original: Destination,
    /// Where it was redirected to instead.
    pub redirect: Destination,
    /// 1: counted in `pinned_connections`.
    pub pins_netns: u32,
    /// Of `original` and `redirect`, where connect or sendmsg wrote them: see [`check`]. 0: an
    /// earlier build wrote them.
    pub check: u32,
}

/// What shows that the two destinations belong together; never 0. Threads that share a UDP socket
/// write and read its state side by side, without the socket's lock.
#[inline(always)]
#[must_use]
pub const fn check(original: &Destination, redirect: &Destination) -> u32 {
    let (from, to) = (to_words(&original.address), to_words(&redirect.address));
    let words = [
        from[0],
        from[1],
        from[2],
        from[3],
        original.port as u32,
        to[0],
        to[1],
        to[2],
        to[3],
        redirect.port as u32,
    ];
    let mut hash = 1u32;
    let mut i = 0;
    while i < words.len() {
        hash = (hash ^ words[i]).wrapping_mul(0x0100_0193).rotate_left(7);
        i += 1;
    }
    hash | 1
}

plain_data!(Destination, Flow, Original, SocketState, TunnelFlow);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::mapped;

    #[test]
    fn a_mixture_of_two_answers_does_not_pass() {
        let [a, b] = [10, 11].map(|last| Destination::new(mapped([10, 96, 0, last]), 53));
        let c = Destination::new([0xfd; 16], 53);
        let redirect = Destination::new(mapped([127, 0, 0, 1]), 15053);
        for (one, other) in [(a, b), (a, c), (c, b)] {
            let mut mixed = one;
            mixed.address[12..].copy_from_slice(&other.address[12..]);
            assert_ne!(check(&one, &redirect), check(&other, &redirect));
            assert!(mixed == other || check(&mixed, &redirect) != check(&one, &redirect));
        }
    }
}
