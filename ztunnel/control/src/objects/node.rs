//! Where a node is.

use k8s_openapi::api::core::v1 as api;

/// Region, zone and subzone of a node, from its labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeLocality {
    pub region: String,
    pub zone: String,
    pub subzone: String,
}

impl NodeLocality {
    /// `None` where no label says anything.
    pub(crate) fn read(node: &api::Node) -> Option<Self> {
        let labels = node.metadata.labels.as_ref()?;
        let label = |key: &str| labels.get(key).cloned().unwrap_or_default();
        let locality = Self {
            region: label("topology.kubernetes.io/region"),
            zone: label("topology.kubernetes.io/zone"),
            subzone: label("topology.istio.io/subzone"),
        };
        (locality != Self::default()).then_some(locality)
    }
}
