//! SPIFFE ids of workloads: `spiffe://trust-domain/ns/namespace/sa/service-account`.

use std::{fmt, str::FromStr};

/// Who a workload is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The trust domain.
    pub trust_domain: String,
    /// The namespace.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
}

/// A text that is no identity of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
pub struct InvalidIdentity;

/// Longest of its parts: of a name in Kubernetes, and of a host.
const LONGEST_PART: usize = 253;

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trust_domain, namespace, service_account } = self;
        write!(f, "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text.strip_prefix("spiffe://").ok_or(InvalidIdentity)?;
        let mut parts = path.split('/');
        let mut next = || parts.next().unwrap_or_default();
        let (trust_domain, ns, namespace, sa, service_account) = (next(), next(), next(), next(), next());
        let names = [trust_domain, namespace, service_account];
        if parts.next().is_some() || ns != "ns" || sa != "sa" || !names.into_iter().all(is_name) {
            return Err(InvalidIdentity);
        }
        let [trust_domain, namespace, service_account] = names.map(str::to_owned);
        Ok(Self { trust_domain, namespace, service_account })
    }
}

/// Whether `text` can be the name of an object, so that it means nothing else in a selector or path.
fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    let ends = |text: &str| !text.starts_with(['-', '.']) && !text.ends_with(['-', '.']);
    !text.is_empty() && text.len() <= LONGEST_PART && text.chars().all(plain) && ends(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_written_as_it_is_read() {
        let text = "spiffe://cluster.local/ns/demo/sa/web";
        assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
    }

    #[test]
    fn anything_else_is_none() {
        for text in [
            "",
            "cluster.local/ns/demo/sa/web",
            "spiffe://cluster.local/ns/demo",
            "spiffe://cluster.local/ns/demo/sa/",
            "spiffe://cluster.local/ns//sa/web",
            "spiffe://cluster.local/ns/demo/sa/web/more",
            "spiffe://cluster.local/sa/demo/ns/web",
            "spiffe://cluster.local/ns/demo/sa/web,spec.nodeName=b",
            "spiffe://cluster.local/ns/demo/sa/WEB",
            "spiffe://cluster.local/ns/../sa/web",
            "spiffe://cluster.local/ns/demo/sa/-web",
            &format!("spiffe://cluster.local/ns/demo/sa/{}", "a".repeat(254)),
        ] {
            assert_eq!(text.parse::<Identity>(), Err(InvalidIdentity), "{text}");
        }
    }
}
