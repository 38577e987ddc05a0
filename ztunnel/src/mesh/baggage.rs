//! The `baggage` header of HBONE, in Istio's format: a tunnel describes its workload to the peer.

use std::{borrow::Cow, sync::Arc};

use super::{
    Workload,
    workloads::{Common, Locality},
};
use crate::identity::Identity;

/// Bytes of a value that are kept: as many as a Kubernetes label may have.
const LONGEST: usize = 63;

/// A peer's description of its workload. These are claims: use them for labels, never for policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster_id: Option<Arc<str>>,
    /// `k8s.namespace.name`.
    pub namespace: Option<Arc<str>>,
    /// `k8s.deployment.name`, or that of another kind.
    pub workload_name: Option<Arc<str>>,
    /// `service.name`.
    pub service_name: Option<Arc<str>>,
    /// `service.version`.
    pub revision: Option<Arc<str>>,
    /// `cloud.region`.
    pub region: Option<Arc<str>>,
    /// `cloud.availability_zone`.
    pub zone: Option<Arc<str>>,
}

impl Baggage {
    /// The workload as described, for labels. Its identity comes from the certificate, not from
    /// here.
    #[must_use]
    pub fn into_workload(self, identity: Option<&Identity>) -> Workload {
        let or = |claimed: Option<Arc<str>>| claimed.unwrap_or_default();
        let proven = |part: fn(&Identity) -> &Arc<str>| identity.map(part).cloned().unwrap_or_default();
        let common = Common {
            // What is proven counts more than what is said.
            namespace: identity
                .map_or_else(|| or(self.namespace), |identity| Arc::clone(&identity.namespace)),
            service_account: proven(|identity| &identity.service_account),
            trust_domain: proven(|identity| &identity.trust_domain),
            cluster_id: or(self.cluster_id),
            workload_name: or(self.workload_name.clone()),
            canonical_name: or(self.service_name),
            canonical_revision: or(self.revision),
            locality: Locality { region: or(self.region), zone: or(self.zone), ..Locality::default() },
            ..Common::default()
        };
        // The pod's own name is not in the header.
        Workload { name: or(self.workload_name), common: Arc::new(common), ..Workload::default() }
    }
}

/// The header value for a workload. Unknown parts are left out.
#[must_use]
pub fn of_workload(workload: &Workload) -> String {
    let kind = match &*workload.workload_type {
        known @ ("deployment" | "cronjob" | "job" | "pod") => known,
        _ => "deployment",
    };
    let pairs = [
        (Cow::from("k8s.cluster.name"), &workload.cluster_id),
        ("k8s.namespace.name".into(), &workload.namespace),
        (format!("k8s.{kind}.name").into(), &workload.workload_name),
        ("service.name".into(), &workload.canonical_name),
        ("service.version".into(), &workload.canonical_revision),
        ("cloud.region".into(), &workload.locality.region),
        ("cloud.availability_zone".into(), &workload.locality.zone),
    ];
    let known = pairs.iter().filter(|(_, value)| !value.is_empty());
    known.map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

/// Parses the header, which may have several lines. Unknown keys, and items that are not pairs, are
/// ignored.
pub fn parse<'a>(lines: impl IntoIterator<Item = &'a str>) -> Baggage {
    let mut baggage = Baggage::default();
    for pair in lines.into_iter().flat_map(|line| line.split(',')) {
        let Some((key, value)) = pair.split_once('=') else { continue };
        let (key, value) = (key.trim(), value.trim());
        let field = match key {
            "k8s.cluster.name" => &mut baggage.cluster_id,
            "k8s.namespace.name" => &mut baggage.namespace,
            "k8s.deployment.name" | "k8s.cronjob.name" | "k8s.pod.name" | "k8s.job.name" => {
                &mut baggage.workload_name
            }
            "service.name" => &mut baggage.service_name,
            "service.version" => &mut baggage.revision,
            "cloud.region" => &mut baggage.region,
            "cloud.availability_zone" => &mut baggage.zone,
            _ => continue,
        };
        *field = (!value.is_empty()).then(|| value[..value.floor_char_boundary(LONGEST)].into());
    }
    baggage
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::tests::workload;

    #[test]
    fn known_parts_are_written_in_the_order_of_istio() {
        let mut web = workload("web-1", "10.0.0.1");
        web.canonical_name = "web".into();
        web.canonical_revision = "v1".into();
        web.workload_name = "web".into();
        web.workload_type = "deployment".into();
        web.cluster_id = "Kubernetes".into();
        assert_eq!(
            of_workload(&web),
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=web,\
             service.name=web,service.version=v1"
        );
        web.workload_type = "job".into();
        web.locality.zone = "a".into();
        assert!(of_workload(&web).contains(",k8s.job.name=web,"));
        assert!(of_workload(&web).ends_with(",cloud.availability_zone=a"));
    }

    #[test]
    fn several_lines_are_one_and_nonsense_says_nothing() {
        let lines =
            ["k8s.namespace.name=shop,k8s.pod.name=web,other=x", "service.name=web,service.version=,,=,a"];
        let expected = Baggage {
            namespace: Some("shop".into()),
            workload_name: Some("web".into()),
            service_name: Some("web".into()),
            ..Baggage::default()
        };
        assert_eq!(parse(lines), expected);
        assert_eq!(parse([]), Baggage::default());
    }

    #[test]
    fn values_are_cut_at_the_length_of_a_label() {
        let long = format!("service.name={}", "ä".repeat(100));
        assert_eq!(*parse([&*long]).service_name.unwrap(), *"ä".repeat(31));
    }

    #[test]
    fn a_proven_namespace_counts_more_than_a_claimed_one() {
        let claimed = || parse(["k8s.namespace.name=claimed"]);
        let identity = "spiffe://td/ns/proven/sa/web".parse().unwrap();
        assert_eq!(&*claimed().into_workload(Some(&identity)).namespace, "proven");
        assert_eq!(&*claimed().into_workload(None).namespace, "claimed");
    }
}
