//! What is checked of a peer's certificate, on top of webpki's chain, dates and key usage.

use std::{
    fmt,
    sync::{Arc, LazyLock, OnceLock},
    time::SystemTime,
};

use rustls::{
    CertificateError, CipherSuite, DigitallySignedStruct, DistinguishedName, Error, NamedGroup, OtherError,
    RootCertStore, SignatureScheme, SupportedProtocolVersion,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::{TLS12, TLS13},
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{Identity, IdentityError};
use crate::config::TlsConfig;

static OPTIONS: OnceLock<TlsConfig> = OnceLock::new();

/// What this process speaks, for all of its connections. To be called before the first certificate; later calls change
/// nothing.
pub(super) fn configure(options: TlsConfig) {
    let _ = OPTIONS.set(options);
}

fn options() -> TlsConfig {
    OPTIONS.get().copied().unwrap_or_default()
}

/// AES-GCM only, as Istio's tunnel; groups as aws-lc-rs prefers them (X25519MLKEM768 first).
pub(super) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(provider_for(options())));
    Arc::clone(&PROVIDER)
}

fn provider_for(options: TlsConfig) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.retain(|suite| match suite.suite() {
        CipherSuite::TLS13_AES_256_GCM_SHA384 | CipherSuite::TLS13_AES_128_GCM_SHA256 => true,
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
        | CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384
        | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => options.tls12,
        _ => false,
    });
    if options.only_post_quantum {
        provider.kx_groups.retain(|group| group.name() == NamedGroup::X25519MLKEM768);
    }
    provider
}

/// TLS 1.3, and 1.2 where that is asked for.
pub(super) fn versions() -> Vec<&'static SupportedProtocolVersion> {
    if options().tls12 { vec![&TLS13, &TLS12] } else { vec![&TLS13] }
}

/// The identity of a peer whose handshake succeeded: the first SPIFFE id of its certificate.
///
/// `None` also for a certificate that has expired meanwhile: a resumed handshake does not ask the verifier again.
pub fn peer_identity(certs: Option<&[CertificateDer<'_>]>) -> Option<Identity> {
    let leaf = certs?.first()?;
    let (_, parsed) = X509Certificate::from_der(leaf).ok()?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    if parsed.validity().not_after.timestamp() < i64::try_from(now).ok()? {
        return None;
    }
    first_identity(leaf)
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

/// A chain that is good, for somebody else.
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

/// rustls shows the errors of others by `Debug` only.
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

/// Accepts servers that are one of the expected identities. No host name is looked at.
#[derive(Debug)]
pub(super) struct ExpectedServer {
    roots: Arc<RootCertStore>,
    expected: Vec<Identity>,
}

impl ExpectedServer {
    pub fn new(roots: Arc<RootCertStore>, expected: Vec<Identity>) -> Self {
        Self { roots, expected }
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
        let algorithms = provider().signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        let names = uri_names(leaf);
        if names.iter().filter_map(|name| name.parse().ok()).any(|id| self.expected.contains(&id)) {
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
        verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Accepts clients whose identity (the first SPIFFE id, which policies see) is of our trust domain.
#[derive(Debug)]
pub(super) struct TrustedClient {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: Arc<str>,
}

impl TrustedClient {
    pub fn new(roots: Arc<RootCertStore>, trust_domain: Arc<str>) -> Result<Self, IdentityError> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .clear_root_hint_subjects() // clients have one certificate, there is nothing to hint at
            .build()
            .map_err(IdentityError::unusable("the set of root certificates"))?;
        Ok(Self { chain, trust_domain })
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
            Some(id) if id.trust_domain == self.trust_domain => Ok(verified),
            _ => Err(wrong_identity(format!("spiffe://{}/..", self.trust_domain), uri_names(leaf))),
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
