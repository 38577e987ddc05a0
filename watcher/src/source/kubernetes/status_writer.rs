//! Writes back what became of the pods, where their users look: an annotation on the pod, and Kubernetes Events.
//!
//! * Annotation `ambient.istio.io/redirection: enabled`, as Istio's agent writes it: set when a tunnel carries the pod's traffic,
//!   removed when the pod has left. A tunnel that is away for a while changes nothing. By way of `pods/status`,
//!   so that the right to write it is no right to change what the pod runs.
//! * Events (`events.k8s.io/v1`) on pods that somebody must do something about.
//!
//! Level-triggered: what should be is compared with what the API shows, and only a difference is written, at a limited
//! rate, and again later if it fails. Nothing else waits for any of this.

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
    cache::Change,
    pod::{REDIRECTION, REDIRECTION_ENABLED, Seen},
};

/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(10);
/// A reason must last for so long before an Event tells of it: what passes by itself is nobody's business.
const LASTS: Duration = Duration::from_secs(2);
/// How long the last annotations may take when the watcher undoes everything.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// What became of a pod is written when it has been so for this long: a label may be about every pod of the node, and first
/// of all these are to be served; what passes by meanwhile is never written.
const SETTLED: Duration = Duration::from_millis(250);
/// An annotation is written again no sooner than this, in case somebody else writes it too.
const PAUSE: Duration = Duration::from_millis(500);
/// So many Events tell of one pod, each of something else: annotations can be changed any number of times.
const EVENTS_A_POD: usize = 16;
/// What the API takes as an Event's text (1 kB) and reason (128 bytes).
const NOTE_BYTES: usize = 1024;

type Outcomes = mpsc::UnboundedReceiver<(String, Option<Outcome>)>;

/// The API server as the reporter writes to it.
pub struct Api {
    client: Client,
    recorder: Recorder,
}

/// Connections of its own, so that nothing that is watched waits behind them.
pub fn config(config: &Config) -> Config {
    super::answering_within(REQUEST, config)
}

impl Api {
    pub fn new(client: Client, node: String) -> Self {
        let reporter = Reporter { controller: "adit.dev/watcher".to_owned(), instance: Some(node) };
        Self { recorder: Recorder::new(client.clone(), reporter), client }
    }

    /// Sets or removes the annotation. The uid makes the server refuse if another pod has the name by now.
    async fn mark(&self, seen: &Seen, marked: bool) -> Result<(), kube::Error> {
        let value = marked.then_some(REDIRECTION_ENABLED);
        let patch = json!({"metadata": {"uid": seen.api_uid, "annotations": {REDIRECTION: value}}});
        let params = PatchParams { field_manager: Some("adit-watcher".to_owned()), ..PatchParams::default() };
        let pods = kube::Api::<Pod>::namespaced(self.client.clone(), &seen.pod.namespace);
        pods.patch_status(&seen.pod.name, &params, &Patch::Merge(&patch)).await.map(drop)
    }

    async fn tell(&self, seen: &Seen, complaint: &Complaint) -> Result<(), kube::Error> {
        let event = Event {
            type_: EventType::Warning,
            reason: complaint.reason.clone(),
            note: Some(complaint.note.clone()),
            action: "Enrol".to_owned(),
            secondary: None,
        };
        let pod = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(seen.pod.name.clone()),
            namespace: Some(seen.pod.namespace.clone()),
            uid: Some(seen.api_uid.clone()),
            ..ObjectReference::default()
        };
        self.recorder.publish(&event, &pod).await
    }
}

/// What an Event says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Complaint {
    reason: String,
    note: String,
}

impl Complaint {
    fn of_reason(reason: &Reason) -> Option<Self> {
        reason.code.needs_action().then(|| Self::new(reason.code, &reason.text))
    }

