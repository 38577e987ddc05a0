//! Writes the state of the pods where their users look: an annotation on the pod, and Kubernetes
//! Events.
//!
//! * Annotation `ambient.istio.io/redirection: enabled`, as Istio's agent writes it: set when a
//!   tunnel carries the pod's traffic, removed when the pod has left. An outage of the tunnel does
//!   not change it. It is written through `pods/status`, so that the permission does not allow to
//!   change what the pod runs.
//! * Events (`events.k8s.io/v1`) on pods that need somebody's action.
//!
//! Level-triggered: the desired state is compared with what the API shows, and only a difference is
//! written, at a limited rate; a failed write is repeated later. Nothing waits for these writes.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::{
    Client, Config,
    api::{Patch, PatchParams},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use serde_json::json;
use tokio::{sync::mpsc, time::Instant};
use tracing::{debug, warn};

use crate::{
    model::{
        reason::{Reason, ReasonCode},
        state::State,
    },
    source::Outcome,
};

use super::{
    backoff::Backoff,
    cache::PodChange,
    pod::{ApiPod, REDIRECTION, REDIRECTION_ENABLED},
};

/// How long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A reason must last for so long before it becomes an Event.
const EVENT_DELAY: Duration = Duration::from_secs(2);
/// How long the last annotations may take when the watcher detaches.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// The annotation is set when the pod has been open for so long: a label can change every pod of
/// the node, and serving them comes first. It is removed at once.
const ANNOTATION_DELAY: Duration = Duration::from_millis(250);
/// A pod is written again no sooner than this, in case somebody else writes the annotation too.
const WRITE_INTERVAL: Duration = Duration::from_millis(500);
/// At most so many different Events per pod: annotations can change any number of times.
const MAX_EVENTS_PER_POD: usize = 16;
/// The API's limit for the text of an Event.
const MAX_NOTE_BYTES: usize = 1024;

type Outcomes = mpsc::UnboundedReceiver<(String, Option<Outcome>)>;

/// The API server, for writing.
pub(super) struct Api {
    client: Client,
    recorder: Recorder,
}

/// How the watcher names itself as a writer.
pub(super) fn params() -> PatchParams {
    PatchParams { field_manager: Some("adit-watcher".to_owned()), ..PatchParams::default() }
}

/// For connections of its own, so that no watch waits behind a write.
pub(super) fn config(config: &Config) -> Config {
    super::answering_within(REQUEST_TIMEOUT, config)
}

impl Api {
    /// Events name `node` as their reporter.
    pub(super) fn new(client: Client, node: String) -> Self {
        let reporter = Reporter { controller: "adit.dev/watcher".to_owned(), instance: Some(node) };
        Self { recorder: Recorder::new(client.clone(), reporter), client }
    }

    /// Sets or removes the annotation. The uid makes the server refuse if another pod has the name
    /// by now.
    async fn set_annotation(&self, api_pod: &ApiPod, marked: bool) -> Result<(), kube::Error> {
        let value = marked.then_some(REDIRECTION_ENABLED);
        let patch = json!({"metadata": {"uid": api_pod.api_uid, "annotations": {REDIRECTION: value}}});
        let pods = kube::Api::<Pod>::namespaced(self.client.clone(), &api_pod.pod.namespace);
        pods.patch_status(&api_pod.pod.name, &params(), &Patch::Merge(&patch)).await.map(drop)
    }

    async fn publish_event(&self, api_pod: &ApiPod, warning: &PodWarning) -> Result<(), kube::Error> {
        let event = Event {
            type_: EventType::Warning,
            reason: warning.reason.clone(),
            note: Some(warning.note.clone()),
            action: "Enrol".to_owned(),
            secondary: None,
        };
        let pod = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(api_pod.pod.name.clone()),
            namespace: Some(api_pod.pod.namespace.clone()),
            uid: Some(api_pod.api_uid.clone()),
            ..ObjectReference::default()
        };
        self.recorder.publish(&event, &pod).await
    }
}

/// The content of an Event.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PodWarning {
    reason: String,
    note: String,
}

impl PodWarning {
    fn of_reason(reason: &Reason) -> Option<Self> {
        reason.code.needs_action().then(|| Self::new(reason.code, &reason.text))
    }

    fn new(code: ReasonCode, text: &str) -> Self {
        let mut note = format!("{code}: {text}");
        note.truncate(note.floor_char_boundary(MAX_NOTE_BYTES));
        Self { reason: camel_case(code.code()), note }
    }
}

/// `address_not_held` → `AddressNotHeld`, as reasons of Events are written.
fn camel_case(code: &str) -> String {
    let word = |word: &str| {
        let mut letters = word.chars();
        letters.next().map(|first| first.to_ascii_uppercase().to_string() + letters.as_str())
    };
    code.split('_').filter_map(word).collect()
}

