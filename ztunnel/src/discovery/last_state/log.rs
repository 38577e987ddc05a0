//! The file in which this process keeps what it is told, record by record.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    hash::{BuildHasher, RandomState},
    io::{self, BufReader, BufWriter, Write as _},
    path::Path,
    time::SystemTime,
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
};
use prost::Message as _;

use super::{
    folder::{Folder, OwnFile},
    frame::{FrameReader, FrameWriter},
    record::{Answer, Content, Kind, Origin, Record, preamble},
};

/// Bytes. A file is not rewritten for less that nobody needs any more.
const SMALL: u64 = 1 << 20;

/// In place of a kind of resource, for names.
const NAME: i32 = -1;
/// In this order they stand in a file that was rewritten.
const KINDS: [Kind; 2] = [Kind::Authorization, Kind::Address];

/// The file, and what of it is still true.
#[derive(Debug)]
pub(super) struct Log {
    own: OwnFile,
    frames: FrameWriter<BufWriter<File>>,
    on_demand: bool,
    /// Of each resource and name that is there, by its hash: the bytes of its last record.
    sizes: HashMap<u64, u64>,
    hasher: RandomState,
    /// Their sum.
    live: u64,
    /// Whether the control plane has told policies, and addresses.
    told: [bool; 2],
    told_at: Option<SystemTime>,
    is_published: bool,
    /// Something was written since the file was last synced.
    is_dirty: bool,
}

impl Log {
    /// Begins a file in which nothing was told yet. `reserve`: bytes that the disk must have room
    /// for.
    pub(super) fn begin(folder: &Folder, origin: &Origin, reserve: u64) -> io::Result<Self> {
        let own = folder.create()?;
        match Self::in_file(&own, reserve) {
            Ok(frames) => {
                let mut log = Self {
                    own,
                    frames,
                    on_demand: origin.on_demand,
                    sizes: HashMap::new(),
                    hasher: RandomState::new(),
                    live: 0,
                    told: [false; 2],
                    told_at: None,
                    is_published: false,
                    is_dirty: false,
                };
                log.append(Content::Origin(origin.clone()))?;
                Ok(log)
            }
            Err(error) => {
                let _ = own.remove();
                Err(error)
            }
        }
    }

