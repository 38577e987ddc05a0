//! What should be: the pods of this node and how each is to be treated.
//!
//! * [`pods_file`]: reads the pods from a file
//! * [`file_source`]: the pods file as a source: read again whenever it may have changed
//! * [`kubernetes`]: the API server as a source
//! * [`exclusions`]: ports and ranges of addresses that are left alone
//! * [`selection`]: whether a pod is enrolled
//!
//! Every source is a producer of [`Update`]s, and the node's loop their only consumer: it neither knows nor
//! asks where they come from. A source that cannot say anything for a while says nothing, or why
//! ([`Update::Unusable`]); what it said last holds meanwhile. What became of each pod goes the other way, as
//! [`Outcome`]s, so that a source can write it down where its users look.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::mpsc, task::JoinHandle};
use tracing::warn;

use self::exclusions::Exclusions;
use crate::{reason::Reason, status::State};

pub mod exclusions;
pub mod file_source;
pub mod kubernetes;
pub mod pods_file;
pub mod selection;

/// The names of a pod travel in one ZDS packet of at most 1024 bytes; this leaves room for the rest.
const MAX_NAMES: usize = 900;

/// What happens to an enrolled pod's traffic while no tunnel serves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FailMode {
    /// It is refused.
    #[default]
    Closed,
    /// It passes in clear.
    Open,
}

/// Whether a pod is enrolled, as its source decided by labels and whatever else it knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Selection {
    Enrolled,
    /// Its labels ask for nothing.
    #[default]
    Plain,
    /// Left alone for a reason that users may want to see, such as a sidecar or the host's network.
    LeftAlone(Reason),
}

/// A pod, by whatever source it became known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// The pod's directory in the cgroup2 tree; its containers' are below. `None`: found by the pod's uid,
    /// as kubelets name the directories ([`crate::observed::cgroup_path`]).
    pub cgroup: Option<PathBuf>,
    pub selection: Selection,
    /// `None`: the node's default.
    pub fail_mode: Option<FailMode>,
    /// Whether its DNS queries go to the tunnel, while that answers any. `None`: the node's default.
    pub dns_capture: Option<bool>,
    /// Addresses that the pod's netns must hold; empty: whatever it holds.
    pub addresses: BTreeSet<IpAddr>,
    pub exclusions: Exclusions,
    /// What was wrong with the pod's wishes and is therefore ignored.
    pub notes: Vec<String>,
}

/// What a source says of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Pod(Arc<Pod>),
    Bad(BadEntry),
}

/// An entry that could not be read, with as much of it as is needed to name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadEntry {
    /// Position in the list, from 0, where the source is a list.
    pub index: Option<usize>,
    pub uid: Option<String>,
    pub name: Option<String>,
    /// The key and what is wrong with it.
    pub problem: String,
}

/// What a source tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// Every pod of this node; whoever is not named has gone. The first update of a source is one, and
    /// only from then on the watcher can be ready. Of two entries that claim the same the first holds it.
    All(Vec<Entry>),
    /// What changed, by uid; `None`: gone. One message is one batch: it is acted on as a whole.
    Changed(Vec<(String, Option<Entry>)>),
    /// The source cannot be used at present: why. Nothing else changes.
    Unusable(String),
}

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
