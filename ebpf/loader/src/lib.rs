//! Loads the kernel programs, attaches them, and owns their maps. The only user of aya.
//!
//! A module uses only modules below it in this list (a test checks it):
//!
//! * [`preflight`]: what this machine lacks, found without leaving a trace
//! * [`explain`]: which rule would decide about a connection, from the maps as they are
//! * [`remove`]: takes everything away again
//! * [`lifecycle`]: events of cgroups and processes
//! * [`kernel`]: everything that one node has in the kernel, pinned in one folder of a bpffs
//! * [`pins`]: which pinned maps are adopted, and what becomes of those of other versions
//! * [`links`]: attaches programs, and replaces them in place
//! * [`netns_program`]: the program that steers arrivals, one copy for each netns
//! * [`trace_filter`]: which verdicts the programs report
//! * [`verdicts`]: how often each rule decided
//! * [`exclusions`]: exclusion lists, written whole or not at all
//! * [`listeners`]: who listens where
//! * [`maps`]: adopts maps, reads and writes them
//! * [`batch`]: whole maps in a few system calls
//! * [`trace`]: the verdicts of the programs, while somebody watches
//! * [`netns_cookie`]: which netns this thread is in, on old kernels too
//! * [`object`]: the compiled programs and where they are attached
//! * [`sys`]: system calls that no crate wraps
//! * [`btf`]: where the running kernel's structures have their members
//! * [`error`]: what was tried, on what, and what helps
//!
//! Pinned links and maps outlive this process. A successor adopts the maps with their contents and
//! replaces the programs of the links in place, so that at every moment exactly one program
//! decides. Where it has other maps, it fills them first.

mod batch;
mod btf;
mod error;
mod exclusions;
mod explain;
mod kernel;
mod lifecycle;
mod links;
mod listeners;
mod maps;
mod netns_cookie;
mod netns_program;
mod object;
mod pins;
pub mod preflight;
mod remove;
mod sys;
mod trace;
mod trace_filter;
mod verdicts;

pub use error::KernelError;
pub use exclusions::ExclusionList;
pub use kernel::Kernel;
pub use lifecycle::{Lifecycle, LifecycleEvent};
pub use maps::pin_name;
pub use netns_cookie::{own_netns_cookie, own_netns_cookie_by};
pub use remove::Removed;
pub use trace::Trace;
pub use verdicts::VerdictCounts;

#[cfg(test)]
mod order {
    #[test]
    fn modules_use_only_what_stands_below_them() {
        testbed::module_order::assert_one_way(env!("CARGO_MANIFEST_DIR"));
    }
}
