//! The keys and certificates of a control plane, of its administrator and of nodes.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use serde_json::{Value, json};

/// A folder with a CA, and what it has signed.
pub(super) struct Keys {
    dir: PathBuf,
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Keys {
    /// A CA, the certificates of the API server (for these `names` too) and of the administrator,
    /// and the key that signs tokens of service accounts.
    pub(super) fn make(dir: &Path, names: &[&str]) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "the testbed's root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("root");
        let keys = Self { dir: dir.to_owned(), ca };
        keys.write("ca.crt", &keys.ca.pem());
        keys.sign("server", None, "kube-apiserver", &[&["127.0.0.1", "localhost"], names].concat());
        keys.sign("admin", Some("system:masters"), "admin", &[]);
        let accounts = KeyPair::generate().expect("key");
        keys.write("accounts.key", &accounts.serialize_pem());
        keys.write("accounts.pub", &accounts.public_key_pem());
        keys
    }

    /// Makes `NAME.crt` and `NAME.key`, for a server with these `names` and for a client that is
    /// `common_name` of `organisation`.
    pub(super) fn sign(&self, name: &str, organisation: Option<&str>, common_name: &str, names: &[&str]) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        if let Some(organisation) = organisation {
            params.distinguished_name.push(DnType::OrganizationName, organisation);
        }
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("key");
        let certificate = params.signed_by(&key, &self.ca).expect("certificate");
        self.write(&format!("{name}.crt"), &certificate.pem());
        self.write(&format!("{name}.key"), &key.serialize_pem());
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.join(name), text).expect(name);
    }
}

/// A token of these claims, signed as the API server signs those of service accounts (RFC 7515).
pub(super) fn token(dir: &Path, claims: &Value) -> String {
    let pem = fs::read_to_string(dir.join("accounts.key")).expect("accounts.key");
    let key = KeyPair::from_pem(&pem).expect("key");
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.serialized_der()).expect("key");
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(&json!({"alg": "ES256", "typ": "JWT"})), part(claims));
    let signature = key.sign(&SystemRandom::new(), signed.as_bytes()).expect("signature");
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

/// The claims of a token.
pub(super) fn claims(token: &str) -> Value {
    let payload = token.split('.').nth(1).expect("claims");
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).expect("base64")).expect("JSON")
}
