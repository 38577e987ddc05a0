//! To which port of the pod's own address a connection is redirected.
//!
//! To one port alone, all destinations of a pod would have one remote end, and so share the source
//! ports: a pod would run out of them, and two sockets of one source port could not dial two
//! destinations. So the port comes from the destination. Nobody listens on it: `sk_lookup` knows
//! the connection by its entry in `original_dst`, and gives it to the tunnel.

use crate::{address::to_words, flows::Destination};

/// The first port for sockets without a source port. The kernel takes no source port below 1024 by
/// itself: if it took the port that the socket dials, at the same address, the socket would be
/// connected to itself.
pub const FIRST: u16 = 512;

/// How many there are.
pub const COUNT: u16 = 512;

/// The port for a connection to `to` by a socket that is bound to `source_port`; 0: to none, so the
/// kernel chooses.
///
/// A source port that is given may be the same for many destinations, which then have to differ
/// from each other in all of 16 bits. It is never the port itself.
#[inline(always)]
#[must_use]
pub const fn redirect_port(to: &Destination, source_port: u16) -> u16 {
    let hash = hash(to);
    if source_port == 0 {
        return FIRST + (hash >> 16) as u16 % COUNT;
    }
    let port = (hash >> 16) as u16;
    let port = if port == 0 { 1 } else { port };
    match port == source_port {
        false => port,
        true if port == 1 => 2,
        true => port - 1,
    }
}

/// The upper half depends on every bit of `to`.
#[inline(always)]
const fn hash(to: &Destination) -> u32 {
    const ODD: [u32; 5] = [0x9e37_79b1, 0x85eb_ca77, 0xc2b2_ae3d, 0x27d4_eb2f, 0x1656_67b1];
    let words = to_words(&to.address);
    let mut hash = (to.port as u32).wrapping_mul(ODD[4]);
    let mut i = 0;
    while i < 4 {
        hash = (hash ^ words[i]).wrapping_mul(ODD[i]);
        hash ^= hash >> 15;
        i += 1;
    }
    hash.wrapping_mul(ODD[0])
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeSet;

    use super::*;
    use crate::address::mapped;

    fn destinations() -> impl Iterator<Item = Destination> {
        let addresses = (0..=255).flat_map(|last| {
            [mapped([10, 0, 3, last]), [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, last]]
        });
        addresses.flat_map(|address| (0..8).map(move |port| Destination::new(address, 8080 + port)))
    }

    #[test]
    fn destinations_that_differ_little_are_spread_evenly() {
        let mut load = [0u32; COUNT as usize];
        for to in destinations() {
            load[usize::from(redirect_port(&to, 0) - FIRST)] += 1;
        }
        // 4,096 destinations over 512 ports: 8 each, and rarely more than twice that by chance.
        assert!(load.iter().all(|load| (1..=24).contains(load)), "{load:?}");
    }

    #[test]
    fn a_given_source_port_can_dial_many_destinations_and_never_itself() {
        let ports: BTreeSet<u16> = destinations().map(|to| redirect_port(&to, 40_000)).collect();
        // By chance 4,096 of 65,536 meet some 124 times.
        assert!(ports.len() > 3_900 && !ports.contains(&0), "{}", ports.len());
        for to in destinations() {
            let port = redirect_port(&to, 40_000);
            let other = redirect_port(&to, port);
            assert!(other != port && other != 0, "{port} {other}");
        }
        assert_eq!((1..=u16::MAX).find(|port| redirect_port(&Destination::NOWHERE, *port) == *port), None);
    }
}
