//! On-demand discovery (`xds.on_demand`): subscribes to a name when a connection first needs it.
//!
//! A subscription stays: the control plane sends updates and the removal of the resource. Names
//! that do not exist stay subscribed too; otherwise every connection to an address outside the mesh
//! would wait for the answer again. Applications choose what they dial, so the number of absent
//! names is bounded: the oldest are unsubscribed first. So is the number of names of one pod that
//! have no answer yet: while the control plane is away, nothing else takes them out.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

/// How long a connection waits for the control plane to answer.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Absent names that stay subscribed.
const MAX_ABSENT: usize = 65_536;
/// Names without an answer that one pod may have. Beyond them its connections to further names are
/// refused.
const MAX_PENDING: usize = 1024;
/// The same of all pods together.
const MAX_PENDING_OF_ALL: usize = 65_536;

/// The subscribed names, shared by the connections that add to them and the stream that sends them.
#[derive(Clone, Debug, Default)]
pub struct Demand(Arc<DemandState>);

#[derive(Debug, Default)]
struct DemandState {
    names: Mutex<SubscribedNames>,
    /// Notified when `unsent` is no longer empty.
    added: Notify,
    /// Number of responses received; waiters watch it.
    answers: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct SubscribedNames {
    names: HashMap<Arc<str>, Resolution>,
    /// Absent names in the order in which the control plane reported them, by `count`.
    absent: BTreeMap<u64, Arc<str>>,
    count: u64,
    /// How many names of each pod have no answer yet.
    pending: HashMap<Arc<str>, usize>,
    unsent: SubscriptionChange,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Resolution {
    /// Asked for by this pod; `None`: by the tunnel itself.
    Pending(Option<Arc<str>>),
    Found,
    Absent(u64),
}

/// Names to subscribe to and to unsubscribe from, for the next request of the stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SubscriptionChange {
    pub(crate) subscribe: Vec<Arc<str>>,
    pub(crate) unsubscribe: Vec<Arc<str>>,
}

/// Why a name is not resolved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnresolvedName {
    /// The control plane did not answer within the time limit.
    #[error("control plane did not resolve {name} within {} s", RESOLVE_TIMEOUT.as_secs())]
    Unanswered {
        /// The name.
        name: String,
    },
    /// The pod has too many names without an answer already.
    #[error("control plane is not asked for {name}: {MAX_PENDING} names of the pod have no answer yet")]
    TooMany {
        /// The name.
        name: String,
    },
}

impl Demand {
    /// Subscribes to `name` for the pod `uid`, and waits until the control plane has sent it or
    /// reported it absent. `false`: it had answered before this call.
    ///
    /// # Errors
    /// No answer within 5 s, and the subscription stays; or too many names of the pod have none.
    pub async fn resolve(&self, name: &str, uid: &str) -> Result<bool, UnresolvedName> {
        let mut answers = self.0.answers.subscribe();
        if self.subscribe_for(name, uid)? {
            return Ok(false);
        }
        let answered = async {
            while !self.is_resolved(name) {
                if answers.changed().await.is_err() {
                    return;
                }
            }
        };
        timeout(RESOLVE_TIMEOUT, answered)
            .await
            .map_err(|_| UnresolvedName::Unanswered { name: name.to_owned() })
            .map(|()| true)
    }

    /// Subscribes to `name` for the tunnel itself, unless it is subscribed already. Whether the
    /// control plane has answered for it.
    #[expect(clippy::must_use_candidate, reason = "who waits for a name by itself asks for no answer")]
    pub fn subscribe(&self, name: &str) -> bool {
        let mut subscribed = self.names();
        if let Some(state) = subscribed.names.get(name) {
            return !matches!(state, Resolution::Pending(_));
        }
        subscribed.add(name, None);
        self.0.added.notify_one();
        false
    }

