//! What a tunnel wants of one kind of resource, and what it has of it. Pure.
//!
//! * `named`: what it has of names that it subscribed to
//!
//! A tunnel subscribes to everything, or to names that it has met: then it is told, too, of the
//! endpoints of its services and of the workloads of its own node.

mod named;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use ztunnel_api::discovery::DeltaDiscoveryRequest;

use self::named::{Named, Wanted};
use crate::snapshot::{Difference, Resource, ResourceType, Snapshot};

const EVERYTHING: &str = "*";
/// Names that one tunnel may subscribe to, and the length of each.
const MOST_NAMES: usize = 200_000;
const LONGEST_NAME: usize = 1024;
/// Bytes of all of them.
const MOST_BYTES: usize = 16 << 20;

/// A subscription that takes more than one may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "at most {MOST_NAMES} names of {LONGEST_NAME} bytes each and {MOST_BYTES} bytes together can be subscribed to"
)]
pub(super) struct TooMuch;

/// What a tunnel wants of one kind, and what it has.
#[derive(Debug)]
pub(super) struct Subscription {
    of: ResourceType,
    /// The caller's node.
    node: String,
    everything: bool,
    names: BTreeSet<String>,
    /// Of the names.
    bytes: usize,
    /// Names that wait for an answer, be it that there is no such resource.
    unanswered: BTreeSet<String>,
    held: Held,
    /// Whether it has had a response. The first is sent in any case.
    answered: bool,
}

#[derive(Debug)]
enum Held {
    /// Exactly this.
    Snapshot(Arc<Snapshot>),
    /// These, by name and version, as it says.
    Versions(HashMap<String, String>),
    /// What is wanted by name.
    Named(Named),
}

impl Subscription {
    /// From the first request of its kind on a stream, which lists what the tunnel has from an
    /// earlier one.
    pub(super) fn first(
        of: ResourceType,
        node: String,
        request: &mut DeltaDiscoveryRequest,
    ) -> Result<Self, TooMuch> {
        let versions = std::mem::take(&mut request.initial_resource_versions);
        let bytes: usize = versions.iter().map(|(name, version)| name.len() + version.len()).sum();
        if versions.len() > MOST_NAMES || bytes > MOST_BYTES {
            return Err(TooMuch);
        }
        // Without a name it means everything.
        let everything = request.resource_names_subscribe.is_empty();
        let held = Held::Versions(versions);
        let (names, unanswered) = (BTreeSet::new(), BTreeSet::new());
        let mut first = Self { of, node, everything, names, bytes: 0, unanswered, held, answered: false };
        first.change(request)?;
        // What it has, it goes on wanting: Istio's tunnel names what it asked for here only.
        if !first.everything
            && let Held::Versions(versions) = &first.held
        {
            for name in versions.keys().cloned().collect::<Vec<_>>() {
                first.add(name)?;
            }
        }
        Ok(first)
    }

    fn add(&mut self, name: String) -> Result<(), TooMuch> {
        let bytes = self.bytes + if self.names.contains(&name) { 0 } else { name.len() };
        if name.len() > LONGEST_NAME || self.names.len() >= MOST_NAMES || bytes > MOST_BYTES {
            return Err(TooMuch);
        }
        self.bytes = bytes;
        self.names.insert(name);
        Ok(())
    }

    /// A later request. Returns whether it wants an answer.
    pub(super) fn change(&mut self, request: &mut DeltaDiscoveryRequest) -> Result<bool, TooMuch> {
        let mut wants = false;
        for name in std::mem::take(&mut request.resource_names_subscribe) {
            if name == EVERYTHING {
                wants |= !std::mem::replace(&mut self.everything, true);
                continue;
            }
            // Whoever asks again has forgotten the answer.
            self.add(name.clone())?;
            self.unanswered.insert(name);
            wants = true;
        }
        for name in std::mem::take(&mut request.resource_names_unsubscribe) {
            if name == EVERYTHING {
                self.stop_everything();
            }
            if self.names.remove(&name) {
                self.bytes -= name.len();
                // What is wanted now is found anew.
                if let Held::Named(named) = &mut self.held {
                    self.held = Held::Versions(named.take_versions());
                }
            }
            self.unanswered.remove(&name);
        }
        Ok(wants)
    }

