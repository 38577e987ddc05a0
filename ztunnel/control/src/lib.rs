//! The control plane for clusters that have no other: discovery and certificates from Kubernetes
//! alone. Tunnels cannot tell it from Istio's.
//!
//! A module uses only modules below it in this list (a test checks it):
//!
//! * [`program`]: starts everything, and ends it
//! * [`admin`]: readiness and metrics for operators
//! * [`server`]: the gRPC server and its TLS
//! * [`discovery`]: tells tunnels of workloads, services and policies
//! * [`certificates`]: signs certificates for the pods of a tunnel's node
//! * [`authority`]: the root, and what it signs
//! * [`connection`]: a tunnel's connection, which can be cut
//! * [`callers`]: who calls, by the token
//! * [`status`]: writes what is said of policies into their statuses
//! * [`source`]: follows the API server
//! * [`pace`]: how soon a watch begins again
//! * `convert`: objects of the API → resources; pure
//! * [`metrics`]: the counters
//! * [`snapshot`]: everything that tunnels are told, at one moment
//! * `objects`: what counts of the objects of the API
//! * [`report`]: what is said of a policy in its status
//! * [`identity`]: SPIFFE ids of workloads
//! * `shares`: how many of something each has
//! * [`settings`]: names of the cluster

pub mod admin;
pub mod authority;
pub mod callers;
pub mod certificates;
pub mod connection;
mod convert;
pub mod discovery;
pub mod identity;
pub mod metrics;
mod objects;
pub mod pace;
pub mod program;
pub mod report;
pub mod server;
pub mod settings;
mod shares;
pub mod snapshot;
pub mod source;
pub mod status;

#[cfg(test)]
mod order {
    #[test]
    fn modules_use_only_what_stands_below_them() {
        testbed::module_order::assert_one_way(env!("CARGO_MANIFEST_DIR"));
    }
}
