//! Which connections of a pod stay outside the mesh.

use crate::{address::Address, plain_data};

/// Key of `excluded_ports`; the value is one byte, 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct ExcludedPort {
    /// The list that this entry belongs to:
    /// [`CgroupInfo::exclusion_id`](crate::enrolment::CgroupInfo::exclusion_id).
    pub exclusion_id: u32,
    /// Host byte order.
    pub port: u16,
    /// [`OUTBOUND`] or [`INBOUND`].
    pub direction: u16,
}

/// The pod opens the connection.
pub const OUTBOUND: u16 = 0;
/// Somebody else opens the connection to the pod.
pub const INBOUND: u16 = 1;

/// Data part of the key of `excluded_cidrs` (LPM trie); the value is one byte, 1. Prefix lengths
/// count from the first bit of the id: 32 for the id, 96 more for an IPv4 range in mapped form.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct ExcludedCidr {
    /// As in [`ExcludedPort`], big endian: the trie compares from the most significant bit.
    pub exclusion_id_be: [u8; 4],
    /// The first address of the range.
    pub address: Address,
}

plain_data!(ExcludedPort, ExcludedCidr);
