//! The far ends of the programs under test: they speak the protocol, and do what a test wants to
//! see handled.

mod fake_agent;
mod fake_ca;
mod fake_control_plane;
mod fake_resolver;
pub(crate) mod fake_tunnel;

pub use self::{
    fake_agent::FakeAgent,
    fake_ca::FakeCa,
    fake_control_plane::FakeControlPlane,
    fake_resolver::{FakeResolver, Query, RESOLVER_ADDRESSES},
    fake_tunnel::{FakeTunnel, Received},
};
