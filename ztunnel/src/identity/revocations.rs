//! Revoked certificates, from the operator's file of CRLs (RFC 5280 §5).
//!
//! The check runs at the end of each handshake, including resumed ones, and again for open
//! connections when the file changes. A certificate is revoked if the file lists its serial number
//! under its issuer, or if an intermediate above it is revoked. If the file does not mention the
//! issuer, the certificate is valid. A peer that shows a certificate that cannot be read is refused,
//! since nobody can say whether it is revoked. The signatures of the lists are not checked: whoever can write
//! the file can revoke.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use x509_parser::{
    prelude::{AttributeTypeAndValue, CertificateRevocationList, FromDer, X509Certificate, X509Name},
    x509::ReasonCode,
};

use crate::{file_version::FileVersion, rarely::Rarely};

/// The interval at which the file is checked for changes.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// It is tried again at each interval, and said more rarely.
static UNREADABLE: Rarely = Rarely::every(Duration::from_mins(1));

/// Issuer and serial number.
type CertificateId = (IssuerName, Vec<u8>);

/// The name of an issuer in a form in which equal names are equal values (RFC 5280 §7.1): a CRL may
/// write the name with another type of string, other case, or other white space than the
/// certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct IssuerName(Vec<BTreeSet<(String, AttributeValue)>>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum AttributeValue {
    Text(String),
    /// Not a text: tag and content.
    Other(u32, Vec<u8>),
}

impl IssuerName {
    fn of(name: &X509Name<'_>) -> Self {
        let one = |attribute: &AttributeTypeAndValue<'_>| {
            (attribute.attr_type().to_id_string(), AttributeValue::of(attribute))
        };
        Self(name.iter_rdn().map(|rdn| rdn.iter().map(one).collect()).collect())
    }
}

impl AttributeValue {
    fn of(attribute: &AttributeTypeAndValue<'_>) -> Self {
        let value = attribute.attr_value();
        let text = attribute.as_str().map(str::to_owned).ok().or_else(|| match value.header.tag().0 {
            // BMPString, UniversalString, TeletexString (taken for Latin-1, as everybody writes it).
            30 => utf16(value.data),
            28 => utf32(value.data),
            20 => Some(value.data.iter().map(|&byte| char::from(byte)).collect()),
            _ => None,
        });
        match text {
            Some(text) => {
                let words: Vec<_> = text.split_whitespace().map(str::to_lowercase).collect();
                Self::Text(words.join(" "))
            }
            None => Self::Other(value.header.tag().0, value.data.to_vec()),
        }
    }
}

fn utf16(data: &[u8]) -> Option<String> {
    let units = data.chunks(2).map(|pair| <[u8; 2]>::try_from(pair).ok().map(u16::from_be_bytes));
    String::from_utf16(&units.collect::<Option<Vec<_>>>()?).ok()
}

fn utf32(data: &[u8]) -> Option<String> {
    let one = |four: &[u8]| char::from_u32(u32::from_be_bytes(four.try_into().ok()?));
    data.chunks(4).map(one).collect()
}

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
pub struct CertificateChain {
    known: Vec<CertificateId>,
    /// Whether there is one whose issuer and serial number cannot be read.
    unreadable: bool,
}