    /// What is held is from now on known by name.
    fn stop_everything(&mut self) {
        self.everything = false;
        if let Held::Snapshot(snapshot) = &self.held {
            let all = snapshot.all(self.of);
            let versions = all.map(|held| (held.name().to_owned(), held.version().to_owned()));
            self.held = Held::Versions(versions.collect());
        }
    }

    /// What the tunnel must be told for it to have what `snapshot` has. It counts as told. `None`:
    /// nothing.
    pub(super) fn next(&mut self, snapshot: &Arc<Snapshot>) -> Option<Difference> {
        let mut difference = if self.everything {
            let since = |versions| {
                let now = snapshot.all(self.of).map(|resource| (resource.name(), resource)).collect();
                since_versions(&now, versions)
            };
            match std::mem::replace(&mut self.held, Held::Snapshot(Arc::clone(snapshot))) {
                Held::Snapshot(before) => Difference::clone(&snapshot.since(&before, self.of)),
                Held::Versions(versions) => since(versions),
                Held::Named(mut named) => since(named.take_versions()),
            }
        } else {
            self.next_named(snapshot)
        };
        if !self.unanswered.is_empty() {
            self.answer(snapshot, &mut difference);
        }
        let first = !std::mem::replace(&mut self.answered, true);
        let nothing = difference.changed.is_empty() && difference.removed.is_empty();
        (first || !nothing).then_some(difference)
    }

    /// Adds to `difference` what was asked for by name, and was not answered yet.
    fn answer(&mut self, snapshot: &Arc<Snapshot>, difference: &mut Difference) {
        let mut sent: HashSet<String> =
            difference.changed.iter().map(|resource| resource.name().to_owned()).collect();
        let mut gone: HashSet<String> = difference.removed.iter().cloned().collect();
        for name in std::mem::take(&mut self.unanswered) {
            let known = self.named(snapshot, &name);
            if known.is_empty() && gone.insert(name.clone()) {
                difference.removed.push(name);
            }
            for resource in known {
                if sent.insert(resource.name().to_owned()) {
                    difference.changed.push(Arc::clone(resource));
                }
            }
        }
    }

    /// The same of what is wanted by name.
    fn next_named(&mut self, snapshot: &Arc<Snapshot>) -> Difference {
        let wanted = Wanted { of: self.of, names: &self.names, node: &self.node };
        if let Held::Named(named) = &mut self.held
            && let Some(difference) = named.follow(wanted, snapshot, &self.unanswered)
        {
            return difference;
        }
        let (named, all) = Named::new(wanted, snapshot);
        match std::mem::replace(&mut self.held, Held::Named(named)) {
            Held::Versions(versions) => since_versions(&all, versions),
            Held::Named(mut before) => since_versions(&all, before.take_versions()),
            Held::Snapshot(before) => Difference::clone(&snapshot.since(&before, self.of)),
        }
    }

    fn named<'a>(&self, snapshot: &'a Snapshot, name: &str) -> Vec<&'a Arc<Resource>> {
        named::resources(self.of, snapshot, name)
    }
}

fn since_versions(now: &BTreeMap<&str, &Arc<Resource>>, versions: HashMap<String, String>) -> Difference {
    let news = now
        .values()
        .filter(|resource| versions.get(resource.name()).is_none_or(|version| version != resource.version()));
    let changed = news.map(|resource| Arc::clone(resource)).collect();
    let removed = versions.into_keys().filter(|name| !now.contains_key(name.as_str())).collect();
    Difference { changed, removed }
}

#[cfg(test)]
mod tests;
