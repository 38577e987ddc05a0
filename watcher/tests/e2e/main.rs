//! Adit in a real cluster: real kubelets, containerd and runc, installed by Helm. `make e2e` runs
//! it.
//!
//! Each test has a cluster of its own, and tells one story in it: what an operator does, and what
//! pods notice of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unreachable_pub, reason = "modules of a test program share helpers; nothing else can reach them")]

mod docs;
mod faults;
mod first;
mod install;
mod istio;
mod istio_switch;
mod istioctl;
mod istiod;
mod lifecycle;
mod networks;
mod policies;
mod probes;
mod rig;
mod rollout;
mod traffic;
mod workloads;
