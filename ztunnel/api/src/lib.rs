//! The contracts that several parts share: protobuf definitions and the types generated from them,
//! and names that are texts; no behaviour.
//!
//! * [`zds`]: watcher (or Istio's CNI agent) → tunnel
//! * [`ca`]: tunnel → certificate service; the server half is for control planes and tests
//! * [`discovery`]: control plane → tunnel, the protocol; [`workload`] and [`security`], what it
//!   carries
//! * [`names`]: SPIFFE ids and service accounts

pub mod names;

/// The definitions themselves, an encoded `FileDescriptorSet`: for who must see what a generated
/// type leaves out.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors"));

macro_rules! generated {
    ($(#[$meta:meta])* $module:ident, $package:literal) => {
        $(#[$meta])*
        #[allow(
            clippy::all,
            clippy::pedantic,
            clippy::nursery,
            clippy::restriction,
            missing_debug_implementations,
            missing_docs,
            unreachable_pub,
            unused_qualifications,
            reason = "generated code, held to its generator's style and not to ours"
        )]
        pub mod $module {
            tonic::include_proto!($package);
        }
    };
}

generated!(
    /// Which pods the tunnel serves, one packet per message.
    zds, "istio.workload.zds"
);
generated!(
    /// Certificates by CSR.
    ca, "istio.v1.auth"
);
generated!(
    /// Delta discovery.
    discovery, "envoy.service.discovery.v3"
);
generated!(
    /// Workloads and services.
    workload, "istio.workload"
);
generated!(
    /// Policies.
    security, "istio.security"
);
