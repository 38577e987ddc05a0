//! Follows one connection from accept to close.
//!
//! * [`outbound`]: what an application of a served pod dials
//! * [`inbound`]: what comes to a served pod through a peer's tunnel
//! * [`inbound_plain`]: what comes to a served pod as it is
//! * `admission`: whether a client may reach a pod, and for how long
//! * `application`: dials the application of a pod
//! * [`error`]: why a connection did not come to be, or broke

mod admission;
mod application;
pub mod error;
pub mod inbound;
pub mod inbound_plain;
pub mod outbound;
