//! What is held of the control plane's resources, and what a response changes of it.

use std::{collections::HashMap, sync::Arc};

use tracing::{debug, info, warn};
use ztunnel_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource};

use super::{
    ADDRESS, AUTHORIZATION, ResourceDecoder,
    delta::Subscription,
    demand::Demand,
    last_state::{FoundState, LastState, Piece},
};
use crate::{
    error_chain::error_chain,
    mesh::{MeshChange, Store, local_file::ResourceDefaults},
};

/// All subscriptions, and where their resources go.
#[derive(Debug)]
pub(super) struct DiscoveryState {
    decoder: ResourceDecoder,
    pub(super) subscriptions: [Subscription; 2],
    pub(super) store: Arc<Store>,
    demand: Option<Demand>,
    /// What is told is kept there, and what others have kept is found.
    last_state: Option<Arc<LastState>>,
    /// Something that others have kept is in force.
    is_recalled: bool,
}

impl DiscoveryState {
    /// Nothing is held yet.
    pub(super) fn new(
        defaults: ResourceDefaults,
        store: Arc<Store>,
        demand: Option<Demand>,
        last_state: Option<Arc<LastState>>,
    ) -> Self {
        let mut subscriptions = [ADDRESS, AUTHORIZATION].map(Subscription::new);
        for subscription in &mut subscriptions {
            subscription.is_kept = last_state.is_some();
        }
        let decoder = ResourceDecoder::new(defaults);
        Self { decoder, subscriptions, store, demand, last_state, is_recalled: false }
    }

    pub(super) fn addresses(&self) -> &Subscription {
        let [addresses, _] = &self.subscriptions;
        addresses
    }

    /// The requests that open a stream.
    pub(super) fn first(&self, node: &Node) -> [DeltaDiscoveryRequest; 2] {
        let [addresses, policies] = &self.subscriptions;
        let only = self.demand.as_ref().map(Demand::all);
        [addresses.initial_request(node.clone(), only), policies.initial_request(node.clone(), None)]
    }

    /// Whether every subscription by wildcard has had its first response.
    pub(super) fn is_complete(&self) -> bool {
        let [addresses, policies] = &self.subscriptions;
        policies.received && (self.demand.is_some() || addresses.received)
    }

    /// Before a stream: asks it for everything if the file on disk lacks something.
    pub(super) fn prepare(&mut self) {
        if self.last_state.as_ref().is_some_and(|last| last.begin_anew()) {
            self.subscriptions.iter_mut().for_each(Subscription::begin_anew);
        }
    }

    /// Applies a response and returns the ACK or NACK.
    pub(super) fn apply(&mut self, response: DeltaDiscoveryResponse) -> Option<DeltaDiscoveryRequest> {
        let of_type = |subscription: &&mut Subscription| subscription.type_url() == response.type_url;
        let Some(subscription) = self.subscriptions.iter_mut().find(of_type) else {
            warn!(type_url = response.type_url, "control plane sent a type without a subscription");
            return None;
        };
        let answers = self
            .demand
            .as_ref()
            .filter(|_| response.type_url == ADDRESS)
            .map(|_| ResponseNames::of(&response));
        let is_everything = std::mem::take(&mut subscription.is_stale);
        let outcome = subscription.apply(&self.decoder, response);
        if !outcome.refused.is_empty() {
            warn!(
                type_url = subscription.type_url(),
                resources = outcome.refused.join("; "),
                "resources refused; their previous versions stay in force, and policies without one \
                 allow nobody"
            );
        }
        debug!(
            type_url = subscription.type_url(),
            changes = outcome.changes.len(),
            held = subscription.held(),
            "xDS response applied"
        );
        let type_url = subscription.type_url();
        if is_everything {
            // One snapshot: what is not named is gone, and nothing that is named is missing meanwhile.
            let forget =
                if type_url == ADDRESS { MeshChange::ForgetAddresses } else { MeshChange::ForgetPolicies };
            self.store.apply(std::iter::once(forget).chain(outcome.changes));
        } else if !outcome.changes.is_empty() {
            self.store.apply(outcome.changes);
        }
        let mut answered = Vec::new();
        if let (Some(demand), Some(ResponseNames { there, gone })) = (&self.demand, &answers) {
            if is_everything {
                demand.forget_answers();
            }
            answered =
                demand.record_answers(there.iter().map(String::as_str), gone.iter().map(String::as_str));
        }
        if let Some(last_state) = &self.last_state {
            last_state.told(type_url, outcome.removed, outcome.put, answered);
        }
        self.note_own_word();
        Some(outcome.reply)
    }

