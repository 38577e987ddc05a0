//! The API server's keys and certificates, and those of its administrator.

use std::{fs, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};

/// A CA, the server's and the administrator's certificates, and the key that signs tokens of
/// service accounts.
pub(super) fn make_keys(dir: &Path) {
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).expect(name);
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "the testbed's root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("root");
    write("ca.crt", &ca.pem());
    let leaf = |name: &str, organisation: Option<&str>, common_name: &str, names: &[&str], usage| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        if let Some(organisation) = organisation {
            params.distinguished_name.push(DnType::OrganizationName, organisation);
        }
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().expect("key");
        let certificate = params.signed_by(&key, &ca).expect("certificate");
        write(&format!("{name}.crt"), &certificate.pem());
        write(&format!("{name}.key"), &key.serialize_pem());
    };
    leaf("server", None, "kube-apiserver", &["127.0.0.1", "localhost"], ExtendedKeyUsagePurpose::ServerAuth);
    leaf("admin", Some("system:masters"), "admin", &[], ExtendedKeyUsagePurpose::ClientAuth);
    let accounts = KeyPair::generate().expect("key");
    write("accounts.key", &accounts.serialize_pem());
    write("accounts.pub", &accounts.public_key_pem());
}
