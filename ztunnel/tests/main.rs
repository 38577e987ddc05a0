//! The tunnel as a program: with fake node agents, resolvers and control planes, with Envoy at the other end; and
//! the documents that list its behaviours.

mod behaviours;
mod connections;
mod control_plane;
mod dns;
mod envoy;
mod gateways;
mod hbone;
mod operators;
mod pods;
mod revocations;
