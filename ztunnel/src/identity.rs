//! SPIFFE ids, the certificates that prove them, and the verification of peers.
//!
//! * [`certificates`]: one valid certificate per local identity, fetched once, renewed at half of
//!   its lifetime; `slot`: one of them, and when it is due; `clock`: the wall clock
//! * [`ca_client`], [`development_ca`]: the two certificate authorities; [`authority`]: their trait
//! * [`revocations`]: revoked certificates
//! * [`credentials`]: a certificate with its key, as TLS configuration for both roles
//! * [`ciphers`]: the fastest AES-GCM of the node
//! * [`trust`]: how a peer's certificate is verified
//! * [`mesh_trust`]: which trust domains are this mesh, and clients of which others are accepted

mod authority;
mod ca_client;
mod certificates;
mod ciphers;
mod clock;
mod credentials;
mod development_ca;
mod expiry;
mod mesh_trust;
mod revocations;
mod slot;
mod trust;

use std::sync::Arc;

pub use ca_client::credentials_from_response;
pub use certificates::{AccountLease, CertificateInfo, Certificates};
pub use credentials::Credentials;
pub use expiry::{first_expiry, until};
pub use mesh_trust::MeshTrust;
pub use revocations::{CertificateChain, Revocations, RevocationsError};
pub use trust::{NoIdentity, TlsParameters, peer_identity};
pub use ztunnel_api::names::{Identity, InvalidIdentity};

use crate::control_plane::ControlPlaneError;

/// The trust domains that are one mesh: its own, and its aliases, such as the one before a
/// migration. The same namespace and service account in any of them is the same workload. Every node
/// may list all names of the mesh: the own one among the aliases counts once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustDomains {
    own: Arc<str>,
    aliases: Arc<[Arc<str>]>,
}

impl TrustDomains {
    /// The mesh of trust domain `own`, which is also `aliases`.
    #[must_use]
    pub fn new(own: Arc<str>, aliases: Arc<[Arc<str>]>) -> Self {
        Self { own, aliases }
    }

    /// Its own, then the aliases.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        std::iter::once(&self.own).chain(self.aliases.iter().filter(|alias| **alias != self.own))
    }

    /// Whether `domain` is one of them.
    #[must_use]
    pub fn contains(&self, domain: &str) -> bool {
        self.names().any(|name| **name == *domain)
    }

    /// Whether both are one workload.
    #[must_use]
    pub fn same(&self, one: &Identity, other: &Identity) -> bool {
        one == other
            || one.namespace == other.namespace
                && one.service_account == other.service_account
                && self.contains(&one.trust_domain)
                && self.contains(&other.trust_domain)
    }
}

/// Why there is no usable certificate for an identity.
///
/// Cheap to clone, since all that wait for one fetch get its error.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read.
    #[error("cannot read {what} from {path}")]
    Read {
        /// What it holds.
        what: &'static str,
        /// The file or folder.
        path: String,
        /// The cause.
        source: Arc<std::io::Error>,
    },
    /// The certificate service cannot be called with this configuration.
    #[error(transparent)]
    ControlPlane(Arc<ControlPlaneError>),
    /// The folder of the development CA cannot be written.
    #[error("cannot store the development CA in {path}")]
    Store {
        /// The file or folder.
        path: String,
        /// The cause.
        source: Arc<std::io::Error>,
    },
    /// A key, certificate or request cannot be generated.
    #[error("cannot generate a key or certificate")]
    Generate(#[source] Arc<rcgen::Error>),
    /// A certificate or key cannot be used for TLS.
    #[error("{what} is not usable")]
    Unusable {
        /// What it holds.
        what: &'static str,
        /// The cause.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The generated private key has an encoding that rustls does not accept.
    #[error("the private key is not usable: {reason}")]
    PrivateKey {
        /// Why.
        reason: &'static str,
    },
    /// A certificate chain without certificates.
    #[error("the certificate chain is empty")]
    EmptyChain,
    /// No root certificate to verify peers with.
    #[error("no root certificate was given")]
    NoRoots,
    /// The response of the certificate service lacks the leaf or the root.
    #[error("the certificate service sent {count} certificates, expected 2 or more")]
    ShortResponse {
        /// How many it sent.
        count: usize,
    },
    /// No connection to the certificate service.
    #[error("cannot reach the certificate service at {address}")]
    Unreachable {
        /// Address of the service.
        address: String,
        /// The cause.
        source: Arc<tonic::Status>,
    },
    /// The certificate service answered with an error.
    #[error("the certificate service at {address} refused the request: {status}")]
    Refused {
        /// Address of the service.
        address: String,
        /// Its answer.
        status: Arc<tonic::Status>,
    },
    /// No answer within the time limit.
    #[error("the certificate service at {address} did not answer in time")]
    TimedOut {
        /// Address of the service.
        address: String,
    },
    /// A mistake of this program, which the log shows.
    #[error("fetching the certificate ended in a panic, which the log shows; it is tried again")]
    Panicked,
    /// The certificate is for another identity.
    #[error("certificate service returned identity {got}, expected {expected}")]
    Mismatch {
        /// The identity requested.
        expected: Identity,
        /// The identities of the certificate.
        got: String,
    },
    /// The certificate has expired; `source` is the last error of its renewal.
    #[error("the certificate of {identity} has expired and could not be renewed")]
    Expired {
        /// The identity.
        identity: Identity,
        /// Error of the last renewal.
        source: Option<Arc<Self>>,
    },
    /// The last pod with this identity left the node during the fetch.
    #[error("{identity} is no longer served on this node")]
    Removed {
        /// The identity.
        identity: Identity,
    },
    /// The process shuts down.
    #[error("the tunnel is shutting down")]
    Stopped,
}

impl From<ControlPlaneError> for IdentityError {
    fn from(source: ControlPlaneError) -> Self {
        Self::ControlPlane(Arc::new(source))
    }
}

impl From<rcgen::Error> for IdentityError {
    fn from(error: rcgen::Error) -> Self {
        Self::Generate(Arc::new(error))
    }
}

impl IdentityError {
    fn unusable<E: std::error::Error + Send + Sync + 'static>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Unusable { what, source: Arc::new(source) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_is_the_same_in_all_trust_domains_of_its_mesh_and_no_other() {
        let domains = TrustDomains::new("new.example".into(), ["old.example".into()].into());
        let id = |text: &str| text.parse::<Identity>().unwrap();
        let web = id("spiffe://new.example/ns/shop/sa/web");
        assert!(domains.same(&web, &id("spiffe://old.example/ns/shop/sa/web")));
        assert!(domains.same(&web, &web));
        assert!(!domains.same(&web, &id("spiffe://old.example/ns/shop/sa/db")));
        assert!(!domains.same(&web, &id("spiffe://old.example/ns/bank/sa/web")));
        assert!(!domains.same(&web, &id("spiffe://foreign.example/ns/shop/sa/web")));
        let foreign = id("spiffe://foreign.example/ns/shop/sa/web");
        assert!(domains.same(&foreign, &foreign), "a service may name who serves it by another mesh's id");
    }
}
