//! What the watcher reports: outcomes to the source, metrics, and the state of source and events.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::{
    apply::clear_audit::Audited,
    control::status::{EventsStatus, SourceStatus},
    metrics::Metrics,
    model::{pod::Update, reason::Reason, state::State},
    observe::events::SourceKind,
    plan::{Eligibility, PodView},
    source::{Outcome, Outcomes, Source},
};

use super::pod_entry::PodEntry;

/// Reports to the source and to operators.
#[derive(Debug)]
pub(super) struct Reporter {
    metrics: Arc<Metrics>,
    source_name: String,
    source_error: Option<String>,
    /// Since when the source has been usable, or not, in seconds since 1970.
    source_since: u64,
    outcomes: Outcomes,
    /// Where outcomes go; `None`: the source takes none.
    outcomes_to: Option<mpsc::UnboundedSender<(String, Option<Outcome>)>>,
    events: SourceKind,
    received: u64,
    lost: u64,
    corrections: u64,
}

impl Reporter {
    /// For `source`, and for events from `events`.
    pub(super) fn new(source: &Source, events: SourceKind, metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            source_name: source.name.clone(),
            source_error: None,
            source_since: unix_secs(),
            outcomes: Outcomes::default(),
            outcomes_to: source.outcomes.clone(),
            events,
            received: 0,
            lost: 0,
            corrections: 0,
        }
    }

    /// What the pods' source is called.
    pub(super) fn source_name(&self) -> &str {
        &self.source_name
    }

    /// The source sent `update`. `first`: it is the first complete list.
    pub(super) fn source_update(&mut self, update: &Update, first: bool) {
        let failed_before = self.source_error.is_some();
        match update {
            Update::All(entries) => {
                info!(pods = entries.len(), source = self.source_name, "pod list received");
                self.source_error = None;
            }
            // A part of the source may be available where another one is not.
            Update::Changed(_) => {}
            Update::Usable => self.source_error = None,
            Update::Unusable(error) => {
                warn!(source = self.source_name, error, "pod source failed; keeping the last known pods");
                self.source_error = Some(error.clone());
            }
        }
        if first || failed_before != self.source_error.is_some() {
            self.source_since = unix_secs();
        }
    }

    /// An event was received.
    pub(super) fn event(&mut self) {
        self.received += 1;
        self.metrics.event_received(self.events);
    }

    /// So many events were lost.
    pub(super) fn events_lost(&mut self, count: u64) {
        warn!(count, "events were lost; scanning everything");
        self.lost += count;
        self.metrics.lost(count);
    }

    /// A scan found the pod `uid` otherwise than events had said.
    pub(super) fn correction(&mut self, uid: &str, before: &Eligibility, found: &Eligibility) {
        info!(uid, ?found, ?before, "the scan found a change that no event reported");
        self.corrected();
    }

    /// A scan found something otherwise than it should be.
    pub(super) fn corrected(&mut self) {
        self.corrections += 1;
        self.metrics.corrected();
    }

    /// So many connections were cut that a pod made in clear before the first watcher ran.
    pub(super) fn connections_cut(&self, count: usize) {
        self.metrics.connections_cut(count as u64);
    }

    /// So many connections were found that no tunnel carries, and one should; and so many that a guard
    /// may leave alone.
    pub(super) fn connections_in_clear(&self, found: Audited) {
        self.metrics.connections_in_clear(found.in_clear as u64, found.not_audited as u64);
    }

    /// So many pods have applications on each of the tunnel's ports.
    pub(super) fn reserved_port_uses(&self, pods: [usize; 4]) {
        self.metrics.set_reserved_port_uses(pods);
    }

    /// The numbers that metrics show as they are.
    pub(super) fn set_gauges(&self, tunnels: usize, ready: bool) {
        self.metrics.set_tunnels(tunnels);
        self.metrics.set_ready(ready);
    }

    /// The state of a pod, which may have changed.
    pub(super) fn pod_state(&mut self, entry: &mut PodEntry, state: State, reason: Option<Reason>) {
        let addresses = entry.view.eligibility.facts().map(|facts| facts.addresses.clone());
        let outcome = outcome(&entry.view, state, reason, addresses.unwrap_or_default());
        // Of a pod that the source does not name there is nobody to tell.
        self.outcome(&entry.view.pod.uid, (!entry.object_gone).then_some(outcome));
        self.metrics.pod(entry.state.replace(state), Some(state));
        if state == State::Open
            && let Some(since) = entry.waiting_since.take()
        {
            let took = Instant::now().saturating_duration_since(since);
            self.metrics.enrolled_after(took.as_secs_f64());
            debug!(uid = entry.view.pod.uid, took_us = took.as_micros(), "pod open");
        }
    }

    /// The pod `uid` is not known any more.
    pub(super) fn pod_gone(&mut self, uid: &str) {
        self.outcome(uid, None);
    }

    /// Pods are not known any more whose last states were these.
    pub(super) fn states_gone(&mut self, states: Vec<State>) {
        for state in states {
            self.metrics.pod(Some(state), None);
        }
    }

    /// All of `pods` left the mesh.
    pub(super) fn all_left<'a>(&mut self, pods: impl Iterator<Item = &'a PodView>) {
        for view in pods {
            self.outcome(&view.pod.uid, Some(outcome(view, State::Plain, None, Vec::new())));
        }
    }

    fn outcome(&mut self, uid: &str, outcome: Option<Outcome>) {
        if let Some(to) = &self.outcomes_to {
            self.outcomes.publish(to, uid, outcome);
        }
    }

    /// The source's part of `watcher status`.
    pub(super) fn source_status(&self, synced: bool) -> SourceStatus {
        SourceStatus {
            name: self.source_name.clone(),
            synced,
            error: self.source_error.clone(),
            since_unix_secs: self.source_since,
        }
    }

    /// The events' part of `watcher status`.
    pub(super) fn events_status(&self) -> EventsStatus {
        EventsStatus {
            source: Some(self.events),
            received: self.received,
            lost: self.lost,
            corrections: self.corrections,
        }
    }
}

fn outcome(
    view: &PodView,
    state: State,
    reason: Option<Reason>,
    addresses: Vec<std::net::IpAddr>,
) -> Outcome {
    let (name, namespace) = (view.pod.name.clone(), view.pod.namespace.clone());
    Outcome { name, namespace, state, reason, addresses }
}

fn unix_secs() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs())
}
