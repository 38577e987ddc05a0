//! The kernel programs, against the kernel.
//!
//! Needs root, `ip` and `nsenter`. Everything happens in private cgroups, netns and bpffs mounts.

mod bench;
mod inbound;
mod lifecycle;
mod lifetime;
mod matrix;
mod names;
mod outbound;

/// Not a test: what the other tests start as the processes of pods and tunnels.
#[test]
#[ignore = "part of the privileged tests: make test"]
fn agent() {
    bench::agent::serve();
}
