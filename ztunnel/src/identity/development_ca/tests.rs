use std::os::unix::fs::PermissionsExt;

use rustls::pki_types::UnixTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::*;

const HOUR: Duration = Duration::from_hours(1);

fn identity() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

#[test]
fn the_root_survives_and_its_key_is_private() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("a/b");
    let first = DevelopmentCa::open(&folder, HOUR, TlsParameters::default()).unwrap();
    let second = DevelopmentCa::open(&folder, HOUR, TlsParameters::default()).unwrap();
    assert_eq!(first.root, second.root);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder.join(ROOT_FILE)), 0o600);
    assert_eq!(mode(&folder), 0o700);
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, [ROOT_CERT_FILE, ROOT_FILE], "no temporary file stays");
    let published = fs::read(folder.join(ROOT_CERT_FILE)).unwrap();
    assert_eq!(CertificateDer::from_pem_slice(&published).unwrap(), first.root);
}

#[test]
fn processes_that_start_together_agree_on_one_root() {
    let folder = tempfile::tempdir().unwrap();
    let open = || DevelopmentCa::open(folder.path(), HOUR, TlsParameters::default()).unwrap().root;
    let roots: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(roots.iter().all(|root| *root == roots[0]));
}

#[test]
fn a_leaf_bears_the_identity_for_both_roles_and_lives_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let ca = DevelopmentCa::open(folder.path(), HOUR, TlsParameters::default()).unwrap();
    let credentials = ca.sign(&identity()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&credentials.chain()[0]).unwrap();
    assert!(leaf.subject().iter().next().is_none());
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && usage.server_auth);
    let now = i64::try_from(UnixTime::now().as_secs()).unwrap();
    let left = leaf.validity().not_after.timestamp() - now;
    assert!((3590..=3600).contains(&left), "{left}");
    assert_eq!(crate::identity::trust::uri_names(&credentials.chain()[0]), [identity().to_string()]);
}

#[test]
fn a_spoilt_root_is_named_and_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(ROOT_FILE);
    fs::write(&file, "no PEM").unwrap();
    assert!(DevelopmentCa::open(folder.path(), HOUR, TlsParameters::default()).is_err());
    assert_eq!(fs::read_to_string(&file).unwrap(), "no PEM");
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = DevelopmentCa::open(&file.join("ca"), HOUR, TlsParameters::default()).err().unwrap();
    assert!(error.to_string().contains("file/ca"), "{error}");
}
