//! Which connections of a pod stay outside the mesh: those that a list excludes, and those that it
//! does not include, where it includes anything.
//!
//! The maps of ports and addresses are LPM tries. A key begins with the id of a list and with what must be equal, the
//! direction or the address family; then come the bits of the port or of the address, of which an
//! entry fixes some. So a range of ports takes a few entries, and no range of one address family
//! has addresses of the other.

use core::ops::RangeInclusive;

use crate::{
    address::{Address, is_v4},
    plain_data,
};

/// What a list says of a port or an address. Value of both maps, in one byte.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed(u8);

impl Listed {
    /// Nothing.
    pub const NO: Self = Self(0);
    /// It stays outside the mesh.
    pub const EXCLUDED: Self = Self(1);
    /// It stays outside the mesh unless something else includes it: the list includes some, and this
    /// is none of those.
    pub const OUTSIDE: Self = Self(2);
    /// It is in the mesh, unless something else excludes it.
    pub const INCLUDED: Self = Self(3);
    /// Of an address: the pod's routes send it out of an interface that is excluded, so it stays outside
    /// the mesh. A socket that is bound to another interface does not take that route: for it this
    /// excludes nothing, and it is in the mesh.
    pub const BY_ROUTE: Self = Self(4);

    /// That with this value. What no version has written counts as nothing.
    #[inline(always)]
    #[must_use]
    pub const fn of_value(value: u8) -> Self {
        if value > Self::BY_ROUTE.0 { Self::NO } else { Self(value) }
    }

    /// As the maps have it.
    #[must_use]
    pub const fn value(self) -> u8 {
        self.0
    }
}

/// Data part of the key of `exclusion_ports`; the value is a [`Listed`]. All in big endian: the trie
/// compares from the most significant bit.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct ExcludedPorts {
    /// The list that this entry belongs to:
    /// [`CgroupInfo::exclusion_id`](crate::enrolment::CgroupInfo::exclusion_id).
    pub exclusion_id_be: [u8; 4],
    /// [`OUTBOUND`] or [`INBOUND`].
    pub direction_be: [u8; 2],
    /// The first port.
    pub port_be: [u8; 2],
}

/// The pod opens the connection.
pub const OUTBOUND: u16 = 0;
/// Somebody else opens the connection to the pod.
pub const INBOUND: u16 = 1;

/// Data part of the key of `exclusion_cidrs`; the value is a [`Listed`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct ExcludedCidr {
    /// As in [`ExcludedPorts`].
    pub exclusion_id_be: [u8; 4],
    /// 4 or 6, in the last byte.
    pub family_be: [u8; 4],
    /// The first address of the range.
    pub address: Address,
}

/// A user or a group whose processes are left alone, or an interface to which sockets are bound that
/// are: their connections stay outside the mesh. Key of `exclusion_ids`, by value 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct ExcludedId {
    /// The list that this entry belongs to:
    /// [`CgroupInfo::exclusion_id`](crate::enrolment::CgroupInfo::exclusion_id).
    pub exclusion_id: u32,
    /// [`USER`], [`GROUP`] or [`DEVICE`].
    pub kind: u32,
    /// A user or a group as the initial user namespace numbers it; an interface as the pod's netns does.
    pub id: u32,
}

/// The id is a user's.
pub const USER: u32 = 0;
/// The id is a group's.
pub const GROUP: u32 = 1;
/// The id is an interface's.
pub const DEVICE: u32 = 2;

plain_data!(ExcludedPorts, ExcludedCidr, ExcludedId);

/// Bits of [`ExcludedPorts`] before the port.
const PORT_HEAD: u32 = 48;
/// Bits of [`ExcludedCidr`] before the address.
const CIDR_HEAD: u32 = 64;
/// IPv4 addresses in mapped form begin with so many equal bits.
pub const MAPPED_BITS: u32 = 96;

impl ExcludedPorts {
    /// How many bits of a key a look-up compares.
    pub const BITS: u32 = PORT_HEAD + 16;

    /// The key of a look-up.
    #[inline(always)]
    #[must_use]
    pub const fn new(exclusion_id: u32, direction: u16, port: u16) -> Self {
        Self {
            exclusion_id_be: exclusion_id.to_be_bytes(),
            direction_be: direction.to_be_bytes(),
            port_be: port.to_be_bytes(),
        }
    }

    /// The list that the entry belongs to.
    #[must_use]
    pub const fn exclusion_id(&self) -> u32 {
        u32::from_be_bytes(self.exclusion_id_be)
    }
}

impl ExcludedCidr {
    /// How many bits of a key a look-up compares.
    pub const BITS: u32 = CIDR_HEAD + 128;

    /// The key of a look-up.
    #[inline(always)]
    #[must_use]
    pub const fn new(exclusion_id: u32, address: &Address) -> Self {
        let family = if is_v4(address) { 4 } else { 6 };
        Self { exclusion_id_be: exclusion_id.to_be_bytes(), family_be: [0, 0, 0, family], address: *address }
    }

    /// The list that the entry belongs to.
    #[must_use]
    pub const fn exclusion_id(&self) -> u32 {
        u32::from_be_bytes(self.exclusion_id_be)
    }
}

/// Ports that have their first bits in common, in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortPrefix {
    /// [`OUTBOUND`] or [`INBOUND`].
    pub direction: u16,
    /// The first port.
    pub first: u16,
    /// How many bits they have in common, at most 16.
    pub length: u32,
}

