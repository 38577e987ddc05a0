//! Why a certificate is refused.

use tonic::Code;

use super::csr::InvalidCsr;
use crate::{
    authority::AuthorityError,
    callers::CallerError,
    identity::{Identity, InvalidIdentity},
};

/// Why a certificate is refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The caller is nobody who may ask.
    #[error(transparent)]
    Caller(#[from] CallerError),
    /// The name of whom it is for cannot be read.
    #[error("ImpersonatedIdentity {text:?} is no identity")]
    NoIdentity {
        /// What it is.
        text: String,
        /// What was expected.
        source: InvalidIdentity,
    },
    /// It is not even a text.
    #[error("ImpersonatedIdentity must be a text")]
    IdentityType,
    /// Of another mesh.
    #[error("{identity} is not of the trust domain {expected}")]
    OtherTrustDomain {
        /// Whom it was asked for.
        identity: Box<Identity>,
        /// Ours.
        expected: String,
    },
    /// The request itself.
    #[error(transparent)]
    Csr(#[from] InvalidCsr),
    /// The caller asks for a pod of somewhere else.
    #[error("no pod of {identity} runs on node {node}, from which it is asked for")]
    NotOnNode {
        /// Whom it was asked for.
        identity: Box<Identity>,
        /// The caller's node.
        node: String,
    },
    /// The API server cannot be asked.
    #[error("cannot ask the API server which pods run on the node")]
    Unavailable {
        /// The cause; `None`: it did not answer in time.
        source: Option<Box<kube::Error>>,
    },
    /// The library fails.
    #[error("cannot sign the certificate")]
    Sign(#[source] AuthorityError),
}

impl Refusal {
    /// For metrics: a closed set.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Caller(error) => error.reason(),
            Self::NoIdentity { .. } | Self::IdentityType => "no_identity",
            Self::OtherTrustDomain { .. } => "other_trust_domain",
            Self::Csr(error) => error.reason(),
            Self::NotOnNode { .. } => "not_on_node",
            Self::Unavailable { .. } => "api_unavailable",
            Self::Sign(_) => "internal",
        }
    }

    /// Whether the log has it: see [`CallerError::is_notable`].
    #[must_use]
    pub fn is_notable(&self) -> bool {
        match self {
            Self::Caller(error) => error.is_notable(),
            _ => true,
        }
    }

    /// For the caller.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Caller(error) => error.code(),
            Self::NoIdentity { .. } | Self::IdentityType | Self::Csr(_) => Code::InvalidArgument,
            Self::OtherTrustDomain { .. } | Self::NotOnNode { .. } => Code::PermissionDenied,
            Self::Unavailable { .. } => Code::Unavailable,
            Self::Sign(_) => Code::Internal,
        }
    }
}
