//! The control plane as a program, with the chart's rights, against a real API server. Its
//! clients are the tunnel's own, and bare ones where a tunnel would not misbehave.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]
#![allow(unreachable_pub, reason = "modules of a test program share helpers; nothing else can reach them")]

mod addresses;
mod away;
mod certificates;
mod clocks;
mod discovery;
mod foreign;
mod outage;
mod policies;
mod replica;
mod rig;
mod root;
mod rotation;
mod shares;
mod streams;
mod stuck;
mod tunnels;
mod turns;
