//! Reads a last state, or says why it cannot be used.
//!
//! It is used as a whole or not at all. The end may be missing, as when the process or the machine
//! stopped while it was written: then it is what was told up to the last response that is whole,
//! which was in force once. But where something in it is not what was written, more was told than
//! can be read, perhaps a policy that denies: such a state is not used. Nor is one that ends before
//! every kind of resource was told.

use std::{
    io::{self, Read, Seek, SeekFrom},
    time::SystemTime,
};

use prost::Message as _;
use prost_types::Any;
use ztunnel_api::discovery::{DeltaDiscoveryResponse, Resource};

use super::{
    frame::{FrameError, FrameReader},
    record::{Answer, Content, FORMAT, Kind, MAGIC, Origin, Record, preamble},
};

/// Resources that are decoded in one go.
const BATCH: usize = 1000;

/// Why a state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UnusableState {
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Something else.
    #[error("it is not a state that a tunnel has kept")]
    Foreign,
    /// Of an older or a newer tunnel.
    #[error("it has format {found}, and this tunnel reads format {FORMAT} alone")]
    Format {
        /// Its format.
        found: u32,
    },
    /// Of another mesh, or of another node.
    #[error("it was told to a tunnel with {key} {theirs:?}, and this one has {ours:?}")]
    Origin {
        /// The key of the configuration that differs.
        key: &'static str,
        /// What it was there.
        theirs: String,
        /// What it is here.
        ours: String,
    },
    /// A record is not what was written.
    #[error("it is broken at byte {at}: policies may have been told that cannot be read")]
    Broken {
        /// Where the first such record begins.
        at: u64,
    },
    /// It ends too early.
    #[error("it ends before the control plane had told every kind of resource")]
    Incomplete,
}

impl From<FrameError> for UnusableState {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Io(error) => Self::Io(error),
            FrameError::Broken { at } => Self::Broken { at },
        }
    }
}

/// A state that may be used.
#[derive(Debug)]
pub struct KeptState<R> {
    from: R,
    /// Behind the last response that is whole.
    end: u64,
    /// When the control plane was there last.
    pub told_at: SystemTime,
}

/// A piece of a state, in the order in which it was told.
#[derive(Debug)]
pub enum Piece {
    /// As the control plane sent it, or a part of that.
    Response(DeltaDiscoveryResponse),
    /// A name of on-demand discovery was answered: whether it is there. `None`: it is no longer
    /// asked for.
    Name(String, Option<bool>),
}

impl<R: Read + Seek> KeptState<R> {
    /// Reads everything once, and uses nothing yet. `ours`: who wants to use it.
    ///
    /// # Errors
    /// [`UnusableState`]
    pub fn open(mut from: R, ours: &Origin) -> Result<Self, UnusableState> {
        let size = from.seek(SeekFrom::End(0))?;
        check_preamble(&mut from, size)?;
        let mut records = FrameReader::new(&mut from, size, &preamble())?;
        let (mut policies, mut addresses, mut told) = (false, ours.on_demand, None);
        let mut at = records.position;
        let mut first = true;
        while let Some(record) = records.next()? {
            let broken = || UnusableState::Broken { at };
            let content = Record::decode(record).ok().and_then(|record| record.content).ok_or_else(broken)?;
            match content {
                Content::Origin(theirs) if first => check_origin(&theirs, ours)?,
                Content::Put(put) if !first && put.kind() != Kind::None => {}
                Content::Removed(removed) if !first && removed.kind() != Kind::None => {}
                Content::Name(_) if !first => {}
                Content::Told(now) if !first => {
                    policies |= now.kind() == Kind::Authorization;
                    addresses |= now.kind() == Kind::Address;
                    told = Some((records.position, now.time().ok_or_else(broken)?));
                }
                _ => return Err(broken()),
            }
            first = false;
            at = records.position;
        }
        match told {
            Some((end, told_at)) if policies && addresses => Ok(Self { from, end, told_at }),
            _ => Err(UnusableState::Incomplete),
        }
    }

