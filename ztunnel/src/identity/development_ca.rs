//! A CA inside the process, for demonstrations and tests. Its root key is a file in a folder.
//!
//! Two processes (the nodes of a demonstration) may open an empty folder at the same time. Each
//! writes its root to a temporary file and links it to the final name; one succeeds, the other uses
//! that root. Key and certificate share one file, so that no reader sees one without the other.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rand::RngExt;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use time::OffsetDateTime;
use tracing::info;

use super::{
    Credentials, Identity, IdentityError,
    authority::{Authority, Issuing},
    clock::WallClock,
    trust::TlsParameters,
};

/// The root's key and certificate, PEM.
const ROOT_FILE: &str = "root.pem";
/// The certificate alone, for other programs that shall trust this CA. Adit does not read it.
const ROOT_CERT_FILE: &str = "root-cert.pem";
const ROOT_LIFE: Duration = Duration::from_hours(10 * 365 * 24);
/// Clocks of two nodes differ.
const CLOCK_SKEW: Duration = Duration::from_mins(2);

/// The root, ready to sign.
pub(super) struct DevelopmentCa {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    ttl: Duration,
    tls: TlsParameters,
    clock: WallClock,
}

impl DevelopmentCa {
    /// The CA kept in `folder`. Creates it if it does not exist.
    pub(super) fn open(folder: &Path, ttl: Duration, tls: TlsParameters) -> Result<Self, IdentityError> {
        let file = folder.join(ROOT_FILE);
        let pem = match fs::read_to_string(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make(folder, &file)?,
            Err(error) => return Err(unreadable(&file, error)),
            Ok(pem) => pem,
        };
        let key = KeyPair::from_pem(&pem)?;
        let root = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(IdentityError::unusable("the development CA's root"))?;
        let issuer = Issuer::from_ca_cert_der(&root, key)?;
        Ok(Self { issuer, root, ttl, tls, clock: WallClock::system() })
    }

    /// Signs at another time.
    #[cfg(test)]
    pub(super) fn with_clock(self, clock: WallClock) -> Self {
        Self { clock, ..self }
    }

    fn sign(&self, identity: &Identity) -> Result<Credentials, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial());
        (params.not_before, params.not_after) = validity(self.clock.now().into(), self.ttl);
        let leaf = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::try_from(key.serialize_der())
            .map_err(|reason| IdentityError::PrivateKey { reason })?;
        let roots = vec![self.root.clone()];
        Credentials::new(identity.clone(), vec![leaf.der().clone()], &key, roots, &self.tls)
    }
}

impl Authority for DevelopmentCa {
    fn issue(&self, identity: &Identity) -> Issuing {
        let signed = self.sign(identity);
        Box::pin(std::future::ready(signed))
    }
}

/// Creates a root in `folder`, or returns the one that another process created first.
fn make(folder: &Path, file: &Path) -> Result<String, IdentityError> {
    let kept = |source: io::Error| IdentityError::Store {
        path: folder.display().to_string(),
        source: Arc::new(source),
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(kept)?;
    let (pem, cert) = new_root()?;
    let temporary = TemporaryFile(folder.join(format!(".root-{:016x}", rand::rng().random::<u64>())));
    temporary.write(&pem, 0o600).map_err(kept)?;
    match fs::hard_link(&temporary.0, file) {
        Ok(()) => {
            info!(folder = %folder.display(), "development CA root created");
            publish(folder, &cert).map_err(kept)?;
            Ok(pem)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::read_to_string(file).map_err(|error| unreadable(file, error))
        }
        Err(error) => Err(kept(error)),
    }
}

fn publish(folder: &Path, cert: &str) -> io::Result<()> {
    let temporary = TemporaryFile(folder.join(format!(".cert-{:016x}", rand::rng().random::<u64>())));
    temporary.write(cert, 0o644)?;
    fs::rename(&temporary.0, folder.join(ROOT_CERT_FILE))
}

/// Key and certificate in one text, and the certificate alone.
fn new_root() -> Result<(String, String), IdentityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Adit development CA");
    // With equal names, a leaf of one root would fail against the other with a bad signature, which
    // looks like an attack.
    let number = rand::rng().random::<u64>();
    params.distinguished_name.push(DnType::CommonName, format!("root {number:016x}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial());
    (params.not_before, params.not_after) = validity(OffsetDateTime::now_utc(), ROOT_LIFE);
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let key_pem = key.serialize_pem();
    let root = CertifiedIssuer::self_signed(params, key)?;
    Ok((format!("{key_pem}{}", root.pem()), root.pem()))
}

fn validity(now: OffsetDateTime, life: Duration) -> (OffsetDateTime, OffsetDateTime) {
    (now - CLOCK_SKEW, now + life)
}

/// Positive and not zero (RFC 5280 §4.1.2.2).
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::rng().random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn unreadable(file: &Path, source: io::Error) -> IdentityError {
    IdentityError::Read {
        what: "the development CA's root",
        path: file.display().to_string(),
        source: Arc::new(source),
    }
}

/// Removed on drop, unless renamed.
struct TemporaryFile(PathBuf);

impl TemporaryFile {
    fn write(&self, text: &str, mode: u32) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&self.0)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // After a rename there is nothing to remove.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests;
