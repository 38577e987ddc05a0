//! The delta xDS protocol for one resource type: requests, responses, and what stays known across
//! streams. Pure.
//!
//! Every resource is accepted or refused by itself. A refusal names the resource and the reason;
//! its previous version stays in force, and so do the other resources of the response. Where a
//! policy has no previous version, a stricter one stands in for it: a policy that is not understood
//! is not one that is not there. The first request of the next stream lists the versions held, so
//! that the control plane sends differences only.

use std::{collections::HashMap, sync::Arc};

use ztunnel_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status};

use super::{AUTHORIZATION, DecodeError, ResourceDecoder, convert::stand_in, demand::SubscriptionChange};
use crate::mesh::{MeshChange, PolicyKey, ServiceKey};

const EVERYTHING: &str = "*";
/// `google.rpc.Code` of a NACK.
const INVALID_ARGUMENT: i32 = 3;

/// All resources of one type, and the requests that keep them up to date.
#[derive(Debug)]
pub struct Subscription {
    type_url: &'static str,
    /// By resource name. There may be 100,000 of them.
    held: HashMap<Arc<str>, HeldResource>,
    /// The names whose last version was refused; each with the policy that stands in, if nothing is
    /// held.
    refused: HashMap<Arc<str>, Option<PolicyKey>>,
    /// Whether any response was received, on this stream or an earlier one.
    pub received: bool,
    /// What the mesh has of this type was not told to this subscription. The next response is
    /// everything, and takes its place.
    pub is_stale: bool,
    /// Whether outcomes say what to [keep](ResponseOutcome::put).
    pub is_kept: bool,
}

#[derive(Debug)]
struct HeldResource {
    version: Arc<str>,
    /// `None` for a workload whose uid is the resource name, which is most of them.
    key: Option<Box<ResourceKey>>,
}

impl HeldResource {
    /// Also returns the name to hold it under. A workload's uid and resource name share one
    /// allocation.
    fn new(name: &str, version: Arc<str>, key: ResourceKey) -> (Arc<str>, Self) {
        match key {
            ResourceKey::Workload(uid) if *uid == *name => (uid, Self { version, key: None }),
            key => (name.into(), Self { version, key: Some(Box::new(key)) }),
        }
    }

    fn key(&self, name: &Arc<str>) -> ResourceKey {
        self.key.as_deref().cloned().unwrap_or_else(|| ResourceKey::Workload(Arc::clone(name)))
    }
}

/// The key under which [`crate::mesh::Mesh`] stores a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
enum ResourceKey {
    Workload(Arc<str>),
    Service(ServiceKey),
    Policy(PolicyKey),
}

impl ResourceKey {
    /// `None`: the change is not about one resource.
    fn of(change: &MeshChange) -> Option<Self> {
        Some(match change {
            MeshChange::PutWorkload(workload) => Self::Workload(Arc::clone(&workload.uid)),
            MeshChange::PutService(service) => Self::Service(service.key()),
            MeshChange::PutPolicy(policy) => Self::Policy(policy.key.clone()),
            MeshChange::RemoveWorkload(uid) => Self::Workload(Arc::clone(uid)),
            MeshChange::RemoveService(key) => Self::Service(key.clone()),
            MeshChange::RemovePolicy(key) => Self::Policy(key.clone()),
            MeshChange::ForgetAddresses | MeshChange::ForgetPolicies => return None,
        })
    }

    fn removed(self) -> MeshChange {
        match self {
            Self::Workload(uid) => MeshChange::RemoveWorkload(uid),
            Self::Service(key) => MeshChange::RemoveService(key),
            Self::Policy(key) => MeshChange::RemovePolicy(key),
        }
    }
}

/// The effect of one response.
#[derive(Debug)]
pub struct ResponseOutcome {
    /// To apply to the mesh, in this order.
    pub changes: Vec<MeshChange>,
    /// The ACK, or a NACK that lists what was refused.
    pub reply: DeltaDiscoveryRequest,
    /// `name: reason` of each refused resource.
    pub refused: Vec<String>,
    /// What to keep for the next process: the names that were removed.
    pub removed: Vec<String>,
    /// Also to keep: the resources that count from now on, as they came. Those that were taken, and
    /// those for which something stands in.
    pub put: Vec<Resource>,
}

impl Subscription {
    /// Of a type such as [`super::ADDRESS`]; nothing is held yet.
    #[must_use]
    pub fn new(type_url: &'static str) -> Self {
        let (held, refused) = (HashMap::new(), HashMap::new());
        Self { type_url, held, refused, received: false, is_stale: false, is_kept: false }
    }

    /// Holds nothing any more, so that the next stream tells everything.
    pub(super) fn begin_anew(&mut self) {
        self.held.clear();
        self.refused.clear();
        self.is_stale = true;
    }