    /// Gives everything that was told to `take`.
    ///
    /// # Errors
    /// It changed since it was opened, which nobody does, or cannot be read.
    pub fn replay(&mut self, mut take: impl FnMut(Piece)) -> Result<(), UnusableState> {
        let mut records = FrameReader::new(&mut self.from, self.end, &preamble())?;
        let mut batch = Batch::default();
        loop {
            let at = records.position;
            let Some(record) = records.next()? else { break };
            let broken = |_| UnusableState::Broken { at };
            match Record::decode(record).map_err(broken)?.content {
                Some(Content::Put(put)) => {
                    batch.make_room(put.kind(), false, &mut take);
                    let value = Any { type_url: batch.response.type_url.clone(), value: put.value };
                    let resource = Resource { name: put.name, resource: Some(value), ..Resource::default() };
                    batch.response.resources.push(resource);
                }
                Some(Content::Removed(removed)) => {
                    batch.make_room(removed.kind(), true, &mut take);
                    batch.response.removed_resources.push(removed.name);
                }
                Some(Content::Name(name)) => {
                    let there = match name.answer() {
                        Answer::There => Some(true),
                        Answer::Absent => Some(false),
                        Answer::Forgotten => None,
                    };
                    take(Piece::Name(name.name, there));
                }
                Some(Content::Origin(_) | Content::Told(_)) | None => {}
            }
        }
        batch.give(&mut take);
        if records.position < self.end {
            return Err(UnusableState::Broken { at: records.position });
        }
        Ok(())
    }
}

/// Resources of one kind. What is removed comes before what is put, as in a response.
#[derive(Default)]
struct Batch {
    response: DeltaDiscoveryResponse,
}

impl Batch {
    fn make_room(&mut self, kind: Kind, removed: bool, take: &mut impl FnMut(Piece)) {
        let type_url = kind.type_url().unwrap_or_default();
        let response = &self.response;
        let count = response.resources.len() + response.removed_resources.len();
        if response.type_url != type_url || count >= BATCH || (removed && !response.resources.is_empty()) {
            self.give(take);
            type_url.clone_into(&mut self.response.type_url);
        }
    }

    fn give(&mut self, take: &mut impl FnMut(Piece)) {
        let response = std::mem::take(&mut self.response);
        if !response.resources.is_empty() || !response.removed_resources.is_empty() {
            take(Piece::Response(response));
        }
    }
}

fn check_preamble<R: Read + Seek>(from: &mut R, size: u64) -> Result<(), UnusableState> {
    let mut found = preamble();
    if size < found.len() as u64 {
        return Err(UnusableState::Foreign);
    }
    from.seek(SeekFrom::Start(0))?;
    from.read_exact(&mut found)?;
    let ([magic @ .., _, _, _, _], [.., a, b, c, d]) = (found, found);
    match u32::from_le_bytes([a, b, c, d]) {
        _ if magic != MAGIC => Err(UnusableState::Foreign),
        FORMAT => Ok(()),
        found => Err(UnusableState::Format { found }),
    }
}

fn check_origin(theirs: &Origin, ours: &Origin) -> Result<(), UnusableState> {
    let text = |origin: &Origin, key| match key {
        "node.cluster" => origin.cluster.clone(),
        "node.network" => origin.network.clone(),
        "node.trust_domain" => origin.trust_domain.clone(),
        "node.name" => origin.node.clone(),
        _ => origin.on_demand.to_string(),
    };
    for key in ["node.cluster", "node.network", "node.trust_domain", "node.name", "xds.on_demand"] {
        let (theirs, ours) = (text(theirs, key), text(ours, key));
        if theirs != ours {
            return Err(UnusableState::Origin { key, theirs, ours });
        }
    }
    Ok(())
}
