//! What is held of the control plane's resources, and what a response changes of it.

use std::sync::Arc;

use tracing::{debug, warn};
use ztunnel_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource};

use super::{ADDRESS, AUTHORIZATION, ResourceDecoder, delta::Subscription, demand::Demand};
use crate::mesh::{Store, local_file::ResourceDefaults};

/// All subscriptions, and where their resources go.
#[derive(Debug)]
pub(super) struct DiscoveryState {
    decoder: ResourceDecoder,
    pub(super) subscriptions: [Subscription; 2],
    pub(super) store: Arc<Store>,
    demand: Option<Demand>,
}

impl DiscoveryState {
    /// Nothing is held yet.
    pub(super) fn new(defaults: ResourceDefaults, store: Arc<Store>, demand: Option<Demand>) -> Self {
        let subscriptions = [ADDRESS, AUTHORIZATION].map(Subscription::new);
        Self { decoder: ResourceDecoder::new(defaults), subscriptions, store, demand }
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
        if !outcome.changes.is_empty() {
            self.store.apply(outcome.changes);
        }
        if let (Some(demand), Some(ResponseNames { there, gone })) = (&self.demand, &answers) {
            demand.record_answers(there.iter().map(String::as_str), gone.iter().map(String::as_str));
        }
        Some(outcome.reply)
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
