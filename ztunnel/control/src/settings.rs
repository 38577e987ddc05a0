//! What one cluster is called in the mesh.

/// The trust domain that stands for itself: it is left out of resources, and readers add it.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

/// Names that resources carry and the API does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshSettings {
    /// The id of the cluster, such as `Kubernetes`.
    pub cluster_id: String,
    /// The trust domain of all identities.
    pub trust_domain: String,
    /// The domain below which services have their names, such as `cluster.local`.
    pub cluster_domain: String,
    /// The network that all pods are on. Empty where there is one only.
    pub network: String,
    /// Policies of this namespace are about all namespaces.
    pub root_namespace: String,
}

impl Default for MeshSettings {
    fn default() -> Self {
        Self {
            cluster_id: "Kubernetes".to_owned(),
            trust_domain: DEFAULT_TRUST_DOMAIN.to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            network: String::new(),
            root_namespace: "adit-system".to_owned(),
        }
    }
}

impl MeshSettings {
    /// The trust domain as workloads carry it.
    pub(crate) fn sent_trust_domain(&self) -> String {
        if self.trust_domain == DEFAULT_TRUST_DOMAIN { String::new() } else { self.trust_domain.clone() }
    }

    /// The hostname of a service.
    pub(crate) fn hostname(&self, namespace: &str, service: &str) -> String {
        format!("{service}.{namespace}.svc.{}", self.cluster_domain)
    }

    /// The name of a service's resource.
    pub(crate) fn service_key(&self, namespace: &str, service: &str) -> String {
        format!("{namespace}/{}", self.hostname(namespace, service))
    }
}