    /// The control plane has told everything itself, once it has.
    fn note_own_word(&mut self) {
        if self.is_recalled && self.is_complete() && !self.subscriptions.iter().any(|of| of.is_stale) {
            self.is_recalled = false;
            if let Some(last_state) = &self.last_state {
                last_state.set_in_force(None);
            }
            info!("the control plane has answered: its word has taken the place of the last state");
        }
    }

    /// The control plane is there, and has nothing to tell.
    pub(super) fn still_told(&self) {
        if let Some(last_state) = self.last_state.as_ref().filter(|_| self.is_complete()) {
            last_state.still_told();
        }
    }

    /// Goes on with what the control plane told last, for the kinds of resource that it has not told
    /// since. Whether there is such a state.
    pub(super) fn recall(&mut self) -> bool {
        let Some(FoundState { path, mut state }) = self.last_state.as_ref().and_then(|last| last.find())
        else {
            return false;
        };
        // As if they had been told: what is not understood has a stand-in here too.
        let mut told = self.subscriptions.each_ref().map(|of| Subscription::new(of.type_url()));
        let (mut changes, mut names) = (Vec::new(), HashMap::new());
        let replayed = state.replay(|piece| match piece {
            Piece::Response(response) => {
                let mut of_type = told.iter_mut().zip(&self.subscriptions);
                let found = of_type.find(|(told, of)| told.type_url() == response.type_url && !of.received);
                if let Some((told, _)) = found {
                    changes.extend(told.apply(&self.decoder, response).changes);
                }
            }
            Piece::Name(name, Some(is_there)) => drop(names.insert(name, is_there)),
            Piece::Name(name, None) => drop(names.remove(&name)),
        });
        if let Err(error) = replayed {
            let error = error_chain(&error);
            warn!(path = %path.display(), error, "the last state of the control plane is not used");
            return false;
        }
        for (of, told) in self.subscriptions.iter_mut().zip(&told) {
            of.is_stale |= told.received;
        }
        self.store.apply(changes);
        if let Some(demand) = self.demand.as_ref().filter(|_| !self.addresses().received) {
            demand.restore(names.iter().map(|(name, is_there)| (name.as_str(), *is_there)));
        }
        let [addresses, policies] = &told;
        let age = state.told_at.elapsed().unwrap_or_default();
        warn!(
            path = %path.display(),
            age_secs = age.as_secs(),
            addresses = addresses.held(),
            policies = policies.held() + policies.refused(),
            "the control plane does not answer; going on with what it told last, until it does"
        );
        self.is_recalled = true;
        if let Some(last_state) = &self.last_state {
            last_state.set_in_force(Some(state.told_at));
        }
        true
    }
}

/// The names that a response answers: each resource's own name and its aliases, refused or not.
struct ResponseNames {
    there: Vec<String>,
    gone: Vec<String>,
}

impl ResponseNames {
    fn of(response: &DeltaDiscoveryResponse) -> Self {
        let names = |resource: &Resource| {
            std::iter::once(resource.name.clone()).chain(resource.aliases.iter().cloned()).collect::<Vec<_>>()
        };
        let there = response.resources.iter().flat_map(names).collect();
        Self { there, gone: response.removed_resources.clone() }
    }
}

#[cfg(test)]
mod tests;