/// One pod: what should be written, and what was.
#[derive(Debug)]
struct TrackedPod {
    api_pod: Option<ApiPod>,
    outcome: Option<Outcome>,
    /// Since when it is in that state.
    since: Instant,
    /// The current warning, and since when it holds.
    warning: Option<(PodWarning, Instant)>,
    /// Warnings that became Events already.
    reported: BTreeSet<PodWarning>,
    backoff: Backoff,
    not_before: Option<Instant>,
}

impl Default for TrackedPod {
    fn default() -> Self {
        Self {
            api_pod: None,
            outcome: None,
            since: Instant::now(),
            warning: None,
            reported: BTreeSet::new(),
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_mins(1)),
            not_before: None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Write {
    /// Set or remove the annotation.
    Annotation(bool),
    Event(PodWarning),
}

impl TrackedPod {
    fn is_over(&self) -> bool {
        self.api_pod.is_none() && self.outcome.is_none()
    }

    fn set_outcome(&mut self, outcome: Option<Outcome>, now: Instant) {
        let warning = outcome.as_ref().and_then(|outcome| PodWarning::of_reason(outcome.reason.as_ref()?));
        if self.warning.as_ref().map(|(before, _)| before) != warning.as_ref() {
            self.warning = warning.map(|warning| (warning, now));
        }
        let state = |outcome: &Option<Outcome>| outcome.as_ref().map(|outcome| outcome.state);
        if state(&self.outcome) != state(&outcome) {
            self.since = now;
        }
        self.outcome = outcome;
    }

    /// The next write, and the earliest time for it.
    fn next(&self, now: Instant) -> Option<(Write, Instant)> {
        let api_pod = self.api_pod.as_ref()?;
        let at_least = |at: Instant| self.not_before.map_or(at, |not_before| at.max(not_before));
        let marked = match self.outcome.as_ref().map(|outcome| outcome.state) {
            Some(State::Open) => Some(true),
            Some(State::Plain | State::Refused) => Some(false),
            // Open again soon, or never open yet: the annotation stays.
            Some(State::Closed | State::Bypassed) | None => None,
        };
        if let Some(marked) = marked.filter(|marked| *marked != api_pod.marked) {
            // Peers of a pod that leaves have to hear of it before it stops to serve them.
            let delay = if marked { ANNOTATION_DELAY } else { Duration::ZERO };
            return Some((Write::Annotation(marked), at_least(self.since + delay)));
        }
        if self.reported.len() >= MAX_EVENTS_PER_POD {
            return None;
        }
        let invalid = (!api_pod.pod.notes.is_empty())
            .then(|| PodWarning::new(ReasonCode::BadAnnotation, &api_pod.pod.notes.join("; ")));
        if let Some(warning) = invalid.filter(|warning| !self.reported.contains(warning)) {
            return Some((Write::Event(warning), at_least(now)));
        }
        let (warning, since) =
            self.warning.as_ref().filter(|(warning, _)| !self.reported.contains(warning))?;
        Some((Write::Event(warning.clone()), at_least(*since + EVENT_DELAY)))
    }
}

/// A token bucket: `burst` times at once, and then once every `every`.
#[derive(Debug)]
struct RateLimit {
    every: Duration,
    burst: u32,
    /// When the bucket is full again.
    full_at: Instant,
}

impl RateLimit {
    fn new(every: Duration, burst: u32) -> Self {
        Self { every, burst, full_at: Instant::now() }
    }

    /// When the next token is there.
    fn next(&self) -> Instant {
        self.full_at.checked_sub(self.every * (self.burst - 1)).unwrap_or(self.full_at)
    }

    fn take(&mut self, now: Instant) {
        self.full_at = self.full_at.max(now) + self.every;
    }
}

struct StatusWriter {
    pods: BTreeMap<String, TrackedPod>,
    annotation_limit: RateLimit,
    event_limit: RateLimit,
}

/// Runs until both senders are gone.
pub(super) async fn run(api: Api, mut changes: mpsc::UnboundedReceiver<PodChange>, mut outcomes: Outcomes) {
    let mut writer = StatusWriter {
        pods: BTreeMap::new(),
        annotation_limit: RateLimit::new(Duration::from_millis(50), 200),
        event_limit: RateLimit::new(Duration::from_secs(1), 25),
    };
    loop {
        let due = writer.next();
        let wait = async {
            match &due {
                Some((_, _, at)) => tokio::time::sleep_until(*at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            change = changes.recv() => match change {
                Some(change) => writer.on_change(change),
                None => return,
            },
            outcome = outcomes.recv() => match outcome {
                Some((uid, outcome)) => writer.on_outcome(&uid, outcome),
                None => return writer.flush(&api).await,
            },
            () = wait => {
                if let Some((uid, write, _)) = due {
                    writer.execute(&api, &uid, write).await;
                }
            }
        }
    }
}

impl StatusWriter {
    fn on_change(&mut self, change: PodChange) {
        let tracked = self.pods.entry(change.uid.clone()).or_default();
        if tracked.api_pod.as_ref().map(|api_pod| &api_pod.api_uid)
            != change.api_pod.as_ref().map(|api_pod| &api_pod.api_uid)
        {
            tracked.reported.clear();
        }
        tracked.api_pod = change.api_pod;
        self.remove_if_over(&change.uid);
    }

    fn on_outcome(&mut self, uid: &str, outcome: Option<Outcome>) {
        self.pods.entry(uid.to_owned()).or_default().set_outcome(outcome, Instant::now());
        self.remove_if_over(uid);
    }

    fn remove_if_over(&mut self, uid: &str) {
        if self.pods.get(uid).is_some_and(TrackedPod::is_over) {
            self.pods.remove(uid);
        }
    }

    /// Writes the annotations that are still due, until [`FLUSH_TIMEOUT`].
    async fn flush(&mut self, api: &Api) {
        let end = Instant::now() + FLUSH_TIMEOUT;
        let write = async {
            while let Some((uid, write, at)) = self.next_of(|write| matches!(write, Write::Annotation(_)))
                && at < end
            {
                tokio::time::sleep_until(at).await;
                self.execute(api, &uid, write).await;
            }
        };
        let _ = tokio::time::timeout_at(end, write).await;
    }

    fn next(&self) -> Option<(String, Write, Instant)> {
        self.next_of(|_| true)
    }

    /// The earliest write: uid, what, and when.
    fn next_of(&self, wanted: impl Fn(&Write) -> bool) -> Option<(String, Write, Instant)> {
        let now = Instant::now();
        self.pods
            .iter()
            .filter_map(|(uid, tracked)| {
                let (write, at) = tracked.next(now).filter(|(write, _)| wanted(write))?;
                let limit = match write {
                    Write::Annotation(_) => &self.annotation_limit,
                    Write::Event(_) => &self.event_limit,
                };
                Some((uid, write, at.max(limit.next())))
            })
            .min_by_key(|(_, _, at)| *at)
            .map(|(uid, write, at)| (uid.clone(), write, at))
    }

    async fn execute(&mut self, api: &Api, uid: &str, write: Write) {
        let Some(tracked) = self.pods.get_mut(uid) else { return };
        let Some(api_pod) = &mut tracked.api_pod else { return };
        let now = Instant::now();
        let done = match &write {
            Write::Annotation(marked) => {
                self.annotation_limit.take(now);
                tokio::time::timeout(REQUEST_TIMEOUT, api.set_annotation(api_pod, *marked)).await
            }
            Write::Event(warning) => {
                self.event_limit.take(now);
                tokio::time::timeout(REQUEST_TIMEOUT, api.publish_event(api_pod, warning)).await
            }
        };
        let pod = format!("{}/{}", api_pod.pod.namespace, api_pod.pod.name);
        let (problem, retry) = match done {
            Ok(Ok(())) => (None, false),
            // The pod is gone, or another one has its name: the watch reports it.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {
                (Some(status.message.clone()), false)
            }
            Ok(Err(kube::Error::Api(status))) if status.code == 403 => (Some(status.message.clone()), true),
            Ok(Err(error)) => (Some(super::cause(&error)), true),
            Err(_) => (Some(format!("no answer within {REQUEST_TIMEOUT:?}")), true),
        };
        match (&problem, retry) {
            (Some(problem), true) => warn!(pod, problem, "{}; retrying later", cannot(&write)),
            (Some(problem), false) => debug!(pod, problem, "{}", cannot(&write)),
            (None, _) => debug!(pod, ?write, "written back"),
        }
        if retry {
            tracked.not_before = Some(Instant::now() + tracked.backoff.next());
            return;
        }
        tracked.backoff.reset();
        tracked.not_before = Some(Instant::now() + WRITE_INTERVAL);
        match write {
            // Until the watch reports it.
            Write::Annotation(marked) => api_pod.marked = marked,
            Write::Event(warning) => drop(tracked.reported.insert(warning)),
        }
    }
}

fn cannot(write: &Write) -> &'static str {
    match write {
        Write::Annotation(_) => "cannot write the pod's annotation (verb patch on pods/status)",
        Write::Event(_) => "cannot write an Event (verb create on events of events.k8s.io)",
    }
}

#[cfg(test)]
mod tests;
