//! How records stand in a file of the last state, one after the other:
//!
//! | bytes | |
//! |---|---|
//! | 4 | length of the record, little endian |
//! | 4 | CRC-32 of these, and of everything before |
//! | length | the record |
//! | 4 | CRC-32 of the record, and of everything before |
//! | 1 | `0xad` |
//!
//! Checksums go over everything before, so that a record which is gone, or stands somewhere else, is
//! noticed at the next one. The last byte is not zero, so that a record of which only the first
//! part reached the disk is told from one that changed there: file systems show what was not
//! written as zeros.

use std::io::{self, Read, Seek, SeekFrom, Write};

use crc32fast::Hasher;

/// Length and its checksum.
const HEAD: u64 = 8;
/// What a record takes besides its own bytes.
pub(super) const FRAME: u64 = HEAD + 5;
const END: u8 = 0xad;
/// Bytes. Larger than any message of a control plane may be.
const LARGEST: u32 = 256 << 20;
/// What is looked at in one piece for its last byte that is not zero.
const BLOCK: usize = 64 << 10;

/// Writes records.
#[derive(Debug)]
pub(super) struct FrameWriter<W> {
    pub(super) to: W,
    checksum: u32,
    /// Bytes, with what stands before the first record.
    pub(super) written: u64,
}

impl<W: Write> FrameWriter<W> {
    /// Writes `preamble`, which stands before the first record.
    pub(super) fn new(mut to: W, preamble: &[u8]) -> io::Result<Self> {
        to.write_all(preamble)?;
        Ok(Self { to, checksum: checksum(0, preamble), written: preamble.len() as u64 })
    }

    /// Returns how many bytes it takes.
    pub(super) fn write(&mut self, record: &[u8]) -> io::Result<u64> {
        let too_large = || io::Error::new(io::ErrorKind::FileTooLarge, "one resource is larger than 256 MiB");
        let length = u32::try_from(record.len()).ok().filter(|length| *length <= LARGEST);
        let length = length.ok_or_else(too_large)?.to_le_bytes();
        let of_length = checksum(self.checksum, &length);
        self.checksum = checksum(of_length, record);
        self.to.write_all(&length)?;
        self.to.write_all(&of_length.to_le_bytes())?;
        self.to.write_all(record)?;
        self.to.write_all(&self.checksum.to_le_bytes())?;
        self.to.write_all(&[END])?;
        let taken = FRAME + record.len() as u64;
        self.written += taken;
        Ok(taken)
    }
}

/// Why no further record can be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A record is whole, and is not what was written.
    #[error("it is broken at byte {at}")]
    Broken { at: u64 },
}

/// Reads records up to the end, or up to one that was not written to its end.
#[derive(Debug)]
pub(super) struct FrameReader<R> {
    from: R,
    /// Bytes that there are.
    size: u64,
    /// Behind the last byte that is not zero.
    last: u64,
    pub(super) position: u64,
    checksum: u32,
    record: Vec<u8>,
}

impl<R: Read + Seek> FrameReader<R> {
    /// Reads `size` bytes of a file that begins with `preamble`, which was read.
    pub(super) fn new(mut from: R, size: u64, preamble: &[u8]) -> io::Result<Self> {
        let last = last_byte(&mut from, size)?;
        let position = preamble.len() as u64;
        from.seek(SeekFrom::Start(position))?;
        Ok(Self { from, size, last, position, checksum: checksum(0, preamble), record: Vec::new() })
    }

    /// The next record. `None`: no other was written to its end.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let left = self.size - self.position;
        if left < HEAD || self.position >= self.last {
            return Ok(None);
        }
        let mut head = [[0; 4]; 2];
        self.from.read_exact(head.as_flattened_mut())?;
        let [length, stored] = head;
        let of_length = checksum(self.checksum, &length);
        let length = u32::from_le_bytes(length);
        if of_length != u32::from_le_bytes(stored) || length > LARGEST {
            return self.unwritten_or_broken(HEAD);
        }
        let taken = FRAME + u64::from(length);
        if left < taken {
            return Ok(None);
        }
        self.record.resize(length as usize, 0);
        self.from.read_exact(&mut self.record)?;
        let mut tail = [0; 5];
        self.from.read_exact(&mut tail)?;
        let checksum = checksum(of_length, &self.record);
        let [stored @ .., end] = tail;
        if checksum != u32::from_le_bytes(stored) || end != END {
            return self.unwritten_or_broken(taken);
        }
        self.checksum = checksum;
        self.position += taken;
        Ok(Some(&self.record))
    }

    /// What does not fit its checksum was never written if nothing but zeros follows.
    fn unwritten_or_broken(&self, taken: u64) -> Result<Option<&[u8]>, FrameError> {
        if self.position + taken > self.last {
            return Ok(None);
        }
        Err(FrameError::Broken { at: self.position })
    }
}

fn checksum(before: u32, bytes: &[u8]) -> u32 {
    let mut hasher = Hasher::new_with_initial(before);
    hasher.update(bytes);
    hasher.finalize()
}

/// Behind the last of `size` bytes that is not zero.
fn last_byte<R: Read + Seek>(from: &mut R, size: u64) -> io::Result<u64> {
    let (mut end, mut block) = (size, vec![0; BLOCK]);
    while end > 0 {
        let start = end.saturating_sub(BLOCK as u64);
        #[expect(clippy::cast_possible_truncation, reason = "at most BLOCK")]
        let block = &mut block[..(end - start) as usize];
        from.seek(SeekFrom::Start(start))?;
        from.read_exact(block)?;
        if let Some(last) = block.iter().rposition(|byte| *byte != 0) {
            return Ok(start + last as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}
