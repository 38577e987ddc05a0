//! What the root's Secret holds. Pure.
//!
//! | key | |
//! |---|---|
//! | `tls.crt`, `tls.key` | what signs, as in any Secret of type `kubernetes.io/tls` |
//! | `ca.crt` | the roots, where `tls.crt` does not end with one: all are trusted |
//! | `next.crt`, `next.key` | trusted, and signs later: a [rotation](super::rotation) |
//! | `previous.crt` | trusted for a while yet: certificates that lead to it are in use |
//! | `revoked` | serial numbers of certificates that are refused, and since when |

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta, jiff::Timestamp,
};
use rustls::pki_types::CertificateDer;

use super::{
    Authority, AuthorityError, ders, new_root, pem,
    revoked::{self, Revoked},
};

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const ROOTS: &str = "ca.crt";
const NEXT: [&str; 2] = ["next.crt", "next.key"];
const PREVIOUS: &str = "previous.crt";
const REVOKED: &str = "revoked";
/// When the next root begins to sign, and until when those before are trusted (RFC 3339).
const SIGNS_FROM: &str = "adit.dev/next-signs-from";
const TRUSTED_UNTIL: &str = "adit.dev/previous-trusted-until";
/// Who made it.
const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "ztunnel-control");

/// Why there is no root in a Secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// A part does not fit.
    #[error("{key} cannot be used")]
    Unusable {
        /// Which.
        key: &'static str,
        /// The cause.
        source: AuthorityError,
    },
    /// A part is missing.
    #[error("there is no text under {key}: expected certificate and key in PEM under tls.crt and tls.key")]
    Incomplete {
        /// Which.
        key: &'static str,
    },
}

/// What the Secret holds, as far as it can be used.
#[derive(Debug)]
pub struct RootSecret {
    /// Signs. Trusts everything that the Secret names.
    pub authority: Authority,
    /// Signs later. `None` for the time: it was not decided yet.
    pub next: Option<(CertificateDer<'static>, Option<Timestamp>)>,
    /// Trusted for a while yet.
    pub previous: Vec<CertificateDer<'static>>,
    /// Until when. `None`: it was not decided yet.
    pub previous_until: Option<Timestamp>,
    /// Certificates that are refused.
    pub revoked: Revoked,
}

impl RootSecret {
    /// Reads it.
    ///
    /// # Errors
    /// Something is missing, or does not fit.
    pub fn read(secret: &Secret) -> Result<Self, SecretError> {
        let certificate = text(secret, CERTIFICATE)?;
        let unusable = |key| move |source| SecretError::Unusable { key, source };
        let roots = text(secret, ROOTS).ok();
        let authority = Authority::from_pem(certificate, text(secret, KEY)?, roots);
        let authority = authority.map_err(unusable(CERTIFICATE))?;
        let mut more = Vec::new();
        let next = match text(secret, NEXT[0]) {
            Err(_) => None,
            Ok(certificate) => {
                let next = Authority::from_pem(certificate, text(secret, NEXT[1])?, None);
                let root = next.map_err(unusable(NEXT[0]))?.trusted[0].clone();
                more.push(root.clone());
                Some((root, time(secret, SIGNS_FROM)))
            }
        };
        let previous = match text(secret, PREVIOUS) {
            Err(_) => Vec::new(),
            Ok(certificates) => ders("the certificate", certificates).map_err(unusable(PREVIOUS))?,
        };
        more.extend(previous.iter().cloned());
        Ok(Self {
            authority: authority.trusting(&more),
            next,
            previous,
            previous_until: time(secret, TRUSTED_UNTIL),
            revoked: text(secret, REVOKED).map_or_else(|_| Revoked::new(), revoked::parse),
        })
    }
}

/// A Secret with a new root.
///
/// # Errors
/// The library fails.
pub fn made(name: &str, trust_domain: &str) -> Result<Secret, AuthorityError> {
    let (certificate, key) = new_root(trust_domain)?;
    let data = [(CERTIFICATE, certificate), (KEY, key)];
    let data = data.map(|(name, text)| (name.to_owned(), ByteString(text.into_bytes())));
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some([(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned())].into()),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(data.into()),
        ..Secret::default()
    })
}

