//! What a tunnel has of what it wants by name. It follows the changes from one snapshot to the next,
//! and the names that are new: a tunnel that has met thousands of names costs no more with each.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use crate::snapshot::{Difference, Resource, ResourceType, Snapshot};

/// What a tunnel wants.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub of: ResourceType,
    pub names: &'a BTreeSet<String>,
    /// Whose workloads it wants, too.
    pub node: &'a str,
}

/// What it has.
#[derive(Debug)]
pub(super) struct Named {
    at: Arc<Snapshot>,
    versions: HashMap<String, String>,
    /// Services whose endpoints are wanted.
    services: HashSet<String>,
}

/// Resources by their own names.
type ByName<'a> = BTreeMap<&'a str, &'a Arc<Resource>>;

impl Named {
    /// Everything wanted of `snapshot`.
    pub(super) fn new<'a>(wanted: Wanted<'_>, snapshot: &'a Arc<Snapshot>) -> (Self, ByName<'a>) {
        let (mut all, mut services) = (ByName::new(), HashSet::new());
        for name in wanted.names {
            add(wanted.of, snapshot, name, &mut all, &mut services);
        }
        if wanted.of == ResourceType::Address {
            let own = snapshot.workloads_on(wanted.node).iter();
            all.extend(own.map(|workload| (workload.name(), workload)));
        }
        let versions = all.values().map(|held| (held.name().to_owned(), held.version().to_owned())).collect();
        (Self { at: Arc::clone(snapshot), versions, services }, all)
    }

    /// What changes when `snapshot` follows, and `new` are further names of the wanted ones. `None`:
    /// everything must be found anew, since what is wanted is not what it was.
    pub(super) fn follow(
        &mut self,
        wanted: Wanted<'_>,
        snapshot: &Arc<Snapshot>,
        new: &BTreeSet<String>,
    ) -> Option<Difference> {
        let since = if Arc::ptr_eq(&self.at, snapshot) {
            Arc::default()
        } else {
            snapshot.since(&self.at, wanted.of)
        };
        let Difference { changed, removed } = &*since;
        let is_named = |resource: &Resource| resource.names().any(|name| wanted.names.contains(name));
        // With a service its endpoints come and go.
        let comes = changed.iter().filter(|resource| resource.is_service());
        let moved =
            comes.into_iter().any(|service| is_named(service) != self.services.contains(service.name()));
        if moved || removed.iter().any(|name| self.services.contains(name)) {
            return None;
        }
        let is_wanted = |resource: &Resource| {
            is_named(resource)
                || resource.services().iter().any(|service| self.services.contains(service))
                || (wanted.of == ResourceType::Address
                    && resource.node() == wanted.node
                    && !resource.is_service())
        };
        let mut difference = Difference::default();
        for resource in changed {
            let wanted = is_wanted(resource);
            if wanted && self.versions.get(resource.name()).is_none_or(|held| held != resource.version()) {
                difference.changed.push(Arc::clone(resource));
            } else if !wanted && self.versions.contains_key(resource.name()) {
                difference.removed.push(resource.name().to_owned());
            }
        }
        difference.removed.extend(removed.iter().filter(|name| self.versions.contains_key(*name)).cloned());
        for name in &difference.removed {
            self.versions.remove(name);
        }
        for resource in &difference.changed {
            self.versions.insert(resource.name().to_owned(), resource.version().to_owned());
        }
        let mut more = ByName::new();
        for name in new {
            add(wanted.of, snapshot, name, &mut more, &mut self.services);
        }
        for (name, resource) in more {
            if !self.versions.contains_key(name) {
                self.versions.insert(name.to_owned(), resource.version().to_owned());
                difference.changed.push(Arc::clone(resource));
            }
        }
        self.at = Arc::clone(snapshot);
        Some(difference)
    }

    /// What it has, by name and version.
    pub(super) fn take_versions(&mut self) -> HashMap<String, String> {
        std::mem::take(&mut self.versions)
    }
}

/// What `name` stands for, with the endpoints of a service.
fn add<'a>(
    of: ResourceType,
    snapshot: &'a Snapshot,
    name: &str,
    all: &mut ByName<'a>,
    services: &mut HashSet<String>,
) {
    for resource in resources(of, snapshot, name) {
        all.insert(resource.name(), resource);
        if resource.is_service() {
            services.insert(resource.name().to_owned());
            let endpoints = snapshot.workloads_of(resource.name()).iter();
            all.extend(endpoints.map(|endpoint| (endpoint.name(), endpoint)));
        }
    }
}

/// What `name` stands for.
pub(super) fn resources<'a>(of: ResourceType, snapshot: &'a Snapshot, name: &str) -> Vec<&'a Arc<Resource>> {
    match of {
        ResourceType::Address => snapshot.addresses_named(name).iter().collect(),
        ResourceType::Authorization => snapshot.policy_named(name).into_iter().collect(),
    }
}