    /// The resource type.
    #[must_use]
    pub fn type_url(&self) -> &'static str {
        self.type_url
    }

    /// Number of resources held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Number of resources whose last version was refused.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.refused.len()
    }

    /// The first request of a stream, with the versions held. An empty list of names subscribes to
    /// everything. With `only`, it subscribes to those names alone: it lists the wildcard too and
    /// unsubscribes from it at once, because a first request without the wildcard and with an empty
    /// `only` would mean everything.
    pub fn initial_request(&self, node: Node, only: Option<Vec<Arc<str>>>) -> DeltaDiscoveryRequest {
        let (mut subscribe, mut unsubscribe) = (Vec::new(), Vec::new());
        if let Some(names) = only {
            subscribe.push(EVERYTHING.to_owned());
            subscribe.extend(names.iter().map(ToString::to_string));
            unsubscribe.push(EVERYTHING.to_owned());
        }
        let versions = self.held.iter().map(|(name, held)| (name.to_string(), held.version.to_string()));
        // What stands in has no version: the control plane sends the resource again, or says that it
        // is gone.
        let stand_ins = self.refused.iter().filter(|(_, stand_in)| stand_in.is_some());
        let versions = versions.chain(stand_ins.map(|(name, _)| (name.to_string(), String::new())));
        DeltaDiscoveryRequest {
            node: Some(node),
            type_url: self.type_url.to_owned(),
            initial_resource_versions: versions.collect(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// A later request of the same stream.
    #[must_use]
    pub fn update_request(&self, names: &SubscriptionChange) -> DeltaDiscoveryRequest {
        let texts = |names: &[Arc<str>]| names.iter().map(ToString::to_string).collect();
        DeltaDiscoveryRequest {
            type_url: self.type_url.to_owned(),
            resource_names_subscribe: texts(&names.subscribe),
            resource_names_unsubscribe: texts(&names.unsubscribe),
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// Removes what is held under `name`.
    fn remove(&mut self, name: &str) -> Option<ResourceKey> {
        self.held.remove_entry(name).map(|(name, held)| held.key(&name))
    }

    /// The control plane says that there is no `name`. That is news of a policy also if it was never
    /// sent: a workload may name it.
    fn removed(&mut self, name: &str) -> Option<MeshChange> {
        let stand_in = self.refused.remove(name).flatten();
        let held = self.remove(name).or_else(|| stand_in.map(ResourceKey::Policy));
        let named = || (self.type_url == AUTHORIZATION).then(|| name.parse().ok()).flatten();
        held.or_else(|| named().map(ResourceKey::Policy)).map(ResourceKey::removed)
    }

    /// The changes of a resource that cannot be used. What is held stays.
    fn refuse(&mut self, resource: &Resource) -> Vec<MeshChange> {
        let before = self.refused.remove(&*resource.name).flatten();
        let unheld = self.type_url == AUTHORIZATION && !self.held.contains_key(&*resource.name);
        let stand_in = unheld.then(|| stand_in(resource));
        self.refused.insert((&*resource.name).into(), stand_in.as_ref().map(|policy| policy.key.clone()));
        let gone = before.filter(|key| stand_in.as_ref().is_some_and(|policy| policy.key != *key));
        gone.map(MeshChange::RemovePolicy).into_iter().chain(stand_in.map(MeshChange::PutPolicy)).collect()
    }

    /// Decodes a response and updates what is held.
    pub fn apply(&mut self, decoder: &ResourceDecoder, response: DeltaDiscoveryResponse) -> ResponseOutcome {
        let (mut changes, mut refused) = (Vec::with_capacity(response.resources.len()), Vec::new());
        let mut put = Vec::new();
        for name in &response.removed_resources {
            changes.extend(self.removed(name));
        }
        for resource in response.resources {
            let read = match &resource.resource {
                // Each type has its own subscription: a response must not carry another type.
                Some(any) if any.type_url == self.type_url => decoder.decode(any),
                Some(any) => Err(DecodeError::UnexpectedType { type_url: any.type_url.clone() }),
                None => Err(DecodeError::Empty),
            };
            let change = match read {
                Ok(change) => change,
                Err(reason) => {
                    refused.push(format!("{}: {reason}", resource.name));
                    let instead = self.refuse(&resource);
                    if self.is_kept && !instead.is_empty() {
                        put.push(resource);
                    }
                    changes.extend(instead);
                    continue;
                }
            };
            let Some(key) = ResourceKey::of(&change) else { continue };
            let stand_in = self.refused.remove(&*resource.name).flatten();
            let before = self.remove(&resource.name).or_else(|| stand_in.map(ResourceKey::Policy));
            if let Some(before) = before
                && before != key
            {
                changes.push(before.removed());
            }
            let version = decoder.texts.intern(resource.version.as_str());
            let (name, held) = HeldResource::new(&resource.name, version, key);
            self.held.insert(name, held);
            changes.push(change);
            if self.is_kept {
                put.push(resource);
            }
        }
        self.received = true;
        let error_detail =
            (!refused.is_empty()).then(|| Status { code: INVALID_ARGUMENT, message: refused.join("; ") });
        let reply = DeltaDiscoveryRequest {
            type_url: self.type_url.to_owned(),
            response_nonce: response.nonce,
            error_detail,
            ..DeltaDiscoveryRequest::default()
        };
        ResponseOutcome { changes, reply, refused, removed: response.removed_resources, put }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use prost::Message as _;
    use prost_types::Any;
    use ztunnel_api::{
        security::{self, Authorization},
        workload::{Address, Service, TunnelProtocol, Workload, address::Type},
    };

    use super::*;
    use crate::{discovery::ADDRESS, mesh::local_file::ResourceDefaults};

    fn decoder() -> ResourceDecoder {
        ResourceDecoder::new(ResourceDefaults {
            trust_domain: "cluster.local".into(),
            cluster_id: "Kubernetes".into(),
        })
    }

    fn resource(name: &str, version: &str, content: Type) -> Resource {
        let value = Address { r#type: Some(content) }.encode_to_vec();
        let resource = Some(Any { type_url: ADDRESS.to_owned(), value });
        Resource { name: name.to_owned(), version: version.to_owned(), resource, aliases: vec![] }
    }

    fn workload(uid: &str, version: &str, protocol: TunnelProtocol) -> Resource {
        let workload = Workload {
            uid: uid.to_owned(),
            name: uid.to_owned(),
            namespace: "demo".to_owned(),
            addresses: vec![vec![10, 0, 0, 1]],
            tunnel_protocol: protocol.into(),
            ..Workload::default()
        };
        resource(uid, version, Type::Workload(workload))
    }

    fn response(nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
        DeltaDiscoveryResponse {
            resources,
            removed_resources: removed.iter().map(|&name| name.to_owned()).collect(),
            nonce: nonce.to_owned(),
            type_url: ADDRESS.to_owned(),
            ..DeltaDiscoveryResponse::default()
        }
    }

    #[test]
    fn good_resources_hold_and_bad_ones_are_refused_by_name() {
        let (decoder, mut addresses) = (decoder(), Subscription::new(ADDRESS));
        let node = Node { id: "n".to_owned(), metadata: None };
        let first = addresses.initial_request(node.clone(), None);
        assert!(first.resource_names_subscribe.is_empty() && first.initial_resource_versions.is_empty());
        assert!(!addresses.received);

        let both = vec![
            workload("a", "1", TunnelProtocol::Hbone),
            workload("b", "1", TunnelProtocol::LegacyIstioMtls),
        ];
        let taken = addresses.apply(&decoder, response("n1", both, &[]));
        assert!(addresses.received);
        assert_eq!(taken.changes.len(), 1);
        assert_eq!(taken.reply.response_nonce, "n1");
        let error = taken.reply.error_detail.expect("a refusal").message;
        assert!(error.starts_with("b: tunnel_protocol: ") && !error.contains("a:"), "{error}");
        let versions = |addresses: &Subscription| {
            addresses.initial_request(node.clone(), None).initial_resource_versions
        };
        assert_eq!(versions(&addresses), [("a".to_owned(), "1".to_owned())].into());

        // A bad version of what is held leaves the good one in force.
        let bad = vec![workload("a", "2", TunnelProtocol::LegacyIstioMtls)];
        let taken = addresses.apply(&decoder, response("n2", bad, &[]));
        assert_eq!((taken.changes.len(), taken.refused.len()), (0, 1));
        assert_eq!(versions(&addresses), [("a".to_owned(), "1".to_owned())].into());

        let taken = addresses.apply(&decoder, response("n3", vec![], &["a", "never-seen"]));
        assert_eq!(taken.changes, [MeshChange::RemoveWorkload("a".into())]);
        assert_eq!(taken.reply.error_detail, None);
        assert!(versions(&addresses).is_empty());
    }

    fn policies(resources: &[(&str, Vec<u8>)], removed: &[&str]) -> DeltaDiscoveryResponse {
        let resource = |(name, value): &(&str, Vec<u8>)| {
            let resource = Some(Any { type_url: AUTHORIZATION.to_owned(), value: value.clone() });
            Resource { name: (*name).to_owned(), version: "1".to_owned(), resource, aliases: vec![] }
        };
        let resources = resources.iter().map(resource).collect();
        DeltaDiscoveryResponse { type_url: AUTHORIZATION.to_owned(), ..response("n", resources, removed) }
    }

    #[test]
    fn a_refused_policy_leaves_a_stricter_one_until_it_is_understood_or_gone() {
        let (decoder, mut subscription) = (decoder(), Subscription::new(AUTHORIZATION));
        let versions = |subscription: &Subscription| {
            subscription.initial_request(Node::default(), None).initial_resource_versions
        };
        let sent = |name: &str, action: i32| Authorization {
            name: name.to_owned(),
            namespace: "demo".to_owned(),
            scope: security::Scope::Namespace.into(),
            action,
            ..Authorization::default()
        };
        let of = |action| ("demo/p", sent("p", action).encode_to_vec());
        let taken = subscription.apply(&decoder, policies(&[of(9)], &[]));
        let [MeshChange::PutPolicy(stand_in)] = &taken.changes[..] else { panic!("{taken:?}") };
        assert!(stand_in.stand_in && stand_in.rules.len() == 1);
        assert_eq!((subscription.refused(), subscription.held()), (1, 0));
        // The next stream is told that there is something of that name, in no version.
        assert_eq!(versions(&subscription), [("demo/p".to_owned(), String::new())].into());

        let taken = subscription.apply(&decoder, policies(&[of(1)], &[]));
        assert!(matches!(&taken.changes[..], [MeshChange::PutPolicy(policy)] if !policy.stand_in));
        assert_eq!((subscription.refused(), subscription.held()), (0, 1));
        // Now one is held, and stays in force.
        let taken = subscription.apply(&decoder, policies(&[of(9)], &[]));
        assert_eq!((taken.changes, subscription.refused(), subscription.held()), (vec![], 1, 1));
        assert_eq!(versions(&subscription), [("demo/p".to_owned(), "1".to_owned())].into());
        let taken = subscription.apply(&decoder, policies(&[], &["demo/p"]));
        assert_eq!(taken.changes, [MeshChange::RemovePolicy("demo/p".parse().unwrap())]);
        assert_eq!((subscription.refused(), subscription.held()), (0, 0));

        // What stands in goes with its resource, under whatever key it is.
        let other = ("demo/p", sent("q", 9).encode_to_vec());
        subscription.apply(&decoder, policies(&[other], &[]));
        let taken = subscription.apply(&decoder, policies(&[of(1)], &[]));
        assert!(
            matches!(&taken.changes[..], [MeshChange::RemovePolicy(_), MeshChange::PutPolicy(_)]),
            "{taken:?}"
        );
        // A removal of what was never sent is news all the same.
        let taken = subscription.apply(&decoder, policies(&[], &["demo/never"]));
        assert_eq!(taken.changes, [MeshChange::RemovePolicy("demo/never".parse().unwrap())]);
    }

    #[test]
    fn a_name_that_becomes_something_else_is_not_what_it_was() {
        let (decoder, mut addresses) = (decoder(), Subscription::new(ADDRESS));
        let first = vec![workload("a", "1", TunnelProtocol::None)];
        addresses.apply(&decoder, response("1", first, &[]));
        let service = Service {
            name: "a".to_owned(),
            namespace: "demo".to_owned(),
            hostname: "a.example".to_owned(),
            ..Service::default()
        };
        let second = vec![resource("a", "2", Type::Service(service))];
        let taken = addresses.apply(&decoder, response("2", second, &[]));
        assert!(
            matches!(&taken.changes[..], [MeshChange::RemoveWorkload(_), MeshChange::PutService(_)]),
            "{taken:?}"
        );
        let removed = addresses.apply(&decoder, response("3", vec![], &["a"]));
        let key = "demo/a.example".parse().unwrap();
        assert_eq!(removed.changes, [MeshChange::RemoveService(key)]);
    }

    #[test]
    fn what_is_empty_or_of_another_type_is_refused() {
        let (decoder, mut addresses) = (decoder(), Subscription::new(ADDRESS));
        let empty = Resource { name: "e".to_owned(), ..Resource::default() };
        let other = Any { type_url: AUTHORIZATION.to_owned(), value: vec![] };
        let other = Resource { name: "o".to_owned(), resource: Some(other), ..Resource::default() };
        let cut = Any { type_url: ADDRESS.to_owned(), value: vec![0x0a, 0xff] };
        let cut = Resource { name: "c".to_owned(), resource: Some(cut), ..Resource::default() };
        let nothing = Any { type_url: ADDRESS.to_owned(), value: vec![] };
        let nothing = Resource { name: "n".to_owned(), resource: Some(nothing), ..Resource::default() };
        let taken = addresses.apply(&decoder, response("1", vec![empty, other, cut, nothing], &[]));
        let names: BTreeMap<_, _> =
            taken.refused.iter().filter_map(|refused| refused.split_once(": ")).collect();
        assert_eq!(names.keys().copied().collect::<Vec<_>>(), ["c", "e", "n", "o"]);
        assert_eq!((taken.changes.len(), addresses.held()), (0, 0));
    }
}
