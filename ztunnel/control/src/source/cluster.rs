//! All objects that count, by namespace, and the snapshot that follows from them. Pure.
//!
//! What a namespace's resources depend on is in the namespace itself, in the root namespace (its
//! policies), and in the localities of nodes. So a change costs the work of one namespace.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use tracing::warn;

use super::watch::Update;
use crate::{
    convert::{self, Surroundings},
    objects::{
        NamespaceObjects, ObjectKey, Reported,
        endpoints::EndpointSlice,
        node::NodeLocality,
        peer_authentication::PeerAuthentication,
        pod::Pod,
        policy::AuthorizationPolicy,
        service::{Distribution, Service},
    },
    report::Unreported,
    settings::MeshSettings,
    snapshot::{NamespaceResources, Snapshot},
};

/// Kinds of objects that are followed.
pub(super) const KINDS: usize = 8;

/// What the API server said.
#[derive(Debug)]
pub(super) enum Change {
    Pods(Update<Pod>),
    Nodes(Update<NodeLocality>),
    Services(Update<Service>),
    Slices(Update<EndpointSlice>),
    /// Of namespaces.
    Distributions(Update<Distribution>),
    /// Istio's.
    AuthorizationPolicies(Update<AuthorizationPolicy>),
    /// Ours.
    AccessPolicies(Update<AuthorizationPolicy>),
    PeerAuthentications(Update<PeerAuthentication>),
}

/// All objects that count.
#[derive(Debug)]
pub(super) struct Cluster {
    settings: MeshSettings,
    namespaces: BTreeMap<String, NamespaceObjects>,
    nodes: HashMap<String, NodeLocality>,
    /// Kinds that were listed once.
    listed: BTreeSet<usize>,
    /// Namespaces whose resources are out of date.
    stale: BTreeSet<String>,
    resources: BTreeMap<String, Arc<NamespaceResources>>,
    /// By namespace: policies that are stricter than they are written, and why.
    unenforceable: BTreeMap<String, Vec<(String, String)>>,
    /// Namespaces with policies whose status was looked at last before they changed.
    unreported: BTreeSet<String>,
    /// By namespace: what statuses do not say yet.
    reports: BTreeMap<String, Vec<Unreported>>,
    number: u64,
}

impl Cluster {
    pub(super) fn new(settings: MeshSettings) -> Self {
        Self {
            settings,
            namespaces: BTreeMap::new(),
            nodes: HashMap::new(),
            listed: BTreeSet::new(),
            stale: BTreeSet::new(),
            resources: BTreeMap::new(),
            unenforceable: BTreeMap::new(),
            unreported: BTreeSet::new(),
            reports: BTreeMap::new(),
            number: 0,
        }
    }

    /// How many kinds were listed once.
    pub(super) fn listed(&self) -> usize {
        self.listed.len()
    }

    /// How many policies are stricter than they are written.
    pub(super) fn unenforceable(&self) -> usize {
        self.unenforceable.values().map(Vec::len).sum()
    }

    /// What the statuses of policies do not say yet. `None`: that did not change.
    pub(super) fn reports(&mut self) -> Option<Vec<Unreported>> {
        let mut differs = false;
        for name in std::mem::take(&mut self.unreported) {
            let objects = self.namespaces.get(&name);
            let reports = objects.map(|objects| convert::reports(&self.settings, &name, objects));
            let reports = reports.filter(|reports| !reports.is_empty());
            differs |= self.reports.get(&name) != reports.as_ref();
            match reports {
                Some(reports) => self.reports.insert(name, reports),
                None => self.reports.remove(&name),
            };
        }
        differs.then(|| self.reports.values().flatten().cloned().collect())
    }

    pub(super) fn apply(&mut self, change: Change) {
        match change {
            Change::Pods(update) => self.update(0, update, |of| &mut of.pods),
            Change::Services(update) => self.update(1, update, |of| &mut of.services),
            Change::Slices(update) => self.update(2, update, |of| &mut of.slices),
            Change::AuthorizationPolicies(update) => {
                self.update_policies(3, update, |of| &mut of.authorization_policies);
            }
            Change::AccessPolicies(update) => self.update_policies(7, update, |of| &mut of.access_policies),
            Change::PeerAuthentications(update) => {
                let before = self.has_peer_authentication();
                self.update_policies(4, update, |of| &mut of.peer_authentications);
                if before != self.has_peer_authentication() {
                    self.stale.insert(self.settings.root_namespace.clone());
                }
            }
            // A namespace is the only one of its kind in itself.
            Change::Distributions(update) => {
                let inside = |key: ObjectKey| ObjectKey { namespace: key.name.clone(), name: key.name };
                let update = match update {
                    Update::Listed(all) => {
                        Update::Listed(all.into_iter().map(|(key, kept)| (inside(key), kept)).collect())
                    }
                    Update::One(key, kept) => Update::One(inside(key), kept),
                };
                self.update(5, update, |of| &mut of.distribution);
            }
            Change::Nodes(update) => self.update_nodes(6, update),
        }
    }

