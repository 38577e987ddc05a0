//! The watcher as a program: on nodes made of network namespaces and cgroups, with real and fake
//! tunnels, with a real API server.
//!
//! The tests need root. They make private netns, cgroups and mounts, and remove them (`testbed`).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unreachable_pub, reason = "modules of a test program share helpers; nothing else can reach them")]

mod arrival;
mod boot;
mod capture;
mod chart;
mod churn;
mod clear;
mod container_nodes;
mod counts;
mod dns;
mod excluded_interfaces;
mod exclusions;
mod faults;
mod guards;
mod interfaces;
mod istio_rules;
mod kernels;
mod kubelet;
mod kubernetes;
mod kubernetes_access;
mod kubernetes_faults;
mod kubernetes_lists;
mod kubernetes_mesh;
mod kubernetes_taint;
mod kubernetes_truth;
mod labels;
mod mesh;
mod neighbours;
mod preflight;
mod reserved_ports;
mod sidecars;
mod sockets;
mod trace;
mod upgrade;
mod zds;

/// Not a test: the others start it as processes of pods and tunnels (`testbed::helper`).
#[test]
#[ignore = "started by other tests"]
fn helper() {
    testbed::roles::serve();
}
