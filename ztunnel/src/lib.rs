//! The node tunnel: carries the TCP connections of enrolled workloads over HBONE.
//!
//! A module uses only modules below it in this list (a test checks it):
//!
//! * [`admin`]: HTTP servers for operators
//! * [`pods`]: which netns are served, as ZDS says
//! * [`worker`]: one single-threaded runtime per core; a connection lives and dies on its worker
//! * `connection`: follows one connection from accept to close
//! * [`dns`]: answers names of the mesh in each pod's netns
//! * `workload_lookup`: what a connection must know before it can be judged
//! * [`context`]: the handles that a connection is given
//! * `threads`: threads that serve pods
//! * [`hbone`]: HTTP/2 CONNECT in mutual TLS, as client (pooled) and as server
//! * `stream`: copies both ways until both sides are done, or one breaks
//! * [`discovery`]: workloads, services and policies from a control plane
//! * `record`: one access record per connection
//! * [`logging`]: the log and its filter
//! * [`metrics`]: the counters
//! * `lookup`: addresses of workloads that are known by name alone
//! * `route`: where to; pure
//! * [`pod`]: a pod that is served
//! * `policy`: whether a connection may pass
//! * [`mesh`]: what is known of others: workloads, services, policies
//! * [`memory`]: budgets for what streams have received and nobody has taken yet
//! * [`identity`]: SPIFFE ids, certificates, verification of peers
//! * [`control_plane`]: gRPC channels to a control plane
//! * [`budget`]: what one pod may take of what all share
//! * `socket`: the few socket options that carry the design
//! * [`drain`]: how the process shuts down
//! * [`reason`], [`readiness`], `direction`, `backoff`, `error_chain`, `file_version`, `rarely`:
//!   values that others share
//! * [`supervision`]: what must not end before the process does
//! * [`config`]: the configuration

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test's tasks end with its runtime"))]

pub mod admin;
mod backoff;
pub mod budget;
pub mod config;
mod connection;
pub mod context;
pub mod control_plane;
mod direction;
pub mod discovery;
pub mod dns;
pub mod drain;
mod error_chain;
mod file_version;
pub mod hbone;
pub mod identity;
pub mod logging;
mod lookup;
pub mod memory;
pub mod mesh;
pub mod metrics;
pub mod pod;
pub mod pods;
mod policy;
mod rarely;
pub mod readiness;
pub mod reason;
mod record;
mod route;
mod socket;
mod stream;
pub mod supervision;
mod threads;
pub mod worker;
mod workload_lookup;

#[cfg(test)]
mod order {
    #[test]
    fn modules_use_only_what_stands_below_them() {
        testbed::module_order::assert_one_way(env!("CARGO_MANIFEST_DIR"));
    }
}
