//! The verdicts, while somebody watches.

use std::{
    fmt, mem,
    os::fd::{AsFd, BorrowedFd},
};

use adit_ebpf_common::trace::TraceRecord;
use aya::maps::{MapData, RingBuf};

/// The reader of ring buffer `trace`. One at a time: two would take each other's records.
pub struct Trace(pub(crate) RingBuf<MapData>);

impl Trace {
    /// The next record, `None` if there is none now. The file descriptor becomes readable with the next.
    #[expect(clippy::should_implement_trait, reason = "an iterator that ends would not go on")]
    pub fn next(&mut self) -> Option<TraceRecord> {
        loop {
            let item = self.0.next()?;
            // Only a program of another version writes other sizes.
            if let Ok(bytes) = <[u8; size_of::<TraceRecord>()]>::try_from(&*item) {
                return Some(parse(&bytes));
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

/// `bytes` as the kernel wrote them.
fn parse(bytes: &[u8; size_of::<TraceRecord>()]) -> TraceRecord {
    fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
        std::array::from_fn(|i| bytes[offset + i])
    }
    let number = |offset| u16::from_ne_bytes(at(bytes, offset));
    TraceRecord {
        cgroup_id: u64::from_ne_bytes(at(bytes, mem::offset_of!(TraceRecord, cgroup_id))),
        local: at(bytes, mem::offset_of!(TraceRecord, local)),
        remote: at(bytes, mem::offset_of!(TraceRecord, remote)),
        local_port: number(mem::offset_of!(TraceRecord, local_port)),
        remote_port: number(mem::offset_of!(TraceRecord, remote_port)),
        hook: number(mem::offset_of!(TraceRecord, hook)),
        rule: number(mem::offset_of!(TraceRecord, rule)),
    }
}
