//! The node tunnel: carries the TCP connections of enrolled workloads over HBONE.
//!
//! * [`worker`]: one single-threaded runtime per core; a connection lives and dies on its worker
//! * [`pods`]: which netns are served: told by ZDS, listened in by every worker
//! * [`discovery`]: what there is, from a control plane
//! * [`outbound`], [`inbound`], [`inbound_plain`]: follow one connection from accept to close
//! * [`dns`]: answers names of the mesh in each pod's netns
//! * [`hbone`]: HTTP/2 CONNECT in mutual TLS, as client (pooled) and as server
//! * [`stream`]: copies both ways until both sides are done, or one breaks
//! * [`socket`]: the few socket options that carry the design
//! * [`admin`], [`drain`]: what operators see and how the process ends
//! * [`record`], [`metrics`]: one access record per connection, and the counters
//! * [`lookup`]: addresses of workloads that are known by name alone
//! * [`route`], [`policy`]: where to, and whether; pure
//! * [`mesh`]: what is known of others: workloads, services, policies
//! * [`identity`]: who we are: SPIFFE ids, certificates, whom to trust
//! * [`control_plane`]: how a control plane is called; [`backoff`]: pauses between attempts;
//!   [`stamp`]: whether a file changed
//! * [`logging`]: the log and its filter
//! * [`config`]: what all of them rest on
//!
//! A module uses only modules below it in this list.

pub mod admin;
pub mod backoff;
pub mod config;
pub mod control_plane;
pub mod discovery;
pub mod dns;
pub mod drain;
pub mod hbone;
pub mod identity;
pub mod inbound;
pub mod inbound_plain;
pub mod logging;
pub mod lookup;
pub mod mesh;
pub mod metrics;
pub mod outbound;
pub mod pods;
pub mod policy;
pub mod record;
pub mod route;
pub mod socket;
pub mod stamp;
pub mod stream;
pub mod worker;
