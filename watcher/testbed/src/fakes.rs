//! The far ends of the programs under test: they speak the protocol, and do what a test wants to see
//! handled.

mod fake_ca;
pub(crate) mod fake_tunnel;

pub use self::{
    fake_ca::FakeCa,
    fake_tunnel::{FakeTunnel, Received},
};