impl CertificateChain {
    /// Whether there is no certificate.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.known.is_empty() && !self.unreadable
    }

    fn meets(&self, revoked: &HashSet<CertificateId>) -> bool {
        self.unreadable || self.known.iter().any(|id| revoked.contains(id))
    }

    /// From the certificates of a handshake.
    #[must_use]
    pub fn of(certificates: Option<&[CertificateDer<'_>]>) -> Self {
        let id = |der: &CertificateDer<'_>| {
            let (_, parsed) = X509Certificate::from_der(der).ok()?;
            Some((IssuerName::of(parsed.issuer()), parsed.raw_serial().to_vec()))
        };
        let certificates = certificates.unwrap_or_default();
        let known: Vec<_> = certificates.iter().filter_map(id).collect();
        Self { unreadable: known.len() < certificates.len(), known }
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
        self.is_configured() && chain.meets(&self.revoked.borrow())
    }

    /// Resolves when a certificate of `chain` is revoked.
    pub async fn until_revoked(&self, chain: CertificateChain) {
        if !self.is_configured() {
            return std::future::pending().await;
        }
        let mut changes = self.revoked.subscribe();
        let found = changes.wait_for(|revoked| chain.meets(revoked)).await;
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
                // It is read again: it may revoke somebody.
                Err(error @ RevocationsError::Read { .. }) if version.is_some() => {
                    if UNREADABLE.due().is_some() {
                        warn!(%error, "cannot read the revocation lists; trying again");
                    }
                    continue;
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
    // Of each certificate, what the newest list says. A delta list may take one from the older,
    // complete list (`removeFromCRL`). Of equally new ones, the stricter counts.
    let mut said: HashMap<CertificateId, (BigEndian, bool)> = HashMap::new();
    for list in &lists {
        let (_, list) =
            CertificateRevocationList::from_der(list).map_err(|error| invalid(error.to_string()))?;
        let issuer = IssuerName::of(list.issuer());
        let number = BigEndian::of(list.crl_number().map(x509_parser::num_bigint::BigUint::to_bytes_be));
        for entry in list.iter_revoked_certificates() {
            let removed = matches!(entry.reason_code(), Some((_, ReasonCode::RemoveFromCRL)));
            let says = (number.clone(), !removed);
            let known = said.entry((issuer.clone(), entry.raw_serial().to_vec()));
            let newest = known.or_insert_with(|| says.clone());
            if *newest < says {
                *newest = says;
            }
        }
    }
    Ok(said.into_iter().filter(|(_, (_, revoked))| *revoked).map(|(id, _)| id).collect())
}

/// A number of any size, in an order that is its own: shorter is smaller.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct BigEndian(usize, Vec<u8>);

impl BigEndian {
    fn of(bytes: Option<Vec<u8>>) -> Self {
        let bytes = bytes.unwrap_or_default();
        let digits: Vec<u8> = bytes.into_iter().skip_while(|&byte| byte == 0).collect();
        Self(digits.len(), digits)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName, DnType,
        DnValue, IsCa, Issuer, KeyIdMethod, KeyPair, RevocationReason, RevokedCertParams, SerialNumber,
        string::{BmpString, PrintableString, TeletexString},
    };
    use time::{Duration as Span, OffsetDateTime};

    use super::*;

    fn named(name: &str, serial: u64) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from(serial));
        params
    }

    fn authority(name: &str, serial: u64) -> CertificateParams {
        let mut params = named(name, serial);
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params
    }

    fn list(issuer: &Issuer<'_, KeyPair>, serials: &[u64]) -> String {
        let entries: Vec<_> = serials.iter().map(|&serial| (serial, None)).collect();
        numbered_list(issuer, 1, &entries)
    }

    fn numbered_list(
        issuer: &Issuer<'_, KeyPair>,
        number: u64,
        entries: &[(u64, Option<RevocationReason>)],
    ) -> String {
        let now = OffsetDateTime::now_utc();
        let revoked = |(serial, reason): &(u64, Option<RevocationReason>)| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now,
            reason_code: *reason,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now,
            next_update: now + Span::days(1),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: entries.iter().map(revoked).collect(),
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

    fn is_revoked(chain: &CertificateChain, lists: &str) -> bool {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), lists).unwrap();
        Revocations::open(Some(file.path().to_owned())).unwrap().is_revoked(chain)
    }

    #[test]
    fn an_issuer_is_the_same_in_whatever_type_of_string_it_is_written() {
        let issuer = |name: DnValue| {
            let mut params = authority("", 1);
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            Issuer::new(params, KeyPair::generate().unwrap())
        };
        let signer = issuer(DnValue::Utf8String("Root of Example".to_owned()));
        let leaf = named("leaf", 7).signed_by(&KeyPair::generate().unwrap(), &signer).unwrap();
        let chain = CertificateChain::of(Some(&[leaf.der().clone()]));
        let text = "root  OF example ";
        for name in [
            DnValue::PrintableString(PrintableString::try_from(text).unwrap()),
            DnValue::BmpString(BmpString::try_from(text).unwrap()),
            DnValue::TeletexString(TeletexString::try_from(text).unwrap()),
        ] {
            assert!(is_revoked(&chain, &list(&issuer(name.clone()), &[7])), "{name:?}");
        }
        assert!(!is_revoked(
            &chain,
            &list(&issuer(DnValue::Utf8String("Root of Examples".to_owned())), &[7])
        ));
    }

    #[test]
    fn what_a_newer_list_removes_is_not_revoked() {
        let root = CertifiedIssuer::self_signed(authority("root", 1), KeyPair::generate().unwrap()).unwrap();
        let leaf = named("leaf", 7).signed_by(&KeyPair::generate().unwrap(), &root).unwrap();
        let chain = CertificateChain::of(Some(&[leaf.der().clone()]));
        let held = |number| numbered_list(&root, number, &[(7, Some(RevocationReason::CertificateHold))]);
        let removed = |number| numbered_list(&root, number, &[(7, Some(RevocationReason::RemoveFromCrl))]);
        assert!(!is_revoked(&chain, &removed(300)));
        assert!(!is_revoked(&chain, &(held(255) + &removed(300))));
        assert!(!is_revoked(&chain, &(removed(300) + &held(255))), "whatever their order in the file");
        assert!(is_revoked(&chain, &(removed(300) + &held(301))), "held again");
        assert!(is_revoked(&chain, &(removed(300) + &held(300))), "one of them is wrong");
    }

    #[test]
    fn a_certificate_that_cannot_be_read_is_not_left_out() {
        let root = CertifiedIssuer::self_signed(authority("root", 1), KeyPair::generate().unwrap()).unwrap();
        let leaf = named("leaf", 7).signed_by(&KeyPair::generate().unwrap(), &root).unwrap();
        let chain =
            CertificateChain::of(Some(&[leaf.der().clone(), CertificateDer::from(vec![0x30, 0x03, 1])]));
        assert!(!chain.is_empty());
        assert!(is_revoked(&chain, &list(&root, &[8])), "nobody can say whether it is revoked");
        assert!(!Revocations::open(None).unwrap().is_revoked(&chain), "nobody wants to know");
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
