//! Workloads, services and policies from a control plane: Envoy's delta xDS with Istio's resources.
//!
//! * `client`: keeps a stream to the control plane open
//! * `state`: what is held, and what a response changes of it
//! * [`last_state`]: keeps what was told, for a tunnel that starts while the control plane is away
//! * [`delta`]: requests and responses of one resource type, and what stays known across streams
//! * `demand`: subscribes to names when a connection needs them
//! * [`convert`]: protobuf resource → mesh type, validated as a whole
//! * `unknown_fields`: finds what a newer control plane added to a message
//! * [`interner`]: shares what many resources have in common

pub mod client;
mod convert;
pub mod delta;
pub mod demand;
mod interner;
pub mod last_state;
mod state;
mod unknown_fields;

use prost::Message as _;
use prost_types::Any;
use ztunnel_api::{
    security::Authorization,
    workload::{Address, address},
};

pub use convert::InvalidResource;
use interner::Interner;

use crate::mesh::{MeshChange, local_file::ResourceDefaults, workloads::Common};

/// Workloads and services.
pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
/// Policies.
pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

/// Decodes resources of one control plane. Equal texts of different resources share one allocation.
#[derive(Debug)]
pub struct ResourceDecoder {
    /// For fields that resources may leave out.
    defaults: ResourceDefaults,
    texts: Interner<str>,
    commons: Interner<Common>,
}

impl ResourceDecoder {
    /// A decoder that has decoded nothing yet.
    #[must_use]
    pub fn new(defaults: ResourceDefaults) -> Self {
        Self { defaults, texts: Interner::default(), commons: Interner::default() }
    }

    /// Decodes and validates one resource.
    ///
    /// # Errors
    /// What is wrong with the resource; it goes to the control plane in the NACK.
    pub fn decode(&self, resource: &Any) -> Result<MeshChange, DecodeError> {
        match resource.type_url.as_str() {
            ADDRESS => match Address::decode(&*resource.value)?.r#type {
                Some(address::Type::Workload(sent)) => Ok(MeshChange::PutWorkload(self.workload(sent)?)),
                Some(address::Type::Service(sent)) => Ok(MeshChange::PutService(self.service(sent)?)),
                None => Err(DecodeError::UnknownAddress),
            },
            AUTHORIZATION => {
                let sent = Authorization::decode(&*resource.value)?;
                if let Some(field) = unknown_fields::in_policy(&resource.value)? {
                    return Err(DecodeError::UnknownField { field });
                }
                Ok(MeshChange::PutPolicy(convert::policy(sent)?))
            }
            other => Err(DecodeError::UnexpectedType { type_url: other.to_owned() }),
        }
    }
}

/// Why a resource of the control plane is refused.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Not valid protobuf.
    #[error(transparent)]
    Protobuf(#[from] prost::DecodeError),
    /// A field has a value that this tunnel cannot use.
    #[error(transparent)]
    Invalid(#[from] InvalidResource),
    /// An `Address` of a kind that is not known here.
    #[error("neither a workload nor a service")]
    UnknownAddress,
    /// A type that this tunnel does not subscribe to.
    #[error("unexpected type {type_url}")]
    UnexpectedType {
        /// The type.
        type_url: String,
    },
    /// A policy has a field that this tunnel does not know. Without it, its meaning is not known.
    #[error("{field} is a field that this tunnel does not know")]
    UnknownField {
        /// Where, such as `rules.clauses.matches.13`.
        field: String,
    },
    /// The resource has a name and no content.
    #[error("has no content")]
    Empty,
}