impl PortPrefix {
    /// The key of its entry in a list, and how many bits of that count.
    #[must_use]
    pub const fn key(&self, exclusion_id: u32) -> (u32, ExcludedPorts) {
        (PORT_HEAD + self.length, ExcludedPorts::new(exclusion_id, self.direction, self.first))
    }

    /// What the entry with this key and length stands for.
    #[must_use]
    pub const fn of_key(bits: u32, key: &ExcludedPorts) -> Self {
        Self {
            direction: u16::from_be_bytes(key.direction_be),
            first: u16::from_be_bytes(key.port_be),
            length: bits.saturating_sub(PORT_HEAD),
        }
    }

    /// Whether it has `port`.
    #[must_use]
    pub fn contains(&self, direction: u16, port: u16) -> bool {
        let rest = 16u32.saturating_sub(self.length);
        self.direction == direction && u32::from(self.first) >> rest == u32::from(port) >> rest
    }
}

/// Addresses of one family that have their first bits in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CidrPrefix {
    /// Whether they are IPv4 addresses.
    pub is_v4: bool,
    /// The first one, in mapped form if IPv4.
    pub first: Address,
    /// How many bits they have in common: from [`MAPPED_BITS`] for IPv4, at most 128.
    pub length: u32,
}

impl CidrPrefix {
    /// The key of its entry in a list, and how many bits of that count.
    #[must_use]
    pub const fn key(&self, exclusion_id: u32) -> (u32, ExcludedCidr) {
        let family = if self.is_v4 { 4 } else { 6 };
        let key = ExcludedCidr {
            exclusion_id_be: exclusion_id.to_be_bytes(),
            family_be: [0, 0, 0, family],
            address: self.first,
        };
        (CIDR_HEAD + self.length, key)
    }

    /// What the entry with this key and length stands for.
    #[must_use]
    pub const fn of_key(bits: u32, key: &ExcludedCidr) -> Self {
        Self { is_v4: key.family_be[3] == 4, first: key.address, length: bits.saturating_sub(CIDR_HEAD) }
    }

    /// Whether it has `address`.
    #[must_use]
    pub fn contains(&self, address: &Address) -> bool {
        let head = |address: &Address| {
            u128::from_be_bytes(*address).checked_shr(128u32.saturating_sub(self.length)).unwrap_or(0)
        };
        self.is_v4 == is_v4(address) && head(&self.first) == head(address)
    }
}

/// The fewest prefixes that have exactly `ports`: at most 30.
pub fn port_prefixes(direction: u16, ports: RangeInclusive<u16>) -> impl Iterator<Item = PortPrefix> {
    let (mut next, end) = (u32::from(*ports.start()), u32::from(*ports.end()) + 1);
    core::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        // The largest block that begins here and does not go past the end.
        let aligned = next.trailing_zeros().min(16);
        let fits = (end - next).ilog2();
        let bits = aligned.min(fits);
        let first = u16::try_from(next).ok()?;
        next += 1 << bits;
        Some(PortPrefix { direction, first, length: 16 - bits })
    })
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;
    use crate::address::mapped;

    #[test]
    fn a_range_of_ports_is_a_few_prefixes_that_have_exactly_its_ports() {
        for (first, last, count) in [
            (1, 65535, 16),
            (0, 65535, 1),
            (80, 80, 1),
            (0, 0, 1),
            (65535, 65535, 1),
            (1, 65534, 30),
            (30000, 30999, 7),
            (7000, 7010, 3),
        ] {
            let prefixes: Vec<_> = port_prefixes(OUTBOUND, first..=last).collect();
            assert_eq!(prefixes.len(), count, "{first}-{last}: {prefixes:?}");
            for port in 0..=u16::MAX {
                let found = prefixes.iter().filter(|prefix| prefix.contains(OUTBOUND, port)).count();
                assert_eq!(found, usize::from((first..=last).contains(&port)), "{port} of {first}-{last}");
            }
            assert!(prefixes.iter().all(|prefix| !prefix.contains(INBOUND, first)));
        }
    }

    #[test]
    fn a_key_says_what_its_entry_stands_for() {
        let ports = PortPrefix { direction: INBOUND, first: 7000, length: 13 };
        let (bits, key) = ports.key(7);
        assert_eq!((bits, key.exclusion_id(), PortPrefix::of_key(bits, &key)), (61, 7, ports));
        for (is_v4, first, length) in [(true, mapped([10, 0, 0, 0]), 104), (false, [0; 16], 0)] {
            let cidr = CidrPrefix { is_v4, first, length };
            let (bits, key) = cidr.key(7);
            assert_eq!((bits, key.exclusion_id(), CidrPrefix::of_key(bits, &key)), (64 + length, 7, cidr));
        }
    }

    #[test]
    fn no_range_has_addresses_of_the_other_family() {
        let (v4, v6) = (mapped([10, 0, 0, 1]), [0xfd; 16]);
        for length in [0, 1, 80, 95, 96] {
            let all = CidrPrefix { is_v4: false, first: [0; 16], length };
            assert!(!all.contains(&v4), "::/{length}");
            assert_eq!(all.contains(&v6), length == 0, "::/{length}");
        }
        let all = CidrPrefix { is_v4: true, first: mapped([0; 4]), length: MAPPED_BITS };
        assert!(all.contains(&v4) && !all.contains(&v6) && !all.contains(&[0; 16]));
    }
}
