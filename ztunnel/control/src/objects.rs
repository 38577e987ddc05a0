//! What counts of the objects of the API, and no more: thousands of them are held.
//!
//! * `pod`, `node`, `service`, `endpoints`: of Kubernetes itself
//! * `policy`, `peer_authentication`: of Istio, and ours, where they are installed

pub(crate) mod endpoints;
pub(crate) mod node;
pub(crate) mod peer_authentication;
pub(crate) mod pod;
pub(crate) mod policy;
pub(crate) mod service;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::DynamicObject;
use serde_json::Value;

use crate::report::PolicyKind;

/// Labels, as objects have them and selectors want them.
pub(crate) type Labels = BTreeMap<String, String>;

/// Namespace and name of an object. The namespace of a cluster-wide one is empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ObjectKey {
    pub namespace: String,
    pub name: String,
}

impl ObjectKey {
    pub(crate) fn of(metadata: &ObjectMeta) -> Self {
        Self {
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
        }
    }
}

/// What a namespace has.
#[derive(Clone, Debug, Default)]
pub(crate) struct NamespaceObjects {
    /// What the namespace itself says, for its services.
    pub distribution: BTreeMap<String, service::Distribution>,
    pub pods: BTreeMap<String, pod::Pod>,
    pub services: BTreeMap<String, service::Service>,
    pub slices: BTreeMap<String, endpoints::EndpointSlice>,
    /// Istio's.
    pub authorization_policies: BTreeMap<String, policy::AuthorizationPolicy>,
    /// Ours.
    pub access_policies: BTreeMap<String, policy::AuthorizationPolicy>,
    pub peer_authentications: BTreeMap<String, peer_authentication::PeerAuthentication>,
}

impl NamespaceObjects {
    /// Of both kinds.
    pub(crate) fn policies(&self) -> impl Iterator<Item = &policy::AuthorizationPolicy> {
        self.authorization_policies.values().chain(self.access_policies.values())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.distribution.is_empty()
            && self.pods.is_empty()
            && self.services.is_empty()
            && self.slices.is_empty()
            && self.authorization_policies.is_empty()
            && self.access_policies.is_empty()
            && self.peer_authentications.is_empty()
    }
}

/// An object whose status is written here.
pub(crate) trait Reported: Clone + PartialEq {
    /// What its status says.
    fn conditions(&mut self) -> &mut Vec<Value>;

    /// Whether both are the same but for their statuses.
    fn says_like(&self, other: &Self) -> bool {
        let without = |object: &Self| {
            let mut object = object.clone();
            object.conditions().clear();
            object
        };
        without(self) == without(other)
    }
}

/// The version of the API that `object` was read in.
fn api_version(object: &DynamicObject, kind: PolicyKind) -> String {
    let version = object.types.as_ref().and_then(|types| Some(types.api_version.split_once('/')?.1));
    version.unwrap_or_else(|| kind.version()).to_owned()
}

fn conditions(object: &DynamicObject) -> Vec<Value> {
    let conditions = object.data.pointer("/status/conditions").and_then(Value::as_array);
    conditions.cloned().unwrap_or_default()
}

/// Whether `labels` have everything that `selector` wants. An empty selector wants nothing.
pub(crate) fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}