/// Whether it was made here, and not brought by somebody.
#[must_use]
pub fn is_made(secret: &Secret) -> bool {
    let labels = secret.metadata.labels.as_ref();
    labels.and_then(|labels| labels.get(MANAGED_BY.0)).is_some_and(|by| by == MANAGED_BY.1)
}

/// The same as a new object, for when it was deleted.
#[must_use]
pub fn restored(secret: &Secret) -> Secret {
    let ObjectMeta { name, labels, annotations, .. } = secret.metadata.clone();
    Secret { metadata: ObjectMeta { name, labels, annotations, ..ObjectMeta::default() }, ..secret.clone() }
}

/// With another root, which is to sign later.
///
/// # Errors
/// The library fails.
pub fn with_next(mut secret: Secret, trust_domain: &str) -> Result<Secret, AuthorityError> {
    let (certificate, key) = new_root(trust_domain)?;
    set(&mut secret, NEXT[0], certificate);
    set(&mut secret, NEXT[1], key);
    set_time(&mut secret, SIGNS_FROM, None);
    Ok(secret)
}

/// Without it.
#[must_use]
pub fn without_next(mut secret: Secret) -> Secret {
    let data = secret.data.get_or_insert_default();
    for key in NEXT {
        data.remove(key);
    }
    set_time(&mut secret, SIGNS_FROM, None);
    secret
}

/// With the time from which the next root signs.
#[must_use]
pub(super) fn signing_from(mut secret: Secret, time: Timestamp) -> Secret {
    set_time(&mut secret, SIGNS_FROM, Some(time));
    secret
}

/// The next root signs.
#[must_use]
pub(super) fn switched(mut secret: Secret) -> Secret {
    let data = secret.data.get_or_insert_default();
    for (from, to) in NEXT.into_iter().zip([CERTIFICATE, KEY]) {
        if let Some(text) = data.remove(from) {
            data.insert(to.to_owned(), text);
        }
    }
    data.remove(ROOTS);
    set_time(&mut secret, SIGNS_FROM, None);
    secret
}

/// These are trusted until then; none of them: nothing is.
#[must_use]
pub(super) fn with_previous(
    mut secret: Secret,
    roots: &[CertificateDer<'static>],
    until: Option<Timestamp>,
) -> Secret {
    if roots.is_empty() {
        secret.data.get_or_insert_default().remove(PREVIOUS);
    } else {
        set(&mut secret, PREVIOUS, roots.iter().map(pem).collect());
    }
    set_time(&mut secret, TRUSTED_UNTIL, until.filter(|_| !roots.is_empty()));
    secret
}

/// With these certificates revoked, and no others.
#[must_use]
pub fn with_revoked(mut secret: Secret, revoked: &Revoked) -> Secret {
    if revoked.is_empty() {
        secret.data.get_or_insert_default().remove(REVOKED);
    } else {
        set(&mut secret, REVOKED, revoked::written(revoked));
    }
    secret
}

fn text<'a>(secret: &'a Secret, key: &'static str) -> Result<&'a str, SecretError> {
    let bytes = secret.data.as_ref().and_then(|data| data.get(key));
    let text = bytes.and_then(|bytes| std::str::from_utf8(&bytes.0).ok());
    text.filter(|text| !text.is_empty()).ok_or(SecretError::Incomplete { key })
}

fn set(secret: &mut Secret, key: &str, text: String) {
    secret.data.get_or_insert_default().insert(key.to_owned(), ByteString(text.into_bytes()));
}

/// `None` also for what is no time.
fn time(secret: &Secret, annotation: &str) -> Option<Timestamp> {
    secret.metadata.annotations.as_ref()?.get(annotation)?.parse().ok()
}

fn set_time(secret: &mut Secret, annotation: &str, time: Option<Timestamp>) {
    let annotations: &mut BTreeMap<String, String> = secret.metadata.annotations.get_or_insert_default();
    match time {
        Some(time) => annotations.insert(annotation.to_owned(), time.to_string()),
        None => annotations.remove(annotation),
    };
}
