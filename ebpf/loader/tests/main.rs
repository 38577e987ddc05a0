//! The kernel programs, against the kernel.
//!
//! Needs root, `ip` and `nsenter`. Everything happens in private cgroups, netns and bpffs mounts.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unreachable_pub, reason = "modules of a test program share helpers; nothing else can reach them")]

mod dns;
mod entries;
mod exclusions;
mod explain;
mod flows;
mod inbound;
mod lifecycle;
mod lifetime;
mod matrix;
mod outbound;
mod ports;
mod property;
mod rig;
mod upgrade;
mod verdicts;

/// Not a test: the other tests start it as the processes of pods and tunnels.
#[test]
#[ignore = "part of the privileged tests: make test"]
fn helper() {
    rig::agent::serve();
}
