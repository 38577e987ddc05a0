//! What should be: the pods of this node and how each is to be treated.
//!
//! * [`file`]: a pods file as a source
//! * [`kubernetes`]: the API server as a source
//! * [`options`]: what can be set for a pod, as key or annotation
//! * [`selection`]: whether a pod is enrolled
//!
//! Every source is a producer of [`Update`]s, and the node's loop their only consumer: it neither knows nor
//! asks where they come from. A source that cannot say anything for a while says nothing, or why
//! ([`Update::Unusable`]); what it said last holds meanwhile. What became of each pod goes the other way, as
//! [`Outcome`]s, so that a source can write it down where its users look.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use tokio::{sync::mpsc, task::JoinHandle};
use tracing::warn;

use crate::model::{pod::Update, reason::Reason, state::State};

pub mod file;
pub mod kubernetes;
pub mod options;
pub mod selection;

/// The names of a pod travel in one ZDS packet of at most 1024 bytes; this leaves room for the rest.
const MAX_NAMES: usize = 900;

/// Where pods come from, as the node's loop sees it.
#[derive(Debug)]
pub struct Source {
    /// For logs and `watcher status`, such as `pods file /etc/pods.yaml`.
    pub name: String,
    pub updates: mpsc::Receiver<Update>,
    /// Where outcomes go. Unbounded, since the loop never waits: whoever takes them takes them at once, and
    /// keeps only the last one of each uid while it cannot pass them on.
    pub outcomes: Option<mpsc::UnboundedSender<(String, Option<Outcome>)>>,
    /// Ends when the source has passed on the last outcomes, once nobody can send any more.
    pub passed_on: Option<JoinHandle<()>>,
}

impl Source {
    /// Waits until the last outcomes are passed on, as far as that is possible in a moment.
    pub async fn farewell(mut self) {
        const PATIENCE: Duration = Duration::from_secs(6);
        self.outcomes = None;
        if let Some(passed_on) = self.passed_on.take()
            && tokio::time::timeout(PATIENCE, passed_on).await.is_err()
        {
            warn!(source = self.name, "what became of the pods could not be passed on");
        }
    }
}

/// What became of a pod. Told by uid when it changes; `None`: the pod is not known any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub name: String,
    pub namespace: String,
    /// [`State::Open`]: its traffic is carried. [`State::Plain`]: it was left alone, or has left.
    pub state: State,
    /// Why it is not open.
    pub reason: Option<Reason>,
    /// Those that are steered; empty while it is not enrolled.
    pub addresses: Vec<IpAddr>,
}

/// Outcomes by uid, and the telling of what changed.
#[derive(Debug, Default)]
pub struct Outcomes {
    told: BTreeMap<String, Outcome>,
}

impl Outcomes {
    /// Tells `outcome` of `uid`, unless it is what was told last.
    pub fn tell(
        &mut self,
        to: &mpsc::UnboundedSender<(String, Option<Outcome>)>,
        uid: &str,
        outcome: Option<Outcome>,
    ) {
        if self.told.get(uid) == outcome.as_ref() {
            return;
        }
        match &outcome {
            Some(outcome) => drop(self.told.insert(uid.to_owned(), outcome.clone())),
            None => drop(self.told.remove(uid)),
        }
        // A source that does not listen any more is at its end, and so are we, soon.
        let _ = to.send((uid.to_owned(), outcome));
    }

    /// The uids that something was told of.
    pub fn told(&self) -> impl Iterator<Item = &String> {
        self.told.keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_told_once_and_its_end_too() {
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
            outcomes.tell(&sender, "u", Some(outcome(state)));
        }
        outcomes.tell(&sender, "u", None);
        outcomes.tell(&sender, "u", None);
        let mut states = Vec::new();
        while let Ok((uid, outcome)) = receiver.try_recv() {
            assert_eq!(uid, "u");
            states.push(outcome.map(|outcome| outcome.state));
        }
        assert_eq!(states, [Some(State::Closed), Some(State::Open), None]);
        assert_eq!(outcomes.told().count(), 0);
    }
}
