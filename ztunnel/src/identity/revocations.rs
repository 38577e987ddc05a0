//! Revoked certificates, from the operator's file of CRLs (RFC 5280 §5).
//!
//! The check runs at the end of each handshake, including resumed ones, and again for open
//! connections when the file changes. A certificate is revoked if the file lists its serial number
//! under its issuer, or if an intermediate above it is revoked. If the file does not mention the
//! issuer, the certificate is valid. The signatures of the lists are not checked: whoever can write
//! the file can revoke.

use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

use crate::file_version::FileVersion;

/// The interval at which the file is checked for changes.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Encoded issuer name and serial number.
type CertificateId = (Vec<u8>, Vec<u8>);

/// Why a file is rejected.
#[derive(Debug, thiserror::Error)]
pub enum RevocationsError {
    /// It cannot be read.
    #[error("cannot read the revocation lists in {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is not a valid list.
    #[error("{path} holds no valid revocation list: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// The current set of revoked certificates.
#[derive(Debug)]
pub struct Revocations {
    path: Option<PathBuf>,
    revoked: watch::Sender<Arc<HashSet<CertificateId>>>,
}

/// The certificates of one peer: the leaf and its intermediates.
#[derive(Clone, Debug, Default)]
pub struct CertificateChain(Vec<CertificateId>);

impl CertificateChain {
    /// Whether no certificate of the chain has a readable issuer and serial number.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// From the certificates of a handshake.
    #[must_use]
    pub fn of(certificates: Option<&[CertificateDer<'_>]>) -> Self {
        let id = |der: &CertificateDer<'_>| {
            let (_, parsed) = X509Certificate::from_der(der).ok()?;
            Some((parsed.issuer().as_raw().to_vec(), parsed.raw_serial().to_vec()))
        };
        Self(certificates.unwrap_or_default().iter().filter_map(id).collect())
    }
}

impl Revocations {
    /// Without a configured file, or while the file does not exist, nothing is revoked.
    ///
    /// # Errors
    /// The file cannot be read, or is no revocation list.
    pub fn open(path: Option<PathBuf>) -> Result<Self, RevocationsError> {
        let revoked = match &path {
            Some(path) if path.exists() => read(path)?,
            Some(path) => {
                warn!(path = %path.display(), "revocation list file does not exist; nothing is revoked until it does");
                HashSet::new()
            }
            None => HashSet::new(),
        };
        Ok(Self { path, revoked: watch::Sender::new(Arc::new(revoked)) })
    }

    /// Whether a file is configured.
    #[must_use]
    pub fn is_configured(&self) -> bool {
        self.path.is_some()
    }

    /// Whether a certificate of `chain` is revoked.
    #[must_use]
    pub fn is_revoked(&self, chain: &CertificateChain) -> bool {
        let revoked = self.revoked.borrow();
        chain.0.iter().any(|id| revoked.contains(id))
    }

    /// Resolves when a certificate of `chain` is revoked.
    pub async fn until_revoked(&self, chain: CertificateChain) {
        if !self.is_configured() {
            return std::future::pending().await;
        }
        let mut changes = self.revoked.subscribe();
        let found = changes.wait_for(|revoked| chain.0.iter().any(|id| revoked.contains(id))).await;
        if found.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Applies changes of the file until `stop`. After an invalid change the last valid version
    /// stays active.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let Some(path) = self.path.clone() else { return };
        let mut seen = FileVersion::of(&path);
        while stop.run_until_cancelled(tokio::time::sleep(POLL_INTERVAL)).await.is_some() {
            let version = FileVersion::of(&path);
            if version == seen {
                continue;
            }
            match read(&path) {
                Ok(revoked) => {
                    info!(path = %path.display(), certificates = revoked.len(), "revocation lists applied");
                    self.revoked.send_replace(Arc::new(revoked));
                }
                Err(error) => warn!(%error, "invalid revocation lists; the last valid ones stay in force"),
            }
            seen = version;
        }
    }
}

/// One or several lists, in PEM or one in DER.
fn read(path: &Path) -> Result<HashSet<CertificateId>, RevocationsError> {
    let content =
        std::fs::read(path).map_err(|source| RevocationsError::Read { path: path.to_owned(), source })?;
    let invalid = |reason: String| RevocationsError::Invalid { path: path.to_owned(), reason };
    let lists: Vec<Vec<u8>> = if content.trim_ascii_start().starts_with(b"-----BEGIN") {
        CertificateRevocationListDer::pem_slice_iter(&content)
            .map(|list| list.map(|der| der.to_vec()))
            .collect::<Result<_, _>>()
            .map_err(|error| invalid(error.to_string()))?
    } else {
        vec![content]
    };
    if lists.is_empty() {
        return Err(invalid("no block of type X509 CRL".to_owned()));
    }
    let mut revoked = HashSet::new();
    for list in &lists {
        let (_, list) =
            CertificateRevocationList::from_der(list).map_err(|error| invalid(error.to_string()))?;
        let issuer = list.issuer().as_raw();
        revoked.extend(
            list.iter_revoked_certificates().map(|entry| (issuer.to_vec(), entry.raw_serial().to_vec())),
        );
    }
    Ok(revoked)
}

#[cfg(test)]
mod tests {
    use rcgen::{
        CertificateParams, CertificateRevocationListParams, CertifiedIssuer, IsCa, KeyIdMethod, KeyPair,
        RevokedCertParams, SerialNumber,
    };
    use time::{Duration as Span, OffsetDateTime};

    use super::*;

    fn named(name: &str, serial: u64) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from(serial));
        params
    }

    fn authority(name: &str, serial: u64) -> CertificateParams {
        let mut params = named(name, serial);
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params
    }

    fn list(issuer: &rcgen::Issuer<'_, KeyPair>, serials: &[u64]) -> String {
        let now = OffsetDateTime::now_utc();
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now,
            next_update: now + Span::days(1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(issuer).unwrap().pem().unwrap()
    }

    #[test]
    fn a_leaf_below_a_revoked_intermediate_is_revoked() {
        let key = || KeyPair::generate().unwrap();
        let root = CertifiedIssuer::self_signed(authority("root", 1), key()).unwrap();
        let middle = CertifiedIssuer::signed_by(authority("middle", 5), key(), &root).unwrap();
        let leaf = named("leaf", 7).signed_by(&key(), &middle).unwrap();
        let chain = CertificateChain::of(Some(&[leaf.der().clone(), middle.der().clone()]));
        let file = tempfile::NamedTempFile::new().unwrap();
        let revoked_by = |content: String| {
            std::fs::write(file.path(), content).unwrap();
            Revocations::open(Some(file.path().to_owned())).unwrap().is_revoked(&chain)
        };
        assert!(revoked_by(list(&root, &[5])), "the intermediate");
        assert!(revoked_by(list(&middle, &[7])), "the leaf");
        assert!(!revoked_by(list(&root, &[7])), "that is another issuer's number 7");
        assert!(!revoked_by(list(&middle, &[5])), "and another's number 5");
        assert!(revoked_by(list(&root, &[8]) + &list(&middle, &[6, 7])), "by the second list of a file");
        assert!(!Revocations::open(None).unwrap().is_revoked(&chain));
    }

    #[test]
    fn other_content_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for content in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            std::fs::write(file.path(), content).unwrap();
            assert!(Revocations::open(Some(file.path().to_owned())).is_err(), "{content}");
        }
        assert!(Revocations::open(Some("/nowhere/crl.pem".into())).is_ok(), "it may come later");
    }
}
