//! The tunnel as a program: with fake node agents, resolvers and control planes, with Envoy at the
//! other end; and the documents that list its behaviours.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unreachable_pub, reason = "modules of a test program share helpers; nothing else can reach them")]

mod behaviours;
mod connections;
mod control_plane;
mod dns;
mod drop_in;
mod envoy;
mod gateways;
mod handover;
mod hbone;
mod last_state;
mod new_pods;
mod operators;
mod pods;
mod policy_known;
mod revocations;
mod same_node;
mod scrapers;
mod supervision;
mod trust_domains;
