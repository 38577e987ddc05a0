//! The watcher: knows which processes are which pod, keeps the kernel's maps and links in step with
//! that, and hands each enrolled pod's netns to the node's tunnel. It never touches traffic.
//!
//! A module uses only modules below it in this list (a test checks it):
//!
//! * [`agent`]: the loop that owns all state and drives the rest
//! * [`control`]: the socket by which commands ask a running watcher; status and explain
//! * [`preflight`]: whether this process sees the node as the watcher must
//! * `admin_http`: `/metrics` and `/healthz/ready` over HTTP
//! * `metrics`: what operators count, and readiness
//! * [`apply`]: does what the plan says: netns, maps, links, hand-over to the tunnel (ZDS)
//! * `plan`: pods × observations × what is applied → steps; pure
//! * [`source`]: where pods come from
//! * [`observe`]: what is there, from cgroups and `/proc`
//! * [`unix_socket`]: sockets that replace a dead one and leave no file
//! * `sys`: what needs `unsafe`
//! * [`model`]: the values that all of them speak in
//!
//! Level-triggered: every event leads to a fresh look and a comparison, and a periodic scan makes
//! up for events that were lost. An event can only make things faster.

mod admin_http;
pub mod agent;
pub mod apply;
pub mod control;
mod metrics;
pub mod model;
pub mod observe;
mod plan;
pub mod preflight;
pub mod source;
mod sys;
pub mod unix_socket;

#[cfg(test)]
mod order {
    #[test]
    fn modules_use_only_what_stands_below_them() {
        testbed::module_order::assert_one_way(env!("CARGO_MANIFEST_DIR"));
    }
}
