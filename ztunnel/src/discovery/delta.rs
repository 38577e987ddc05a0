//! The delta protocol for one type of resource: what is asked and answered on one stream, and what is held over several.
//! Pure.
//!
//! Every resource is taken or refused by itself: a refusal names it and the reason, the others of the same response hold,
//! and of the refused one the version that was held before. What is held is told at the start of the next stream, so that
//! the control plane sends differences only.

use std::{collections::HashMap, sync::Arc};

use ztunnel_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status};

use super::{Sender, demand::Names};
use crate::mesh::{Change, PolicyKey, ServiceKey};

const EVERYTHING: &str = "*";
/// google.rpc.Code of a refusal.
const INVALID_ARGUMENT: i32 = 3;

/// All resources of one type.
#[derive(Debug)]
pub struct Subscription {
    type_url: &'static str,
    /// By resource name. There may be 100,000 of them.
    held: HashMap<Arc<str>, Held>,
    /// Whether a response was taken at all, in this stream or an earlier one.
    pub answered: bool,
}

#[derive(Debug)]
struct Held {
    version: Arc<str>,
    /// None: a workload whose uid is the resource's name, as most resources are.
    key: Option<Box<Key>>,
}

impl Held {
    /// And the name under which it is held: where it is a workload's uid, the two are one text.
    fn new(name: &str, version: Arc<str>, key: Key) -> (Arc<str>, Self) {
        match key {
            Key::Workload(uid) if *uid == *name => (uid, Self { version, key: None }),
            key => (name.into(), Self { version, key: Some(Box::new(key)) }),
        }
    }

    fn key(&self, name: &Arc<str>) -> Key {
        self.key.as_deref().cloned().unwrap_or_else(|| Key::Workload(Arc::clone(name)))
    }
}

/// Under which the mesh knows a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Key {
    Workload(Arc<str>),
    Service(ServiceKey),
    Policy(PolicyKey),
}

impl Key {
    fn of(change: &Change) -> Self {
        match change {
            Change::Workload(workload) => Self::Workload(Arc::clone(&workload.uid)),
            Change::Service(service) => Self::Service(service.key()),
            Change::Policy(policy) => Self::Policy(policy.key.clone()),
            Change::NoWorkload(uid) => Self::Workload(Arc::clone(uid)),
            Change::NoService(key) => Self::Service(key.clone()),
            Change::NoPolicy(key) => Self::Policy(key.clone()),
        }
    }

    fn removed(self) -> Change {
        match self {
            Self::Workload(uid) => Change::NoWorkload(uid),
            Self::Service(key) => Change::NoService(key),
            Self::Policy(key) => Change::NoPolicy(key),
        }
    }
}

/// What a response comes to.
#[derive(Debug)]
pub struct Taken {
    pub changes: Vec<Change>,
    /// Acknowledges, or says what was refused.
    pub reply: DeltaDiscoveryRequest,
    /// `name: reason` of each.
    pub refused: Vec<String>,
}

impl Subscription {
    pub fn new(type_url: &'static str) -> Self {
        Self { type_url, held: HashMap::new(), answered: false }
    }

