//! Verification of a peer's certificate: its SPIFFE id, besides the chain, dates and key usage that
//! webpki checks.

use std::{fmt, sync::Arc, time::SystemTime};

use rustls::{
    CertificateError, CipherSuite, DigitallySignedStruct, DistinguishedName, Error, NamedGroup, OtherError,
    RootCertStore, SignatureScheme, SupportedProtocolVersion,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::{TLS12, TLS13},
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{Identity, IdentityError, MeshTrust, ciphers};
use crate::config::TlsConfig;

static TLS13_ONLY: [&SupportedProtocolVersion; 1] = [&TLS13];
static WITH_TLS12: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

/// What this tunnel offers and accepts in a TLS handshake. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TlsParameters {
    pub(super) provider: Arc<CryptoProvider>,
    tls12: bool,
    pub(super) trust: Arc<MeshTrust>,
}

impl TlsParameters {
    /// AES-GCM only, as Istio's tunnel; key exchange groups in the order of aws-lc-rs, which
    /// prefers X25519MLKEM768.
    #[must_use]
    pub fn new(config: TlsConfig) -> Self {
        let mut provider = ciphers::provider();
        provider.cipher_suites.retain(|suite| match suite.suite() {
            CipherSuite::TLS13_AES_256_GCM_SHA384 | CipherSuite::TLS13_AES_128_GCM_SHA256 => true,
            CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384
            | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => config.tls12,
            _ => false,
        });
        if config.only_post_quantum {
            provider.kx_groups.retain(|group| group.name() == NamedGroup::X25519MLKEM768);
        }
        Self { provider: Arc::new(provider), tls12: config.tls12, trust: Arc::default() }
    }

    /// Peers of which trust domains are accepted besides those of the own one.
    #[must_use]
    pub fn with_trust(self, trust: Arc<MeshTrust>) -> Self {
        Self { trust, ..self }
    }

    /// TLS 1.3, and 1.2 where the configuration allows it.
    pub(super) fn versions(&self) -> &'static [&'static SupportedProtocolVersion] {
        if self.tls12 { &WITH_TLS12 } else { &TLS13_ONLY }
    }
}

impl Default for TlsParameters {
    fn default() -> Self {
        Self::new(TlsConfig::default())
    }
}

/// Why a peer is nobody, although its handshake succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoIdentity {
    /// A resumed handshake does not call the verifier again.
    #[error("the session was resumed by a peer whose certificate has expired")]
    Expired,
    /// The verifiers of both sides refuse such a certificate.
    #[error("the peer has no certificate with a SPIFFE id")]
    Missing,
}

/// The identity of a peer whose handshake succeeded: the first SPIFFE id of its certificate. Without
/// one, the connection must end: a peer is never nobody.
///
/// # Errors
/// The certificate has expired since the handshake that is resumed, or there is none.
pub fn peer_identity(certs: Option<&[CertificateDer<'_>]>) -> Result<Identity, NoIdentity> {
    let leaf = certs.and_then(<[_]>::first).ok_or(NoIdentity::Missing)?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| NoIdentity::Missing)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    if parsed.validity().not_after.timestamp() < i64::try_from(now).unwrap_or(i64::MAX) {
        return Err(NoIdentity::Expired);
    }
    first_identity(leaf).ok_or(NoIdentity::Missing)
}

fn first_identity(leaf: &CertificateDer<'_>) -> Option<Identity> {
    uri_names(leaf).iter().find_map(|name| name.parse().ok())
}

/// The URIs among the subject's alternative names. Empty if the certificate cannot be parsed.
pub(super) fn uri_names(cert: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, cert)) = X509Certificate::from_der(cert) else { return Vec::new() };
    let Ok(Some(names)) = cert.subject_alternative_name() else { return Vec::new() };
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    names.value.general_names.iter().filter_map(uri).collect()
}

/// A valid chain for another identity.
struct WrongIdentity {
    expected: String,
    got: Vec<String>,
}

impl fmt::Display for WrongIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "identity verification error: peer did not present the expected SAN ({}), got [{}]",
            self.expected,
            self.got.join(", ")
        )
    }
}

/// rustls prints foreign errors with `Debug`.
impl fmt::Debug for WrongIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for WrongIdentity {}

fn wrong_identity(expected: String, got: Vec<String>) -> Error {
    let error = WrongIdentity { expected, got };
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

/// Accepts servers with one of the expected identities. Ignores the host name.
#[derive(Debug)]
pub(super) struct ExpectedServer {
    roots: Arc<RootCertStore>,
    expected: Vec<Identity>,
    own: Arc<str>,
    trust: Arc<MeshTrust>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ExpectedServer {
    /// `own`: the trust domain of the client.
    pub(super) fn new(
        roots: Arc<RootCertStore>,
        expected: Vec<Identity>,
        own: &Arc<str>,
        tls: &TlsParameters,
    ) -> Self {
        let algorithms = tls.provider.signature_verification_algorithms;
        Self { roots, expected, own: Arc::clone(own), trust: Arc::clone(&tls.trust), algorithms }
    }
}

impl ServerCertVerifier for ExpectedServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        let names = uri_names(leaf);
        let domains = self.trust.domains(&self.own);
        let is_expected = |id: Identity| self.expected.iter().any(|one| domains.same(one, &id));
        if names.iter().filter_map(|name| name.parse().ok()).any(is_expected) {
            return Ok(ServerCertVerified::assertion());
        }
        let expected: Vec<_> = self.expected.iter().map(Identity::to_string).collect();
        Err(wrong_identity(expected.join(" or "), names))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Accepts clients whose identity (the first SPIFFE id, which policies use) is in the same mesh: in
/// its trust domain, or in an alias of that. And those of trust domains that are accepted besides.
#[derive(Debug)]
pub(super) struct TrustedClient {
    chain: Arc<dyn ClientCertVerifier>,
    own: Arc<str>,
    trust: Arc<MeshTrust>,
}

impl TrustedClient {
    pub(super) fn new(
        roots: Arc<RootCertStore>,
        own: &Arc<str>,
        tls: &TlsParameters,
    ) -> Result<Self, IdentityError> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&tls.provider))
            .clear_root_hint_subjects() // clients have one certificate, so a hint is of no use
            .build()
            .map_err(IdentityError::unusable("the set of root certificates"))?;
        Ok(Self { chain, own: Arc::clone(own), trust: Arc::clone(&tls.trust) })
    }
}

impl ClientCertVerifier for TrustedClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        match first_identity(leaf) {
            Some(id) if self.trust.accepts(&self.own, &id.trust_domain) => Ok(verified),
            _ => {
                let domains = self.trust.domains(&self.own);
                let expected: Vec<_> = domains.names().map(|name| format!("spiffe://{name}/..")).collect();
                Err(wrong_identity(expected.join(" or "), uri_names(leaf)))
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests;
