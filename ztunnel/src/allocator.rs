//! The allocator of this program: jemalloc. It can profile the heap; profiling starts on request.

mod sys;

/// Every read allocates and frees buffers of up to 256 KiB. glibc returns such memory to the kernel
/// each time; the page faults took a third of the time of a bulk transfer.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
