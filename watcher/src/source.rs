//! Where pods come from: which pods this node has, and how each is to be treated.
//!
//! * [`mod@file`]: a pods file as a source
//! * [`kubernetes`]: the API server as a source
//! * `wide_lists`: what namespaces and the mesh exclude and include
//! * [`foreign`]: lists that users wrote for sidecars of other meshes
//! * `options`: what can be set for a pod, as key or annotation
//! * `guards`: how processes are named that are left alone
//! * `profiles`: what the sidecars of other meshes are like
//! * [`selection`]: whether a pod is enrolled
//!
//! Every source produces [`Update`]s, and the watcher's loop consumes them without knowing the
//! source. While a source is unavailable it sends nothing, or the cause ([`Update::Unusable`]); the
//! last known pods stay active. The state of each pod goes back to the source as an [`Outcome`], so
//! that it can write the state where its users look.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tracing::warn;

use crate::model::{pod::Update, reason::Reason, state::State};

pub mod file;
pub mod foreign;
pub(crate) mod guards;
pub mod kubernetes;
pub(crate) mod options;
pub(crate) mod profiles;
pub mod selection;
pub(crate) mod wide_lists;

/// The names of a pod travel in one ZDS packet of at most 1024 bytes; this leaves room for the
/// rest.
const MAX_NAMES: usize = 900;

/// A source of pods, as the watcher's loop sees it.
#[derive(Debug)]
pub struct Source {
    /// For logs and `watcher status`, such as `pods file /etc/pods.yaml`.
    pub name: String,
    /// Whether a pod that it does not name any more may run on. So it is with an API, whose objects
    /// can be deleted by force; who removes an entry from a file wants the pod to leave the mesh.
    pub forgets_running_pods: bool,
    /// What changed, in order.
    pub updates: mpsc::Receiver<Update>,
    /// Produces the updates; ends with their receiver.
    pub producer: JoinHandle<()>,
    /// Told once, when the first update is wanted. What was read earlier would be old by then: pods
    /// that have come since would be taken for pods that nobody names.
    pub when_wanted: Option<oneshot::Sender<()>>,
    /// Where outcomes go; `None`: the source writes nothing. Unbounded, since the loop never waits:
    /// the writer receives them at once, and keeps only the last one of each uid while it cannot
    /// write.
    pub outcomes: Option<mpsc::UnboundedSender<(String, Option<Outcome>)>>,
    /// Told once, when every pod that was there at the start is enrolled as far as possible.
    pub when_ready: Option<oneshot::Sender<()>>,
    /// Does what waits for that; ends with it, or when the watcher does.
    pub startup: Option<JoinHandle<()>>,
    /// Writes the outcomes; ends when it has written the last one after `outcomes` is dropped.
    pub writer: Option<JoinHandle<()>>,
}

impl Source {
    /// Why no update comes any more, once the sender of updates is gone.
    pub async fn why_ended(&mut self) -> String {
        match (&mut self.producer).await {
            Ok(()) => "its task has returned".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    /// The watcher works for its node from now on, and no other one does.
    pub fn begin(&mut self) {
        if let Some(when_wanted) = self.when_wanted.take() {
            // A producer that is gone ends the updates.
            let _ = when_wanted.send(());
        }
    }

    /// The watcher is ready.
    pub fn ready(&mut self) {
        if let Some(when_ready) = self.when_ready.take() {
            // Nobody may wait for it.
            let _ = when_ready.send(());
        }
    }

    /// Waits until the last outcomes are written, for a few seconds.
    pub async fn close(mut self) {
        const WRITE_TIMEOUT: Duration = Duration::from_secs(6);
        self.outcomes = None;
        if let Some(startup) = self.startup.take() {
            startup.abort();
        }
        let Some(writer) = self.writer.take() else { return };
        match tokio::time::timeout(WRITE_TIMEOUT, writer).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(source = self.name, %error, "pod status updates dropped"),
            Err(_) => warn!(source = self.name, "pod status updates dropped: no answer in time"),
        }
    }
}

/// The state of a pod, for its source. Published by uid when it changes; `None`: the pod is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The pod's name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// [`State::Open`]: a tunnel carries its traffic. [`State::Plain`]: it is not enrolled, or not
    /// any more.
    pub state: State,
    /// Why it is not open.
    pub reason: Option<Reason>,
    /// Its steered addresses; none while it is not enrolled.
    pub addresses: Vec<IpAddr>,
}

/// The last outcome of each uid; publishes only what changed.
#[derive(Debug, Default)]
pub struct Outcomes {
    published: BTreeMap<String, Outcome>,
}

impl Outcomes {
    /// Publishes `outcome` of `uid`, unless it is the last one again.
    pub fn publish(
        &mut self,
        to: &mpsc::UnboundedSender<(String, Option<Outcome>)>,
        uid: &str,
        outcome: Option<Outcome>,
    ) {
        if self.published.get(uid) == outcome.as_ref() {
            return;
        }
        match &outcome {
            Some(outcome) => drop(self.published.insert(uid.to_owned(), outcome.clone())),
            None => drop(self.published.remove(uid)),
        }
        // Fails only when the source has ended, which ends the watcher too.
        let _ = to.send((uid.to_owned(), outcome));
    }

    /// The uids with a published outcome.
    pub fn uids(&self) -> impl Iterator<Item = &String> {
        self.published.keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_published_once_and_its_end_too() {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let mut outcomes = Outcomes::default();
        let outcome = |state| Outcome {
            name: "n".to_owned(),
            namespace: "d".to_owned(),
            state,
            reason: None,
            addresses: Vec::new(),
        };
        for state in [State::Closed, State::Closed, State::Open] {
            outcomes.publish(&sender, "u", Some(outcome(state)));
        }
        outcomes.publish(&sender, "u", None);
        outcomes.publish(&sender, "u", None);
        let mut states = Vec::new();
        while let Ok((uid, outcome)) = receiver.try_recv() {
            assert_eq!(uid, "u");
            states.push(outcome.map(|outcome| outcome.state));
        }
        assert_eq!(states, [Some(State::Closed), Some(State::Open), None]);
        assert_eq!(outcomes.uids().count(), 0);
    }
}
