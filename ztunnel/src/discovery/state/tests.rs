use std::{
    path::Path,
    time::{Duration, Instant},
};

use prost::Message as _;
use prost_types::Any;
use ztunnel_api::{
    security::{self, Authorization},
    workload::{Address, Workload, address::Type},
};

use super::*;
use crate::{discovery::last_state::Origin, mesh::PolicyKnowledge};

struct Tunnel {
    state: DiscoveryState,
    store: Arc<Store>,
    last_state: Arc<LastState>,
}

impl Tunnel {
    fn start(folder: &Path, demand: Option<Demand>) -> Self {
        let origin = Origin { on_demand: demand.is_some(), ..Origin::default() };
        let last_state = Arc::new(LastState::start(folder, origin).unwrap());
        let defaults =
            ResourceDefaults { trust_domain: "cluster.local".into(), cluster_id: "Kubernetes".into() };
        let store = Arc::new(Store::untold());
        let state = DiscoveryState::new(defaults, Arc::clone(&store), demand, Some(Arc::clone(&last_state)));
        Self { state, store, last_state }
    }

    fn told(&mut self, type_url: &str, resources: Vec<Resource>, removed: &[&str]) {
        let removed_resources = removed.iter().map(|&name| name.to_owned()).collect();
        let response = DeltaDiscoveryResponse {
            type_url: type_url.to_owned(),
            resources,
            removed_resources,
            ..DeltaDiscoveryResponse::default()
        };
        let reply = self.state.apply(response).expect("a subscription");
        assert_eq!(reply.error_detail, None);
    }

    fn workloads(&self) -> Vec<String> {
        let mut uids: Vec<_> = self.store.snapshot().workloads().map(|one| one.uid.to_string()).collect();
        uids.sort();
        uids
    }

    fn policies(&self) -> Vec<String> {
        self.store.snapshot().policies().map(|policy| policy.key.to_string()).collect()
    }

    /// Seconds since what is in force was told, if that is not the control plane's own word.
    fn age(&self) -> Option<u64> {
        self.last_state.status().view().in_force_age_secs
    }

    fn versions(&self) -> usize {
        self.state.first(&Node::default()).iter().map(|request| request.initial_resource_versions.len()).sum()
    }
}

fn resource(type_url: &str, name: &str, value: Vec<u8>) -> Resource {
    let value = Any { type_url: type_url.to_owned(), value };
    let version = "1".to_owned();
    Resource { name: name.to_owned(), version, resource: Some(value), ..Resource::default() }
}

