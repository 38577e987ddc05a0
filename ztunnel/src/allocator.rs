//! The allocator of this program: jemalloc, able to profile itself, not doing so until asked.

mod sys;

/// Buffers of 256 KiB come and go with every read: glibc gives such memory back to the kernel each time and
/// pays for it in page faults, a third of the time of a bulk transfer.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
