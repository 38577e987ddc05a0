//! Names that several parts write and read as text: who a workload is, and its service account.

use std::{fmt, str::FromStr, sync::Arc};

/// A SPIFFE id of the form `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`. No part is
/// empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// Trust domain, such as `cluster.local`.
    pub trust_domain: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Kubernetes service account.
    pub service_account: Arc<str>,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trust_domain, namespace, service_account } = self;
        write!(f, "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
    }
}

/// A text that is not the SPIFFE id of a workload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not of the form spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT")]
pub struct InvalidIdentity(pub String);

/// Bytes; SPIFFE-ID §2.3. The PROXY protocol header relies on it for its length field.
const MAX_ID: usize = 2048;

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = || {
            let mut parts = text.strip_prefix("spiffe://")?.split('/');
            let trust_domain = parts.next()?;
            (parts.next()? == "ns").then_some(())?;
            let namespace = parts.next()?;
            (parts.next()? == "sa").then_some(())?;
            let service_account = parts.next()?;
            parts.next().is_none().then_some([trust_domain, namespace, service_account])
        };
        match parts() {
            Some(parts) if text.len() <= MAX_ID && parts.iter().all(|part| is_segment(part)) => {
                let [trust_domain, namespace, service_account] = parts.map(Arc::from);
                Ok(Self { trust_domain, namespace, service_account })
            }
            _ => Err(InvalidIdentity(text.to_owned())),
        }
    }
}

/// Whether `text` may be a trust domain: SPIFFE-ID §2.1, and upper case, which some meshes have.
#[must_use]
pub fn is_trust_domain(text: &str) -> bool {
    is_segment(text)
}

/// SPIFFE-ID §2.2: letters, digits, dots, dashes and underscores, and no relative segments.
fn is_segment(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !matches!(part, "" | "." | "..") && part.chars().all(allowed)
}

impl serde::Serialize for Identity {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A service account of a cluster, written `NAMESPACE/NAME`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServiceAccount {
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
}

/// A text that names no service account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected NAMESPACE/NAME, such as istio-system/ztunnel")]
pub struct InvalidServiceAccount;

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for ServiceAccount {
    type Err = InvalidServiceAccount;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(InvalidServiceAccount),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_writing_and_reading() {
        let text = "spiffe://cluster.local/ns/shop/sa/web-1.v2";
        assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
    }

    #[test]
    fn an_identity_has_a_longest_length() {
        let of = |length: usize| {
            format!("spiffe://td/ns/a/sa/{}", "b".repeat(length - "spiffe://td/ns/a/sa/".len()))
        };
        assert!(of(MAX_ID).parse::<Identity>().is_ok());
        assert!(of(MAX_ID + 1).parse::<Identity>().is_err());
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "spiffe://",
            "cluster.local/ns/a/sa/b",
            "https://cluster.local/ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://td/ns//sa/b",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/sa/b/ns/a",
            "spiffe://td/ns/a",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a b/sa/b",
            "spiffe://td:80/ns/a/sa/b",
            "spiffe://td/ns/a%2f/sa/b",
            "spiffe://td/ns/a/sa/b?x",
            "SPIFFE://td/ns/a/sa/b",
        ] {
            assert_eq!(text.parse::<Identity>(), Err(InvalidIdentity(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn an_account_has_a_namespace_and_a_name() {
        assert_eq!("a/b".parse::<ServiceAccount>().unwrap().to_string(), "a/b");
        for text in ["", "a", "/a", "a/", "a/b/c"] {
            assert_eq!(text.parse::<ServiceAccount>(), Err(InvalidServiceAccount), "{text}");
        }
    }
}