    fn in_file(own: &OwnFile, reserve: u64) -> io::Result<FrameWriter<BufWriter<File>>> {
        if reserve > 0 {
            let length = reserve.try_into().unwrap_or(i64::MAX);
            match fallocate(&*own.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, length) {
                Ok(()) | Err(Errno::EOPNOTSUPP) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        FrameWriter::new(BufWriter::new(own.file.try_clone()?), &preamble())
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.own.path
    }

    /// Bytes.
    pub(super) fn size(&self) -> u64 {
        self.frames.written
    }

    /// Bytes of what is still true.
    pub(super) fn live(&self) -> u64 {
        self.live
    }

    /// Adds a record. It may stay in memory until the next one of what was [told](Content::Told).
    pub(super) fn append(&mut self, content: Content) -> io::Result<()> {
        let key = key_of(&content).map(|(key, is_there)| (self.hasher.hash_one(key), is_there));
        if let Content::Told(told) = &content {
            for (is_told, kind) in self.told.iter_mut().zip(KINDS) {
                *is_told |= told.kind() == kind;
            }
            self.told_at = told.time();
        }
        let is_end = matches!(content, Content::Told(_));
        let taken = self.frames.write(&Record { content: Some(content) }.encode_to_vec())?;
        self.is_dirty = true;
        if let Some((hash, is_there)) = key {
            let before = if is_there { self.sizes.insert(hash, taken) } else { self.sizes.remove(&hash) };
            self.live = self.live - before.unwrap_or(0) + if is_there { taken } else { 0 };
        }
        if is_end {
            // With the kernel it outlives this process.
            self.frames.to.flush()?;
        }
        Ok(())
    }

    /// Whether all of it was told, so that others may use it.
    pub(super) fn is_complete(&self) -> bool {
        let [policies, addresses] = self.told;
        policies && (addresses || self.on_demand)
    }

    /// Whether others find it.
    pub(super) fn is_published(&self) -> bool {
        self.is_published
    }

    /// Whether others find something that may not be on the disk yet.
    pub(super) fn is_due_to_sync(&self) -> bool {
        self.is_published && self.is_dirty
    }

    /// Lets others find it.
    pub(super) fn publish(&mut self) -> io::Result<()> {
        self.frames.to.flush()?;
        self.own.publish()?;
        (self.is_published, self.is_dirty) = (true, false);
        Ok(())
    }

    /// Waits until it is on the disk.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.frames.to.flush()?;
        self.own.file.sync_data()?;
        self.is_dirty = false;
        Ok(())
    }

    /// Whether most of it is no longer true.
    pub(super) fn is_mostly_past(&self) -> bool {
        self.is_published && self.size() > SMALL + 2 * self.live
    }

    /// The same in a new file, without what is no longer true; policies first.
    pub(super) fn compacted(&mut self, folder: &Folder, origin: &Origin) -> io::Result<Self> {
        self.frames.to.flush()?;
        let mut new = Self::begin(folder, origin, self.live)?;
        let copied = self.copy_to(&mut new).and_then(|()| new.publish());
        if let Err(error) = copied {
            let _ = new.remove();
            return Err(error);
        }
        Ok(new)
    }

    fn copy_to(&self, new: &mut Self) -> io::Result<()> {
        let from = BufReader::new(File::open(&self.own.path)?);
        let mut last: HashMap<(i32, String), u64> = HashMap::new();
        let mut records = FrameReader::new(from, self.size(), &preamble())?;
        while let Some((at, content)) = next(&mut records)? {
            if let Some(((kind, name), is_there)) = key_of(&content) {
                let key = (kind, name.to_owned());
                last.remove(&key);
                last.extend(is_there.then_some((key, at)));
            }
        }
        let of = |policies: bool| -> HashSet<u64> {
            let is = |kind: i32| (kind == i32::from(Kind::Authorization)) == policies;
            last.iter().filter(|((kind, _), _)| is(*kind)).map(|(_, at)| *at).collect()
        };
        for positions in [of(true), of(false)] {
            let from = BufReader::new(File::open(&self.own.path)?);
            let mut records = FrameReader::new(from, self.size(), &preamble())?;
            while let Some((at, content)) = next(&mut records)? {
                if positions.contains(&at) {
                    new.append(content)?;
                }
            }
        }
        let told_at = self.told_at.unwrap_or_else(SystemTime::now);
        for (kind, is_told) in KINDS.into_iter().zip(self.told) {
            if is_told {
                new.append(Content::told(kind, told_at))?;
            }
        }
        Ok(())
    }

    /// Removes the file.
    pub(super) fn remove(self) -> io::Result<()> {
        self.own.remove()
    }
}

/// Of which resource or name a record is, and whether that is there from then on.
fn key_of(content: &Content) -> Option<((i32, &str), bool)> {
    match content {
        Content::Put(put) => Some(((put.kind, &put.name), true)),
        Content::Removed(removed) => Some(((removed.kind, &removed.name), false)),
        Content::Name(name) => Some(((NAME, &name.name), name.answer() != Answer::Forgotten)),
        Content::Origin(_) | Content::Told(_) => None,
    }
}

/// The next record of this process's own file, and where it begins.
fn next(records: &mut FrameReader<BufReader<File>>) -> io::Result<Option<(u64, Content)>> {
    let at = records.position;
    let broken =
        || io::Error::new(io::ErrorKind::InvalidData, format!("its own file is broken at byte {at}"));
    let Some(record) = records.next().map_err(|_| broken())? else { return Ok(None) };
    let content = Record::decode(record).ok().and_then(|record| record.content).ok_or_else(broken)?;
    Ok(Some((at, content)))
}
