//! What one record of the last state says. To change their meaning, count [`FORMAT`] up: a state of
//! another format is refused.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ztunnel_api::discovery::Resource;

use crate::discovery::{ADDRESS, AUTHORIZATION};

/// What stands before the first record, and after it [`FORMAT`], little endian.
pub(super) const MAGIC: [u8; 8] = *b"adit-xds";
/// Of the records and of how they stand in the file.
pub(super) const FORMAT: u32 = 1;

/// What stands before the first record.
pub(super) fn preamble() -> [u8; 12] {
    let mut preamble = [0; 12];
    preamble[..8].copy_from_slice(&MAGIC);
    preamble[8..].copy_from_slice(&FORMAT.to_le_bytes());
    preamble
}

/// One record.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Record {
    #[prost(oneof = "Content", tags = "1, 2, 3, 4, 5")]
    pub(super) content: Option<Content>,
}

/// What it says.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Content {
    /// The first record.
    #[prost(message, tag = "1")]
    Origin(Origin),
    /// A resource was added or changed.
    #[prost(message, tag = "2")]
    Put(Put),
    /// A resource was removed.
    #[prost(message, tag = "3")]
    Removed(Removed),
    /// A name of on-demand discovery was answered.
    #[prost(message, tag = "4")]
    Name(Name),
    /// Everything before was told, up to now.
    #[prost(message, tag = "5")]
    Told(Told),
}

/// Who was told. The state of another mesh, or of another node, is nobody's.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Origin {
    /// `node.cluster`
    #[prost(string, tag = "1")]
    pub cluster: String,
    /// `node.network`
    #[prost(string, tag = "2")]
    pub network: String,
    /// `node.trust_domain`
    #[prost(string, tag = "3")]
    pub trust_domain: String,
    /// `node.name`
    #[prost(string, tag = "4")]
    pub node: String,
    /// `xds.on_demand`: not everything was told.
    #[prost(bool, tag = "5")]
    pub on_demand: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Put {
    #[prost(enumeration = "Kind", tag = "1")]
    pub(super) kind: i32,
    #[prost(string, tag = "2")]
    pub(super) name: String,
    /// As the control plane sent it.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Removed {
    #[prost(enumeration = "Kind", tag = "1")]
    pub(super) kind: i32,
    #[prost(string, tag = "2")]
    pub(super) name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Name {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(enumeration = "Answer", tag = "2")]
    pub(super) answer: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Told {
    /// By a response of this kind; 0: the control plane is there, and nothing has changed.
    #[prost(enumeration = "Kind", tag = "1")]
    pub(super) kind: i32,
    /// Milliseconds since 1970.
    #[prost(uint64, tag = "2")]
    pub(super) at: u64,
}

/// A type of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Kind {
    None = 0,
    Address = 1,
    Authorization = 2,
}

/// What became of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Answer {
    /// It is no longer asked for.
    Forgotten = 0,
    There = 1,
    Absent = 2,
}

impl Kind {
    pub(super) fn of(type_url: &str) -> Self {
        match type_url {
            ADDRESS => Self::Address,
            AUTHORIZATION => Self::Authorization,
            _ => Self::None,
        }
    }

    pub(super) fn type_url(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Address => Some(ADDRESS),
            Self::Authorization => Some(AUTHORIZATION),
        }
    }
}

impl Content {
    pub(super) fn put(kind: Kind, resource: Resource) -> Self {
        let value = resource.resource.map(|any| any.value).unwrap_or_default();
        Self::Put(Put { kind: kind.into(), name: resource.name, value })
    }

    pub(super) fn told(kind: Kind, at: SystemTime) -> Self {
        let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::Told(Told { kind: kind.into(), at: u64::try_from(since.as_millis()).unwrap_or(u64::MAX) })
    }
}

impl Told {
    pub(super) fn time(&self) -> Option<SystemTime> {
        UNIX_EPOCH.checked_add(Duration::from_millis(self.at))
    }
}
