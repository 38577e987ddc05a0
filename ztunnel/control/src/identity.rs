//! SPIFFE ids of workloads of this cluster: `spiffe://trust-domain/ns/namespace/sa/service-account`.

pub use ztunnel_api::names::{Identity, InvalidIdentity};

/// Longest of its parts: of a name in Kubernetes, and of a host.
const LONGEST_PART: usize = 253;

/// An identity whose parts are names of objects, so that they mean nothing else in a selector or path.
///
/// # Errors
/// `text` is something else.
pub fn of_objects(text: &str) -> Result<Identity, InvalidIdentity> {
    let identity: Identity = text.parse()?;
    let Identity { trust_domain, namespace, service_account } = &identity;
    if [trust_domain, namespace, service_account].into_iter().all(|part| is_name(part)) {
        Ok(identity)
    } else {
        Err(InvalidIdentity(text.to_owned()))
    }
}

/// Whether `text` can be the name of an object.
fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    let ends = |text: &str| !text.starts_with(['-', '.']) && !text.ends_with(['-', '.']);
    !text.is_empty() && text.len() <= LONGEST_PART && text.chars().all(plain) && ends(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_of_objects_is_one_of_workloads() {
        let text = "spiffe://cluster.local/ns/demo/sa/web";
        assert_eq!(of_objects(text).unwrap().to_string(), text);
        for text in [
            "",
            "spiffe://cluster.local/ns/demo/sa/web/more",
            "spiffe://cluster.local/ns/demo/sa/web,spec.nodeName=b",
            "spiffe://cluster.local/ns/demo/sa/WEB",
            "spiffe://cluster.local/ns/demo/sa/we_b",
            "spiffe://cluster.local/ns/../sa/web",
            "spiffe://cluster.local/ns/demo/sa/-web",
            &format!("spiffe://cluster.local/ns/demo/sa/{}", "a".repeat(254)),
        ] {
            assert_eq!(of_objects(text), Err(InvalidIdentity(text.to_owned())), "{text}");
        }
    }
}