    pub fn type_url(&self) -> &'static str {
        self.type_url
    }

    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// The first request of a stream: everything, less what is held. Empty lists of names mean everything; `only` these
    /// names are asked for if it is given, by asking for everything and for that no more.
    pub fn first(&self, node: Node, only: Option<Vec<Arc<str>>>) -> DeltaDiscoveryRequest {
        let (mut subscribe, mut unsubscribe) = (Vec::new(), Vec::new());
        if let Some(names) = only {
            subscribe.push(EVERYTHING.to_owned());
            subscribe.extend(names.iter().map(ToString::to_string));
            unsubscribe.push(EVERYTHING.to_owned());
        }
        let versions = self.held.iter().map(|(name, held)| (name.to_string(), held.version.to_string()));
        DeltaDiscoveryRequest {
            node: Some(node),
            type_url: self.type_url.to_owned(),
            initial_resource_versions: versions.collect(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// A later request of a stream.
    pub fn change(&self, names: &Names) -> DeltaDiscoveryRequest {
        let texts = |names: &[Arc<str>]| names.iter().map(ToString::to_string).collect();
        DeltaDiscoveryRequest {
            type_url: self.type_url.to_owned(),
            resource_names_subscribe: texts(&names.subscribe),
            resource_names_unsubscribe: texts(&names.unsubscribe),
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// What was held under that name.
    fn forget(&mut self, name: &str) -> Option<Key> {
        self.held.remove_entry(name).map(|(name, held)| held.key(&name))
    }

    pub fn take(&mut self, sender: &Sender, response: DeltaDiscoveryResponse) -> Taken {
        let (mut changes, mut refused) = (Vec::with_capacity(response.resources.len()), Vec::new());
        for name in response.removed_resources {
            changes.extend(self.forget(&name).map(Key::removed));
        }
        for resource in response.resources {
            let read = match &resource.resource {
                // Each type has its own subscription; one that comes under another's name is nobody's.
                Some(any) if any.type_url == self.type_url => sender.read(any),
                Some(any) => Err(format!("is of type {}", any.type_url)),
                None => Err("has no content".to_owned()),
            };
            let change = match read {
                Ok(change) => change,
                Err(reason) => {
                    refused.push(format!("{}: {reason}", resource.name));
                    continue;
                }
            };
            let key = Key::of(&change);
            if let Some(before) = self.forget(&resource.name)
                && before != key
            {
                changes.push(before.removed());
            }
            let (name, held) = Held::new(&resource.name, sender.texts.shared(resource.version), key);
            self.held.insert(name, held);
            changes.push(change);
        }
        self.answered = true;
        let error_detail =
            (!refused.is_empty()).then(|| Status { code: INVALID_ARGUMENT, message: refused.join("; ") });
        let reply = DeltaDiscoveryRequest {
            type_url: self.type_url.to_owned(),
            response_nonce: response.nonce,
            error_detail,
            ..DeltaDiscoveryRequest::default()
        };
        Taken { changes, reply, refused }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use prost::Message as _;
    use prost_types::Any;
    use ztunnel_api::{
        discovery::Resource,
        workload::{Address, Service, TunnelProtocol, Workload, address::Type},
    };

    use super::*;
    use crate::{discovery::ADDRESS, mesh::local_file::Defaults};

    fn sender() -> Sender {
        Sender::new(Defaults { trust_domain: "cluster.local".into(), cluster_id: "Kubernetes".into() })
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
        let (sender, mut addresses) = (sender(), Subscription::new(ADDRESS));
        let node = Node { id: "n".to_owned(), metadata: None };
        let first = addresses.first(node.clone(), None);
        assert!(first.resource_names_subscribe.is_empty() && first.initial_resource_versions.is_empty());
        assert!(!addresses.answered);

        let both = vec![
            workload("a", "1", TunnelProtocol::Hbone),
            workload("b", "1", TunnelProtocol::LegacyIstioMtls),
        ];
        let taken = addresses.take(&sender, response("n1", both, &[]));
        assert!(addresses.answered);
        assert_eq!(taken.changes.len(), 1);
        assert_eq!(taken.reply.response_nonce, "n1");
        let error = taken.reply.error_detail.expect("a refusal").message;
        assert!(error.starts_with("b: tunnel_protocol: ") && !error.contains("a:"), "{error}");
        let versions =
            |addresses: &Subscription| addresses.first(node.clone(), None).initial_resource_versions;
        assert_eq!(versions(&addresses), [("a".to_owned(), "1".to_owned())].into());

        // A bad version of what is held leaves the good one in force.
        let bad = vec![workload("a", "2", TunnelProtocol::LegacyIstioMtls)];
        let taken = addresses.take(&sender, response("n2", bad, &[]));
        assert_eq!((taken.changes.len(), taken.refused.len()), (0, 1));
        assert_eq!(versions(&addresses), [("a".to_owned(), "1".to_owned())].into());

        let taken = addresses.take(&sender, response("n3", vec![], &["a", "never-seen"]));
        assert_eq!(taken.changes, [Change::NoWorkload("a".into())]);
        assert_eq!(taken.reply.error_detail, None);
        assert!(versions(&addresses).is_empty());
    }

    #[test]
    fn a_name_that_becomes_something_else_is_not_what_it_was() {
        let (sender, mut addresses) = (sender(), Subscription::new(ADDRESS));
        let first = vec![workload("a", "1", TunnelProtocol::None)];
        addresses.take(&sender, response("1", first, &[]));
        let service = Service {
            name: "a".to_owned(),
            namespace: "demo".to_owned(),
            hostname: "a.example".to_owned(),
            ..Service::default()
        };
        let second = vec![resource("a", "2", Type::Service(service))];
        let taken = addresses.take(&sender, response("2", second, &[]));
        assert!(matches!(&taken.changes[..], [Change::NoWorkload(_), Change::Service(_)]), "{taken:?}");
        let removed = addresses.take(&sender, response("3", vec![], &["a"]));
        let key = "demo/a.example".parse().unwrap();
        assert_eq!(removed.changes, [Change::NoService(key)]);
    }

    #[test]
    fn what_is_empty_or_of_another_type_is_refused() {
        let (sender, mut addresses) = (sender(), Subscription::new(ADDRESS));
        let empty = Resource { name: "e".to_owned(), ..Resource::default() };
        let other = Any { type_url: crate::discovery::AUTHORIZATION.to_owned(), value: vec![] };
        let other = Resource { name: "o".to_owned(), resource: Some(other), ..Resource::default() };
        let cut = Any { type_url: ADDRESS.to_owned(), value: vec![0x0a, 0xff] };
        let cut = Resource { name: "c".to_owned(), resource: Some(cut), ..Resource::default() };
        let nothing = Any { type_url: ADDRESS.to_owned(), value: vec![] };
        let nothing = Resource { name: "n".to_owned(), resource: Some(nothing), ..Resource::default() };
        let taken = addresses.take(&sender, response("1", vec![empty, other, cut, nothing], &[]));
        let names: BTreeMap<_, _> =
            taken.refused.iter().filter_map(|refused| refused.split_once(": ")).collect();
        assert_eq!(names.keys().copied().collect::<Vec<_>>(), ["c", "e", "n", "o"]);
        assert_eq!((taken.changes.len(), addresses.held()), (0, 0));
    }
}
