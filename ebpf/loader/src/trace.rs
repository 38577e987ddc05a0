//! The verdicts of the programs, while somebody watches.

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd},
};

use adit_ebpf_common::trace::TraceRecord;
use aya::maps::{MapData, RingBuf};
use zerocopy::FromBytes as _;

/// The size of ring buffer `trace`, in bytes.
const BUFFER: usize = 256 << 10;

/// The reader of ring buffer `trace`. One at a time: two would take each other's records.
pub struct Trace(pub(crate) RingBuf<MapData>);

impl Trace {
    /// Drops the records that are there now, and no more than the buffer holds: the programs may
    /// add some meanwhile.
    pub fn skip(&mut self) {
        for _ in 0..BUFFER / size_of::<TraceRecord>() {
            if self.0.next().is_none() {
                return;
            }
        }
    }

    /// The next record, `None` if there is none now. The file descriptor becomes readable with the
    /// next.
    #[expect(clippy::should_implement_trait, reason = "an iterator that ends would not go on")]
    pub fn next(&mut self) -> Option<TraceRecord> {
        loop {
            let item = self.0.next()?;
            // Only a program of another version writes other sizes.
            if let Ok(record) = TraceRecord::read_from_bytes(&item) {
                return Some(record);
            }
        }
    }
}

impl AsFd for Trace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trace").finish_non_exhaustive()
    }
}
