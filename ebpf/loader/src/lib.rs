//! Loads the kernel programs, attaches them, and owns their maps. The only user of aya.
//!
//! * [`Kernel`]: everything that one node has in the kernel, pinned in one folder of a bpffs
//! * [`Trace`]: the verdicts, while somebody watches
//! * [`Lifecycle`]: what happens to cgroups and processes
//! * [`own_netns_cookie`], [`own_netns_cookie_by`]: which netns this thread is in, on old kernels too
//! * [`preflight`]: what this machine lacks, asked without leaving a trace
//! * [`KernelError`]: what was tried, on what, and what helps
//!
//! Pinned links and maps outlive this process. A successor adopts the maps with their contents and
//! replaces the programs of the links in place, so that there is neither a gap nor a moment with two.

mod btf;
mod error;
mod kernel;
mod lifecycle;
mod links;
mod maps;
mod netns_cookie;
mod object;
pub mod preflight;
mod remove;
mod sys;
mod trace;

pub use error::KernelError;
pub use kernel::Kernel;
pub use lifecycle::{Lifecycle, LifecycleEvent};
pub use netns_cookie::{own_netns_cookie, own_netns_cookie_by};
pub use remove::Removed;
pub use trace::Trace;
