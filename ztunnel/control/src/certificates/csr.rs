//! Requests for certificates (PKCS#10). Nothing of a request gets into the certificate but its key.

use rcgen::{CertificateSigningRequestParams, PKCS_ECDSA_P256_SHA256, PublicKey, SanType};
use rustls::pki_types::{CertificateSigningRequestDer, pem::PemObject};
use x509_parser::{
    certification_request::X509CertificationRequest, oid_registry::OID_EC_P256, prelude::FromDer,
};

use crate::identity::Identity;

/// Bytes of PEM. One with a P-256 key has 500.
const LONGEST: usize = 16 << 10;

/// Why a request is no request for an identity.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCsr {
    /// It cannot be read.
    #[error("the CSR cannot be read: {reason}")]
    Unreadable {
        /// Why.
        reason: String,
    },
    /// Whoever sent it does not have the key.
    #[error("the CSR is not signed by the key that it has")]
    Signature,
    /// It is for somebody else, or for more.
    #[error("the CSR is for {found}, expected exactly {expected}")]
    OtherName {
        /// Its subject alternative names.
        found: String,
        /// What it must be for.
        expected: String,
    },
    /// A kind of key that is not signed.
    #[error("the CSR has a key of another kind, expected ECDSA with P-256")]
    Key,
}

impl InvalidCsr {
    /// For metrics: a closed set.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreadable { .. } => "csr_unreadable",
            Self::Signature => "csr_signature",
            Self::OtherName { .. } => "csr_other_name",
            Self::Key => "csr_key",
        }
    }
}

/// The key of the request `pem`, which must be for `identity` and nothing else.
///
/// # Errors
/// It is something else.
pub fn key_for(pem: &str, identity: &Identity) -> Result<PublicKey, InvalidCsr> {
    let unreadable = |reason: &dyn ToString| InvalidCsr::Unreadable { reason: reason.to_string() };
    if pem.len() > LONGEST {
        return Err(unreadable(&format!("it has {} bytes, at most {LONGEST} are read", pem.len())));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes());
    let der = der.map_err(|error| unreadable(&error))?;
    let (rest, parsed) = X509CertificationRequest::from_der(&der).map_err(|error| unreadable(&error))?;
    if !rest.is_empty() {
        return Err(unreadable(&"something follows it"));
    }
    // The library below takes any curve with this hash for P-256.
    let algorithm = &parsed.certification_request_info.subject_pki.algorithm;
    let curve = algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    if curve.is_none_or(|curve| curve != OID_EC_P256) {
        return Err(InvalidCsr::Key);
    }
    let request = CertificateSigningRequestParams::from_der(&der).map_err(|error| match error {
        rcgen::Error::InvalidCertificationRequestSignature => InvalidCsr::Signature,
        error => unreadable(&error),
    })?;
    if request.public_key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
        return Err(InvalidCsr::Key);
    }
    let expected = identity.to_string();
    match &request.params.subject_alt_names[..] {
        [SanType::URI(uri)] if uri.as_str() == expected => Ok(request.public_key),
        names => {
            let found: String = format!("{names:?}").chars().take(300).collect();
            Err(InvalidCsr::OtherName { found, expected })
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        CertificateParams, KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PublicKeyData as _,
        SignatureAlgorithm,
    };

    use super::*;

    fn identity() -> Identity {
        "spiffe://cluster.local/ns/demo/sa/web".parse().unwrap()
    }

    fn csr(names: &[SanType], algorithm: &'static SignatureAlgorithm) -> String {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = names.to_vec();
        params.serialize_request(&key).unwrap().pem().unwrap()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn refused(pem: &str) -> &'static str {
        key_for(pem, &identity()).unwrap_err().reason()
    }

    #[test]
    fn a_request_for_the_identity_and_nothing_else_has_a_key() {
        let own = uri(&identity().to_string());
        let pem = csr(std::slice::from_ref(&own), &PKCS_ECDSA_P256_SHA256);
        assert_eq!(key_for(&pem, &identity()).unwrap().der_bytes().len(), 65);
        for names in [
            vec![],
            vec![uri("spiffe://cluster.local/ns/demo/sa/other")],
            vec![own.clone(), uri("spiffe://cluster.local/ns/demo/sa/other")],
            vec![own.clone(), SanType::DnsName("web.demo".try_into().unwrap())],
            vec![SanType::DnsName("web.demo".try_into().unwrap())],
        ] {
            assert_eq!(refused(&csr(&names, &PKCS_ECDSA_P256_SHA256)), "csr_other_name", "{names:?}");
        }
    }

    #[test]
    fn another_kind_of_key_is_refused() {
        let own = uri(&identity().to_string());
        for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
            assert_eq!(refused(&csr(std::slice::from_ref(&own), algorithm)), "csr_key");
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for text in
            ["", "CSR", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----"]
        {
            assert_eq!(refused(text), "csr_unreadable", "{text}");
        }
        assert_eq!(refused(&"A".repeat(LONGEST + 1)), "csr_unreadable");
    }

    #[test]
    fn a_request_that_somebody_else_signed_is_refused() {
        let pem = csr(&[uri(&identity().to_string())], &PKCS_ECDSA_P256_SHA256);
        let mut der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec();
        // A bit of the identity: `web` becomes `veb`.
        let at = der.windows(3).position(|bytes| bytes == b"web").unwrap();
        der[at] ^= 1;
        let forged = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der));
        assert_eq!(refused(&forged), "csr_signature");
    }
}
