//! A test bed: nodes made of network namespaces, pods made of cgroups and network namespaces, and on
//! each node the real `watcher` and the real `ztunnel`. Used by the end-to-end tests, the demo and
//! the benchmark.
//!
//! ```text
//!   pod ─eth0── bridge ┐ node a ─ link0 ════ link0 ─ node b ┌ bridge ──eth0─ pod
//!   10.77.1.x, fd77:1::x                                      10.77.2.x, fd77:2::x
//! ```
//!
//! Every bed has names of its own, so beds can stand side by side; dropping it removes all of it.
#![allow(dead_code, unused_imports, reason = "each program that includes this uses a part of it")]

pub mod ca;
pub mod cgroups;
pub mod cluster;
pub mod interrupt;
pub mod load;
pub mod node;
pub mod pod;
pub mod process;

pub use cluster::Bed;
pub use pod::{Enrol, Pod};
pub use process::wait_for;
