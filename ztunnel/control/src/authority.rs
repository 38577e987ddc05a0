//! The root of the mesh's identities, and what it signs.
//!
//! * [`keeper`]: follows the Secret, and has it change when a rotation goes on
//! * [`place`]: the Secret and the ConfigMap at the API server
//! * [`progress`]: how far a rotation is; pure
//! * [`revoked`]: the list of revoked certificates; pure
//! * [`rotation`]: from one root to the next, with an overlap; pure
//! * [`secret`]: what the Secret holds; pure

pub mod keeper;
pub mod place;
pub mod progress;
pub mod revoked;
pub mod rotation;
pub mod secret;

use std::{fmt, sync::Arc, time::Duration};

use rand::RngExt as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use time::OffsetDateTime;
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::Identity;

/// Of a root that is made here.
const ROOT_LIFE: Duration = Duration::from_hours(10 * 365 * 24);
/// Clocks differ, by an hour where a time zone was set wrong: what is signed is valid since so long
/// ago, but since an eighth of its life at most, as tunnels renew at half of the whole.
const CLOCK_SKEW: Duration = Duration::from_mins(65);

/// Why a root cannot be used, or cannot sign.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Not a certificate or key in PEM.
    #[error("{what} cannot be read: {reason}")]
    Unreadable {
        /// What.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// The key is not the certificate's.
    #[error("the private key does not belong to the certificate {subject}")]
    Mismatch {
        /// The certificate.
        subject: String,
    },
    /// The certificate may not sign others.
    #[error("the certificate {subject} is no CA's: it must have basicConstraints CA:TRUE and may sign")]
    NotACa {
        /// The certificate.
        subject: String,
    },
    /// Nobody would trust what it signs.
    #[error("the certificate {subject} is not signed by {above}")]
    OtherRoot {
        /// The certificate.
        subject: String,
        /// What should have signed it.
        above: String,
    },
    /// Its time is over, or has not come.
    #[error("the certificate {subject} is not valid now, but from {from} to {to}")]
    NotValidNow {
        /// The certificate.
        subject: String,
        /// Its begin.
        from: String,
        /// Its end.
        to: String,
    },
    /// The process is older than its root, or than an intermediate.
    #[error("the root, or what leads to it, ended at {end}: put another into the Secret")]
    Ended {
        /// When.
        end: String,
    },
    /// The library fails to sign or to make a key.
    #[error("cannot sign")]
    Sign(#[from] rcgen::Error),
}

/// The authority in use, which changes with the Secret.
pub type CurrentAuthority = watch::Receiver<Arc<Authority>>;

/// A root, or an intermediate of one, ready to sign.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Between a leaf and the root.
    intermediates: Vec<CertificateDer<'static>>,
    /// What tunnels trust, the own root first.
    trusted: Vec<CertificateDer<'static>>,
    not_after: OffsetDateTime,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl Authority {
    /// From certificates and key in PEM. The first of `certificates` signs; those after it lead to
    /// the root. `roots`: where that is not the last of them. All of them are trusted.
    ///
    /// # Errors
    /// They do not fit together, or not this moment.
    pub fn from_pem(certificates: &str, key: &str, roots: Option<&str>) -> Result<Self, AuthorityError> {
        let mut chain = ders("the certificate", certificates)?;
        let mut trusted = match roots {
            Some(roots) => ders("the root's certificate", roots)?,
            None => vec![chain[chain.len() - 1].clone()],
        };
        let key = KeyPair::from_pem(key).map_err(|error| AuthorityError::Unreadable {
            what: "the private key",
            reason: error.to_string(),
        })?;
        let signs = checked(&chain[0])?;
        if signs.public_key().subject_public_key.data != key.public_key_raw() {
            return Err(AuthorityError::Mismatch { subject: signs.subject.to_string() });
        }
        let issuer = Issuer::from_ca_cert_der(&chain[0], key)?;
        // Up to the first that is trusted by itself.
        let end = chain.iter().position(|der| trusted.contains(der)).map_or(chain.len(), |root| root + 1);
        chain.truncate(end);
        for pair in chain.windows(2) {
            signed_by(&pair[0], &pair[1])?;
        }
        let top = &chain[chain.len() - 1];
        let own = trusted.iter().position(|root| root == top || signed_by(top, root).is_ok());
        let Some(own) = own else {
            // With the only root there is, the reason is its own.
            signed_by(top, &trusted[0])?;
            return Err(AuthorityError::OtherRoot { subject: subject(top)?, above: subject(&trusted[0])? });
        };
        trusted.swap(0, own);
        let mut not_after = OffsetDateTime::now_utc() + ROOT_LIFE;
        for der in chain.iter().chain([&trusted[0]]) {
            not_after = not_after.min(checked(der)?.validity.not_after.to_datetime());
        }
        chain.retain(|der| *der != trusted[0]);
        Ok(Self { issuer, intermediates: chain, trusted, not_after })
    }

    /// The same, with more roots that tunnels are to trust.
    #[must_use]
    pub fn trusting(mut self, more: &[CertificateDer<'static>]) -> Self {
        for root in more {
            if !self.trusted.contains(root) {
                self.trusted.push(root.clone());
            }
        }
        self
    }

    /// The certificate that signs.
    fn signer(&self) -> &CertificateDer<'static> {
        self.intermediates.first().unwrap_or(&self.trusted[0])
    }

    /// What tunnels trust, the root of this one first.
    #[must_use]
    pub fn trusted(&self) -> &[CertificateDer<'static>] {
        &self.trusted
    }

    /// The same in PEM.
    #[must_use]
    pub fn trusted_pem(&self) -> String {
        self.trusted.iter().map(pem).collect()
    }

    /// When the root, or what leads to it, ends.
    #[must_use]
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// A certificate for `identity` and nothing else, for at most `life`: PEM, leaf first, and last
    /// all roots in one text.
    ///
    /// # Errors
    /// The root has ended, or the library fails.
    pub fn sign(
        &self,
        identity: &Identity,
        key: &impl PublicKeyData,
        life: Duration,
    ) -> Result<Vec<String>, AuthorityError> {
        let mut params = self.leaf(life)?;
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        let leaf = params.signed_by(key, &self.issuer)?.pem();
        let intermediates = self.intermediates.iter().map(pem);
        Ok(std::iter::once(leaf).chain(intermediates).chain([self.trusted_pem()]).collect())
    }

    /// A certificate for a server of these names, and its key.
    ///
    /// # Errors
    /// A name that cannot be in a certificate, or the library fails.
    pub fn serve_as(
        &self,
        names: &[String],
        life: Duration,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), AuthorityError> {
        let mut params = self.leaf(life)?;
        params.subject_alt_names = CertificateParams::new(names)?.subject_alt_names;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let leaf = params.signed_by(&key, &self.issuer)?.der().clone();
        let chain = std::iter::once(leaf).chain(self.intermediates.iter().cloned()).collect();
        let key = PrivateKeyDer::try_from(key.serialize_der())
            .map_err(|reason| AuthorityError::Unreadable { what: "the key", reason: reason.to_owned() })?;
        Ok((chain, key))
    }

    fn leaf(&self, life: Duration) -> Result<CertificateParams, AuthorityError> {
        let now = OffsetDateTime::now_utc();
        if self.not_after <= now {
            return Err(AuthorityError::Ended { end: self.not_after.to_string() });
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial());
        params.not_before = now - CLOCK_SKEW.min(life / 8);
        params.not_after = (now + life).min(self.not_after);
        Ok(params)
    }
}

/// A new root: its certificate and its key, in PEM.
///
/// # Errors
/// The library fails.
pub fn new_root(trust_domain: &str) -> Result<(String, String), AuthorityError> {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain);
    // Two roots with one name could not be told apart by their leaves.
    let number = rand::rng().random::<u64>();
    params.distinguished_name.push(DnType::CommonName, format!("root {number:016x}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial());
    (params.not_before, params.not_after) = (now - CLOCK_SKEW, now + ROOT_LIFE);
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let key_pem = key.serialize_pem();
    Ok((CertifiedIssuer::self_signed(params, key)?.pem(), key_pem))
}

/// A certificate that may sign others, now.
fn checked<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, AuthorityError> {
    let unreadable = |reason: String| AuthorityError::Unreadable { what: "the certificate", reason };
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| unreadable(error.to_string()))?;
    let subject = certificate.subject.to_string();
    let may_sign = match certificate.key_usage() {
        Ok(usage) => usage.is_none_or(|usage| usage.value.key_cert_sign()),
        Err(error) => return Err(unreadable(error.to_string())),
    };
    if !certificate.is_ca() || !may_sign {
        return Err(AuthorityError::NotACa { subject });
    }
    let validity = certificate.validity();
    if !validity.is_valid() {
        let (from, to) = (validity.not_before.to_string(), validity.not_after.to_string());
        return Err(AuthorityError::NotValidNow { subject, from, to });
    }
    Ok(certificate)
}

fn subject(der: &CertificateDer<'_>) -> Result<String, AuthorityError> {
    Ok(checked(der)?.subject.to_string())
}

/// Whether `above` may sign, and signed `one`.
fn signed_by(one: &CertificateDer<'_>, above: &CertificateDer<'_>) -> Result<(), AuthorityError> {
    let (one, above) = (checked(one)?, checked(above)?);
    one.verify_signature(Some(above.public_key())).map_err(|_| AuthorityError::OtherRoot {
        subject: one.subject.to_string(),
        above: above.subject.to_string(),
    })
}

/// At least one.
fn ders(what: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let unreadable = |reason: String| AuthorityError::Unreadable { what, reason };
    let ders = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    let ders = ders.map_err(|error| unreadable(error.to_string()))?;
    if ders.is_empty() { Err(unreadable("there is none".to_owned())) } else { Ok(ders) }
}

fn pem(der: &CertificateDer<'_>) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der.to_vec()))
}

/// Positive and not zero (RFC 5280 §4.1.2.2).
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::rng().random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

#[cfg(test)]
mod tests;
