//! Follows one connection from accept to close.
//!
//! * [`outbound`]: connections that an application of a served pod makes
//! * [`inbound`]: connections to a served pod through a peer's tunnel
//! * [`inbound_plain`]: plaintext connections to a served pod
//! * `client`: what is done for it while it waits
//! * `admission`: whether a client may reach a pod, and for how long
//! * `application`: dials the application of a pod
//! * [`error`]: why a connection failed

mod admission;
mod application;
mod client;
pub(crate) mod error;
pub(crate) mod inbound;
pub(crate) mod inbound_plain;
pub(crate) mod outbound;
