//! What the tests, the demo and the benchmarks of all crates stand on. It depends on neither
//! program: they run as binaries. No program depends on it.
//!
//! * [`doc_table`]: checks tables of `docs/` against the code that they are made from
//! * [`doc_commands`]: checks that a program takes the commands that documents name
//! * [`module_order`]: checks that a crate's modules depend on each other in the order that its
//!   root lists
//! * [`roles`]: what helpers do
//! * [`pod_grpc`]: a program for pods that answers gRPC probes
//! * [`pod_http`]: programs for pods that speak HTTP
//! * [`pod_program`]: a program for pods that dials and serves
//! * [`capture`]: what leaves the pods of a node
//! * [`label_latency`]: how long a label takes, at a node whose pods talk
//! * [`istio_rules`]: what Istio's node agent leaves in pods
//! * [`traffic`]: requests through a cluster
//! * [`cluster`]: two nodes with real watchers and real tunnels
//! * [`api_node`]: a node whose watcher follows an API server
//! * [`real_cluster`]: a real cluster: control plane, kubelets, containerd
//! * [`image`]: container images of the programs that the tests built
//! * [`istio`]: Istio's own programs and charts
//! * [`api_server`]: a real API server with its store
//! * [`chart`]: the Helm chart, rendered by Helm
//! * [`watcher_node`]: a node with a watcher and no tunnel
//! * [`tunnel_mesh`]: nodes with a real tunnel and a fake agent each
//! * [`fakes`]: the far ends of the programs under test
//! * [`mesh_pod`]: the pods of a tunnel mesh
//! * [`cryptography`]: which library those use that ask for a choice
//! * [`lend`]: sockets that a helper makes in a cgroup
//! * [`helper`]: this executable once more, as a process elsewhere
//! * [`process`]: programs in a cgroup and a netns, which end with their owner
//! * [`program`]: where the programs under test are, and how large the tests
//! * [`task_limit`]: limits the threads of a process
//! * [`netns`], [`cgroup`], [`mount`]: guards for what the kernel keeps by name
//! * [`interrupt`], [`command`], [`wait`]: notice Ctrl-C; run a command; wait for a condition

#![expect(clippy::disallowed_methods, reason = "who runs the tests says by the environment where things are")]
#![allow(
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    clippy::new_without_default,
    clippy::unwrap_used,
    reason = "a helper that fails ends its test by panicking"
)]

pub mod api_node;
pub mod api_server;
pub mod capture;
pub mod cgroup;
pub mod chart;
pub mod cluster;
pub mod command;
pub mod cryptography;
pub mod doc_commands;
pub mod doc_table;
pub mod fakes;
pub mod helper;
pub mod image;
pub mod interrupt;
pub mod istio;
pub mod istio_rules;
pub mod label_latency;
pub mod lend;
pub mod mesh_pod;
pub mod module_order;
pub mod mount;
pub mod netns;
mod pod_grpc;
mod pod_http;
pub mod pod_program;
pub mod process;
pub mod program;
pub mod real_cluster;
pub mod roles;
pub mod task_limit;
pub mod traffic;
pub mod tunnel_mesh;
pub mod wait;
pub mod watcher_node;

#[cfg(test)]
mod tests {
    #[test]
    fn modules_use_only_modules_below_them() {
        crate::module_order::assert_one_way(env!("CARGO_MANIFEST_DIR"));
    }
}