    fn new(code: ReasonCode, text: &str) -> Self {
        let mut note = format!("{code}: {text}");
        note.truncate(note.floor_char_boundary(NOTE_BYTES));
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

/// One pod, what should be written of it and what was.
#[derive(Debug)]
struct Known {
    seen: Option<Seen>,
    outcome: Option<Outcome>,
    /// Since when it is in that state.
    since: Instant,
    /// What lasts, and since when.
    complaint: Option<(Complaint, Instant)>,
    /// What Events have told already.
    told: BTreeSet<Complaint>,
    backoff: Backoff,
    not_before: Option<Instant>,
}

impl Default for Known {
    fn default() -> Self {
        Self {
            seen: None,
            outcome: None,
            since: Instant::now(),
            complaint: None,
            told: BTreeSet::new(),
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_mins(1)),
            not_before: None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Job {
    Mark(bool),
    Tell(Complaint),
}

impl Known {
    fn is_over(&self) -> bool {
        self.seen.is_none() && self.outcome.is_none()
    }

    fn set_outcome(&mut self, outcome: Option<Outcome>, now: Instant) {
        let complaint = outcome.as_ref().and_then(|outcome| Complaint::of_reason(outcome.reason.as_ref()?));
        if self.complaint.as_ref().map(|(before, _)| before) != complaint.as_ref() {
            self.complaint = complaint.map(|complaint| (complaint, now));
        }
        let state = |outcome: &Option<Outcome>| outcome.as_ref().map(|outcome| outcome.state);
        if state(&self.outcome) != state(&outcome) {
            self.since = now;
        }
        self.outcome = outcome;
    }

    /// What is to be written, and from when on.
    fn next(&self, now: Instant) -> Option<(Job, Instant)> {
        let seen = self.seen.as_ref()?;
        let at_least = |at: Instant| self.not_before.map_or(at, |not_before| at.max(not_before));
        let marked = match self.outcome.as_ref().map(|outcome| outcome.state) {
            Some(State::Open) => Some(true),
            Some(State::Plain | State::Refused) => Some(false),
            // Not now, but soon again: or never yet.
            Some(State::Closed | State::Bypassed) | None => None,
        };
        if let Some(marked) = marked.filter(|marked| *marked != seen.marked) {
            return Some((Job::Mark(marked), at_least(self.since + SETTLED)));
        }
        if self.told.len() >= EVENTS_A_POD {
            return None;
        }
        let nonsense = (!seen.pod.notes.is_empty())
            .then(|| Complaint::new(ReasonCode::BadAnnotation, &seen.pod.notes.join("; ")));
        if let Some(complaint) = nonsense.filter(|complaint| !self.told.contains(complaint)) {
            return Some((Job::Tell(complaint), at_least(now)));
        }
        let (complaint, since) =
            self.complaint.as_ref().filter(|(complaint, _)| !self.told.contains(complaint))?;
        Some((Job::Tell(complaint.clone()), at_least(*since + LASTS)))
    }
}

/// How often something may be done: `burst` times at once, and then once every `every`.
#[derive(Debug)]
struct Limit {
    every: Duration,
    burst: u32,
    /// When all that was taken will be there again.
    full_at: Instant,
}

impl Limit {
    fn new(every: Duration, burst: u32) -> Self {
        Self { every, burst, full_at: Instant::now() }
    }

    /// When it may be done next.
    fn next(&self) -> Instant {
        // The last of the burst must have come back.
        self.full_at.checked_sub(self.every * (self.burst - 1)).unwrap_or(self.full_at)
    }

    fn take(&mut self, now: Instant) {
        self.full_at = self.full_at.max(now) + self.every;
    }
}

struct Reporting {
    pods: BTreeMap<String, Known>,
    marks: Limit,
    events: Limit,
}

/// Runs until nobody tells anything any more.
pub async fn run(api: Api, mut changes: mpsc::UnboundedReceiver<Change>, mut outcomes: Outcomes) {
    let mut reporting = Reporting {
        pods: BTreeMap::new(),
        marks: Limit::new(Duration::from_millis(50), 200),
        events: Limit::new(Duration::from_secs(1), 25),
    };
    loop {
        let due = reporting.next();
        let wait = async {
            match &due {
                Some((_, _, at)) => tokio::time::sleep_until(*at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            change = changes.recv() => match change {
                Some(change) => reporting.on_change(change),
                None => return,
            },
            outcome = outcomes.recv() => match outcome {
                Some((uid, outcome)) => reporting.on_outcome(&uid, outcome),
                None => return reporting.finish(&api).await,
            },
            () = wait => {
                if let Some((uid, job, _)) = due {
                    reporting.work(&api, &uid, job).await;
                }
            }
        }
    }
}

impl Reporting {
    fn on_change(&mut self, change: Change) {
        let known = self.pods.entry(change.uid.clone()).or_default();
        if known.seen.as_ref().map(|seen| &seen.api_uid) != change.seen.as_ref().map(|seen| &seen.api_uid) {
            known.told.clear();
        }
        known.seen = change.seen;
        self.forget(&change.uid);
    }

    fn on_outcome(&mut self, uid: &str, outcome: Option<Outcome>) {
        self.pods.entry(uid.to_owned()).or_default().set_outcome(outcome, Instant::now());
        self.forget(uid);
    }

    fn forget(&mut self, uid: &str) {
        if self.pods.get(uid).is_some_and(Known::is_over) {
            self.pods.remove(uid);
        }
    }

    /// Writes the annotations that are still to be written, and tries each for so long only.
    async fn finish(&mut self, api: &Api) {
        let end = Instant::now() + LAST_WORDS;
        let write = async {
            while let Some((uid, job, at)) = self.next_of(|job| matches!(job, Job::Mark(_)))
                && at < end
            {
                tokio::time::sleep_until(at).await;
                self.work(api, &uid, job).await;
            }
        };
        let _ = tokio::time::timeout_at(end, write).await;
    }

    fn next(&self) -> Option<(String, Job, Instant)> {
        self.next_of(|_| true)
    }

    /// The most urgent job: whose, what, and when.
    fn next_of(&self, wanted: impl Fn(&Job) -> bool) -> Option<(String, Job, Instant)> {
        let now = Instant::now();
        self.pods
            .iter()
            .filter_map(|(uid, known)| {
                let (job, at) = known.next(now).filter(|(job, _)| wanted(job))?;
                let limit = match job {
                    Job::Mark(_) => &self.marks,
                    Job::Tell(_) => &self.events,
                };
                Some((uid, job, at.max(limit.next())))
            })
            .min_by_key(|(_, _, at)| *at)
            .map(|(uid, job, at)| (uid.clone(), job, at))
    }

    async fn work(&mut self, api: &Api, uid: &str, job: Job) {
        let Some(known) = self.pods.get_mut(uid) else { return };
        let Some(seen) = &mut known.seen else { return };
        let now = Instant::now();
        let done = match &job {
            Job::Mark(marked) => {
                self.marks.take(now);
                tokio::time::timeout(REQUEST, api.mark(seen, *marked)).await
            }
            Job::Tell(complaint) => {
                self.events.take(now);
                tokio::time::timeout(REQUEST, api.tell(seen, complaint)).await
            }
        };
        let pod = format!("{}/{}", seen.pod.namespace, seen.pod.name);
        let (problem, retry) = match done {
            Ok(Ok(())) => (None, false),
            // Gone, or another one by now: the watch tells.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {
                (Some(status.message.clone()), false)
            }
            Ok(Err(kube::Error::Api(status))) if status.code == 403 => (Some(status.message.clone()), true),
            Ok(Err(error)) => (Some(super::cause(&error)), true),
            Err(_) => (Some(format!("no answer within {REQUEST:?}")), true),
        };
        match (&problem, retry) {
            (Some(problem), true) => warn!(pod, problem, "{}, tried again later", cannot(&job)),
            (Some(problem), false) => debug!(pod, problem, "{}", cannot(&job)),
            (None, _) => debug!(pod, ?job, "written back"),
        }
        if retry {
            known.not_before = Some(Instant::now() + known.backoff.next());
            return;
        }
        known.backoff.reset();
        known.not_before = Some(Instant::now() + PAUSE);
        match job {
            // Until the watch shows it.
            Job::Mark(marked) => seen.marked = marked,
            Job::Tell(complaint) => drop(known.told.insert(complaint)),
        }
    }
}

fn cannot(job: &Job) -> &'static str {
    match job {
        Job::Mark(_) => "cannot write the pod's annotation (verb patch on pods/status)",
        Job::Tell(_) => "cannot write an Event (verb create on events of events.k8s.io)",
    }
}

#[cfg(test)]
mod tests;