fn workload(uid: &str) -> Resource {
    let workload = Workload {
        uid: uid.to_owned(),
        name: uid.to_owned(),
        namespace: "demo".to_owned(),
        addresses: vec![vec![10, 0, 0, uid.as_bytes()[0]]],
        ..Workload::default()
    };
    resource(ADDRESS, uid, Address { r#type: Some(Type::Workload(workload)) }.encode_to_vec())
}

fn policy(name: &str) -> Resource {
    let sent = Authorization {
        name: name.to_owned(),
        namespace: "demo".to_owned(),
        action: security::Action::Deny.into(),
        ..Authorization::default()
    };
    resource(AUTHORIZATION, &format!("demo/{name}"), sent.encode_to_vec())
}

/// Recalls once what others have written so far can be found.
fn recall(tunnel: &mut Tunnel) {
    let end = Instant::now() + Duration::from_secs(20);
    while !tunnel.state.recall() {
        assert!(Instant::now() < end, "no state within 20 s");
        std::thread::yield_now();
    }
}

#[test]
fn what_was_told_last_is_in_force_until_everything_was_told_anew() {
    let folder = tempfile::tempdir().unwrap();
    let mut before = Tunnel::start(folder.path(), None);
    before.told(ADDRESS, vec![workload("a"), workload("b")], &[]);
    before.told(AUTHORIZATION, vec![policy("deny"), policy("other")], &[]);

    let mut after = Tunnel::start(folder.path(), None);
    recall(&mut after);
    assert_eq!((after.workloads(), after.policies()), (before.workloads(), before.policies()));
    assert!(after.age().is_some_and(|age| age < 60));
    assert_eq!(after.versions(), 0, "the control plane is told of nothing that another process heard");
    assert!(before.age().is_none() && before.versions() == 4);

    // One snapshot takes the place of the other.
    let mut changes = after.store.subscribe();
    changes.mark_unchanged();
    let version = *changes.borrow();
    after.told(AUTHORIZATION, vec![policy("deny"), policy("new")], &[]);
    assert_eq!(*changes.borrow(), version + 1);
    assert_eq!(after.policies(), ["demo/deny", "demo/new"]);
    // Not named is not removed: it may be one that denies.
    let other = "demo/other".parse().unwrap();
    assert!(matches!(after.store.snapshot().policy(&other), PolicyKnowledge::Unheard));
    assert_eq!(after.workloads(), ["a", "b"]);
    assert!(after.age().is_some(), "addresses are those of before");
    after.told(ADDRESS, vec![workload("b"), workload("c")], &[]);
    assert_eq!(after.workloads(), ["b", "c"]);
    assert_eq!(after.age(), None);
    // From here on responses are differences.
    after.told(ADDRESS, vec![workload("d")], &["b"]);
    assert_eq!(after.workloads(), ["c", "d"]);
    let address = |uid: &str| [10, 0, 0, uid.as_bytes()[0]].into();
    let mesh = after.store.snapshot();
    assert!(mesh.workload_by_address("", address("a")).is_none());
    assert_eq!(&*mesh.workload_by_address("", address("d")).unwrap().uid, "d");
}

#[test]
fn what_the_control_plane_has_told_already_stays() {
    let folder = tempfile::tempdir().unwrap();
    let mut before = Tunnel::start(folder.path(), None);
    before.told(ADDRESS, vec![workload("a")], &[]);
    before.told(AUTHORIZATION, vec![policy("deny")], &[]);
    let mut after = Tunnel::start(folder.path(), None);
    after.told(ADDRESS, vec![workload("b")], &[]);
    recall(&mut after);
    assert_eq!((after.workloads(), after.policies()), (vec!["b".to_owned()], before.policies()));
    after.told(ADDRESS, vec![workload("c")], &[]);
    assert_eq!(after.workloads(), ["b", "c"]);
    after.told(AUTHORIZATION, vec![], &[]);
    assert_eq!((after.policies().len(), after.age()), (0, None));
}

/// A policy that is refused, and what stands in for it, are the same for a successor.
#[test]
fn what_is_not_understood_is_as_strict_for_a_successor() {
    let folder = tempfile::tempdir().unwrap();
    let mut before = Tunnel::start(folder.path(), None);
    before.told(ADDRESS, vec![], &[]);
    let refused = |value: Vec<u8>| DeltaDiscoveryResponse {
        type_url: AUTHORIZATION.to_owned(),
        resources: vec![resource(AUTHORIZATION, "demo/new", value), policy("deny")],
        ..DeltaDiscoveryResponse::default()
    };
    assert!(before.state.apply(refused(vec![0x0a, 0xff])).unwrap().error_detail.is_some());
    // What is held stays in force when a later version is refused, here and there.
    let mut later = refused(vec![0x0a, 0xff]);
    later.resources = vec![resource(AUTHORIZATION, "demo/deny", vec![0x0a, 0xff])];
    assert!(before.state.apply(later).unwrap().error_detail.is_some());
    let mut after = Tunnel::start(folder.path(), None);
    recall(&mut after);
    let strict = |tunnel: &Tunnel| -> Vec<(String, bool)> {
        let mesh = tunnel.store.snapshot();
        mesh.policies().map(|policy| (policy.key.to_string(), policy.stand_in)).collect()
    };
    assert_eq!(strict(&before), [("demo/deny".to_owned(), false), ("demo/new".to_owned(), true)]);
    assert_eq!(strict(&after), strict(&before));
}

#[tokio::test(start_paused = true)]
async fn names_that_were_answered_are_answered_until_the_control_plane_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let demand = Demand::default();
    let mut before = Tunnel::start(folder.path(), Some(demand.clone()));
    for name in ["/10.0.0.97", "/10.0.0.99"] {
        demand.subscribe(name);
    }
    let mut known = workload("a");
    known.aliases = vec!["/10.0.0.97".to_owned()];
    before.told(AUTHORIZATION, vec![], &[]);
    before.told(ADDRESS, vec![known.clone()], &["/10.0.0.99"]);

    let demand = Demand::default();
    let mut after = Tunnel::start(folder.path(), Some(demand.clone()));
    // The state can be found before the last response is in it.
    let end = Instant::now() + Duration::from_secs(20);
    while after.workloads().is_empty() {
        assert!(Instant::now() < end, "no state within 20 s");
        after.state.recall();
    }
    for name in ["/10.0.0.97", "/10.0.0.99"] {
        assert_eq!(demand.resolve(name, "pod").await, Ok(false), "{name}");
    }
    let mut all: Vec<_> = demand.all().iter().map(ToString::to_string).collect();
    all.sort();
    assert_eq!(all, ["/10.0.0.97", "/10.0.0.99"]);
    demand.resolve("/10.0.0.98", "pod").await.unwrap_err();

    // It is there, and sends the pods of this node first.
    after.told(AUTHORIZATION, vec![], &[]);
    after.told(ADDRESS, vec![workload("z")], &[]);
    assert_eq!((after.workloads(), after.age()), (vec!["z".to_owned()], None));
    demand.resolve("/10.0.0.97", "pod").await.unwrap_err();
    after.told(ADDRESS, vec![known], &["/10.0.0.99"]);
    for name in ["/10.0.0.97", "/10.0.0.99"] {
        assert_eq!(demand.resolve(name, "pod").await, Ok(false), "{name}");
    }
}