    /// A status that was written, by us most often, is no reason to make resources anew.
    fn update_policies<T: Reported>(
        &mut self,
        kind: usize,
        mut update: Update<T>,
        table: fn(&mut NamespaceObjects) -> &mut BTreeMap<String, T>,
    ) {
        match &mut update {
            Update::One(key, Some(kept)) => {
                self.unreported.insert(key.namespace.clone());
                let held = self.namespaces.get_mut(&key.namespace).map(table);
                if let Some(held) = held.and_then(|held| held.get_mut(&key.name))
                    && held.says_like(kept)
                {
                    held.conditions().clone_from(kept.conditions());
                    return;
                }
            }
            Update::One(key, None) => {
                self.unreported.insert(key.namespace.clone());
            }
            Update::Listed(all) => {
                self.unreported.extend(self.namespaces.keys().cloned());
                self.unreported.extend(all.keys().map(|key| key.namespace.clone()));
            }
        }
        self.update(kind, update, table);
    }

    fn update<T: PartialEq>(
        &mut self,
        kind: usize,
        update: Update<T>,
        table: fn(&mut NamespaceObjects) -> &mut BTreeMap<String, T>,
    ) {
        match update {
            Update::One(ObjectKey { namespace, name }, Some(kept)) => {
                let held = table(self.namespaces.entry(namespace.clone()).or_default());
                if held.get(&name) != Some(&kept) {
                    held.insert(name, kept);
                    self.stale.insert(namespace);
                }
            }
            Update::One(ObjectKey { namespace, name }, None) => {
                let held = self.namespaces.get_mut(&namespace).map(table);
                if held.is_some_and(|held| held.remove(&name).is_some()) {
                    self.stale.insert(namespace);
                }
            }
            Update::Listed(all) => {
                self.listed.insert(kind);
                let mut by_namespace: BTreeMap<String, BTreeMap<String, T>> = BTreeMap::new();
                for (ObjectKey { namespace, name }, kept) in all {
                    by_namespace.entry(namespace).or_default().insert(name, kept);
                }
                let names: BTreeSet<String> =
                    by_namespace.keys().chain(self.namespaces.keys()).cloned().collect();
                for namespace in names {
                    let now = by_namespace.remove(&namespace).unwrap_or_default();
                    let held = table(self.namespaces.entry(namespace.clone()).or_default());
                    if *held != now {
                        *held = now;
                        self.stale.insert(namespace);
                    }
                }
            }
        }
    }

    fn update_nodes(&mut self, kind: usize, update: Update<NodeLocality>) {
        let mut moved = BTreeSet::new();
        let mut set = |nodes: &mut HashMap<String, NodeLocality>, name: String, now: Option<NodeLocality>| {
            if nodes.get(&name) != now.as_ref() {
                match now {
                    Some(now) => nodes.insert(name.clone(), now),
                    None => nodes.remove(&name),
                };
                moved.insert(name);
            }
        };
        match update {
            Update::One(key, now) => set(&mut self.nodes, key.name, now),
            Update::Listed(all) => {
                self.listed.insert(kind);
                let mut all: HashMap<String, NodeLocality> =
                    all.into_iter().map(|(key, locality)| (key.name, locality)).collect();
                let names: BTreeSet<String> = all.keys().chain(self.nodes.keys()).cloned().collect();
                for name in names {
                    let now = all.remove(&name);
                    set(&mut self.nodes, name, now);
                }
            }
        }
        if moved.is_empty() {
            return;
        }
        for (name, objects) in &self.namespaces {
            if objects.pods.values().any(|pod| moved.contains(&pod.node)) {
                self.stale.insert(name.clone());
            }
        }
    }

    fn has_peer_authentication(&self) -> bool {
        self.namespaces.values().any(|objects| !objects.peer_authentications.is_empty())
    }

    /// The next snapshot; `None` if it would be like the last. `changed`: when the first of the
    /// changes was received.
    pub(super) fn snapshot(&mut self, changed: Instant) -> Option<Snapshot> {
        let mut stale = std::mem::take(&mut self.stale);
        if stale.contains(&self.settings.root_namespace) {
            // Workloads everywhere may name its policies.
            stale.extend(self.namespaces.keys().cloned());
        }
        let nothing = NamespaceObjects::default();
        let around = Surroundings {
            settings: &self.settings,
            root: self.namespaces.get(&self.settings.root_namespace).unwrap_or(&nothing),
            nodes: &self.nodes,
            peer_authentication: self.has_peer_authentication(),
        };
        let mut differs = self.number == 0;
        for name in &stale {
            let objects = self.namespaces.get(name).unwrap_or(&nothing);
            let converted = convert::namespace(&around, name, objects);
            let told = self.unenforceable.remove(name).unwrap_or_default();
            for (object, reason) in converted.unenforceable.iter().filter(|one| !told.contains(one)) {
                warn!(object, reason, "this policy is enforced, and is stricter than it is written");
            }
            if !converted.unenforceable.is_empty() {
                self.unenforceable.insert(name.clone(), converted.unenforceable);
            }
            let mut resources = converted.resources;
            let before = self.resources.get(name);
            let same = before.is_some_and(|before| resources.share(before));
            if resources.addresses.is_empty() && resources.policies.is_empty() {
                differs |= self.resources.remove(name).is_some();
            } else if !same {
                differs = true;
                self.resources.insert(name.clone(), Arc::new(resources));
            }
        }
        self.namespaces.retain(|_, objects| !objects.is_empty());
        if !differs {
            return None;
        }
        self.number += 1;
        Some(Snapshot::new(self.number, changed, self.resources.clone()))
    }
}

#[cfg(test)]
mod tests;
