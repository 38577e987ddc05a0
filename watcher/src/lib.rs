//! The watcher: knows which processes are which pod, keeps the kernel's maps and links in step with
//! that, and hands each enrolled pod's netns to the node's tunnel. It never touches traffic.
//!
//! * [`desired`]: what should be, from a source of pods
//! * [`observed`]: what is there, from cgroups and `/proc`
//! * [`reconcile`]: desired × observed × applied → steps; pure
//! * [`enrol`]: how a step is done: netns, maps, links, hand-over to the tunnel (ZDS)
//! * [`node`]: the loop that owns all state and drives the above
//! * [`control`]: the socket by which commands ask a running watcher
//! * [`metrics`]: what operators count, and readiness
//! * [`status`], [`explain`]: what is asked
//! * [`reason`]: why something is not as wished
//! * [`unix_socket`]: sockets that replace a dead one and leave no file
//! * [`cli`]: one file per command
//!
//! Level-triggered: every event leads to a fresh look and a comparison, and a periodic scan makes up
//! for events that were lost. An event can only make things faster.

pub mod cli;
pub mod control;
pub mod desired;
pub mod enrol;
pub mod explain;
pub mod metrics;
pub mod node;
pub mod observed;
pub mod reason;
pub mod reconcile;
pub mod status;
mod sys;
pub mod unix_socket;