    /// The same for the pod `uid`.
    ///
    /// # Errors
    /// [`UnresolvedName::TooMany`]
    pub fn subscribe_for(&self, name: &str, uid: &str) -> Result<bool, UnresolvedName> {
        let mut subscribed = self.names();
        if let Some(state) = subscribed.names.get(name) {
            return Ok(!matches!(state, Resolution::Pending(_)));
        }
        let known = subscribed.pending.get_key_value(uid).map(|(uid, count)| (Arc::clone(uid), *count));
        let (uid, count) = known.unwrap_or_else(|| (uid.into(), 0));
        // Pods that are gone by now count in the sum.
        if count >= MAX_PENDING || subscribed.pending.values().sum::<usize>() >= MAX_PENDING_OF_ALL {
            return Err(UnresolvedName::TooMany { name: name.to_owned() });
        }
        subscribed.pending.insert(Arc::clone(&uid), count + 1);
        subscribed.add(name, Some(uid));
        self.0.added.notify_one();
        Ok(false)
    }

    fn is_resolved(&self, name: &str) -> bool {
        self.names().names.get(name).is_none_or(|state| !matches!(state, Resolution::Pending(_)))
    }

    /// All subscribed names, for the first request of a stream. Clears what was not sent yet, since
    /// it is among them.
    pub(super) fn all(&self) -> Vec<Arc<str>> {
        let mut subscribed = self.names();
        subscribed.unsent = SubscriptionChange::default();
        subscribed.names.keys().cloned().collect()
    }

    /// The next change to send. Waits until there is one.
    pub(super) async fn unsent(&self) -> SubscriptionChange {
        loop {
            let unsent = std::mem::take(&mut self.names().unsent);
            if unsent != SubscriptionChange::default() {
                return unsent;
            }
            self.0.added.notified().await;
        }
    }

    /// Records that the control plane sent `there` and reported `gone` as absent. Call it after the
    /// mesh was updated.
    /// Returns the names that are answered by this: whether each is there, `None` where it is
    /// subscribed to no longer.
    pub(super) fn record_answers<'a>(
        &self,
        there: impl IntoIterator<Item = &'a str>,
        gone: impl IntoIterator<Item = &'a str>,
    ) -> Vec<(Arc<str>, Option<bool>)> {
        let mut subscribed = self.names();
        let mut answered = Vec::new();
        for name in there {
            answered.extend(subscribed.set(name, Resolution::Found).map(|name| (name, Some(true))));
        }
        for name in gone {
            subscribed.count += 1;
            let state = Resolution::Absent(subscribed.count);
            answered.extend(subscribed.set(name, state).map(|name| (name, Some(false))));
        }
        while subscribed.absent.len() > MAX_ABSENT {
            let Some((_, oldest)) = subscribed.absent.pop_first() else { break };
            subscribed.names.remove(&oldest);
            answered.push((Arc::clone(&oldest), None));
            subscribed.unsent.unsubscribe.push(oldest);
            self.0.added.notify_one();
        }
        drop(subscribed);
        self.0.answers.send_modify(|count| *count += 1);
        answered
    }

    /// Subscribes to the names that a predecessor had subscribed to, with the answers that it had.
    pub(super) fn restore<'a>(&self, names: impl IntoIterator<Item = (&'a str, bool)>) {
        let mut subscribed = self.names();
        let (mut there, mut gone) = (Vec::new(), Vec::new());
        for (name, is_there) in names {
            if !subscribed.names.contains_key(name) {
                subscribed.add(name, None);
            }
            (if is_there { &mut there } else { &mut gone }).push(name);
        }
        drop(subscribed);
        self.0.added.notify_one();
        self.record_answers(there, gone);
    }

    /// No name has an answer any more, and all are still subscribed to.
    pub(super) fn forget_answers(&self) {
        let mut subscribed = self.names();
        subscribed.absent.clear();
        for state in subscribed.names.values_mut().filter(|state| !matches!(state, Resolution::Pending(_))) {
            *state = Resolution::Pending(None);
        }
    }

    fn names(&self) -> MutexGuard<'_, SubscribedNames> {
        self.0.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SubscribedNames {
    fn add(&mut self, name: &str, uid: Option<Arc<str>>) {
        let name: Arc<str> = name.into();
        self.names.insert(Arc::clone(&name), Resolution::Pending(uid));
        self.unsent.subscribe.push(name);
    }

    /// The name. Ignores those that nobody subscribed to.
    fn set(&mut self, name: &str, state: Resolution) -> Option<Arc<str>> {
        let (name, _) = self.names.get_key_value(name)?;
        let (name, answered) = (Arc::clone(name), Arc::clone(name));
        if let Resolution::Absent(when) = state {
            self.absent.insert(when, Arc::clone(&name));
        }
        match self.names.insert(name, state) {
            Some(Resolution::Absent(when)) => drop(self.absent.remove(&when)),
            Some(Resolution::Pending(Some(uid))) => {
                if let Entry::Occupied(mut pending) = self.pending.entry(uid) {
                    *pending.get_mut() -= 1;
                    if *pending.get() == 0 {
                        pending.remove();
                    }
                }
            }
            _ => {}
        }
        Some(answered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(names: &[Arc<str>]) -> Vec<&str> {
        names.iter().map(|name| &**name).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_subscribed_once_and_all_waiters_get_the_answer() {
        let demand = Demand::default();
        let resolve = || {
            let demand = demand.clone();
            tokio::spawn(async move { demand.resolve("/10.0.0.1", "pod").await })
        };
        let (first, second) = (resolve(), resolve());
        let sent = demand.unsent().await;
        assert_eq!((texts(&sent.subscribe), sent.unsubscribe.len()), (vec!["/10.0.0.1"], 0));
        demand.record_answers(["other"], []);
        assert!(!first.is_finished() && !second.is_finished());
        demand.record_answers(["/10.0.0.1"], []);
        assert_eq!((first.await.unwrap(), second.await.unwrap()), (Ok(true), Ok(true)));
        assert_eq!(demand.resolve("/10.0.0.1", "pod").await, Ok(false));
        // The next stream subscribes to it again by itself.
        assert_eq!(texts(&demand.all()), ["/10.0.0.1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn absent_is_an_answer_and_a_timeout_keeps_the_subscription() {
        let demand = Demand::default();
        let error = demand.resolve("/10.0.0.1", "pod").await.unwrap_err();
        assert_eq!(error.to_string(), "control plane did not resolve /10.0.0.1 within 5 s");
        assert_eq!(texts(&demand.all()), ["/10.0.0.1"]);
        demand.record_answers([], ["/10.0.0.1"]);
        assert_eq!(demand.resolve("/10.0.0.1", "pod").await, Ok(false));
        // Once it exists, it is no longer a candidate for unsubscribing.
        demand.record_answers(["/10.0.0.1"], []);
        assert!(demand.names().absent.is_empty());
    }

    /// A scan of a network, or a peer that makes names up, while the control plane is away.
    #[tokio::test(start_paused = true)]
    async fn a_pod_has_so_many_names_without_an_answer_and_no_more() {
        let demand = Demand::default();
        for number in 0..MAX_PENDING {
            assert_eq!(demand.subscribe_for(&number.to_string(), "scanner"), Ok(false));
        }
        let refused = demand.resolve("one more", "scanner").await;
        assert_eq!(refused, Err(UnresolvedName::TooMany { name: "one more".to_owned() }));
        assert_eq!(demand.names().names.len(), MAX_PENDING);
        // A name that is asked for already costs nothing, and other pods have their own.
        assert_eq!(demand.subscribe_for("7", "scanner"), Ok(false));
        assert_eq!(demand.subscribe_for("one more", "other"), Ok(false));
        demand.record_answers(["7"], ["8", "one more"]);
        assert_eq!(demand.subscribe_for("7", "scanner"), Ok(true));
        for name in ["a", "b"] {
            assert_eq!(demand.subscribe_for(name, "scanner"), Ok(false));
        }
        demand.subscribe_for("c", "scanner").unwrap_err();
        assert!(!demand.names().pending.contains_key("other"));
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_absent_names_are_unsubscribed() {
        let demand = Demand::default();
        let names: Vec<String> = (0..MAX_ABSENT + 2).map(|number| number.to_string()).collect();
        for name in &names {
            demand.subscribe(name);
        }
        assert_eq!(demand.unsent().await.subscribe.len(), MAX_ABSENT + 2);
        demand.record_answers([names[0].as_str()], names[1..].iter().map(String::as_str));
        assert_eq!(texts(&demand.unsent().await.unsubscribe), ["1"]);
        assert_eq!(demand.all().len(), MAX_ABSENT + 1);
    }
}
