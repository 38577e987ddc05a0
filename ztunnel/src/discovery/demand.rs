//! On-demand discovery (`xds.on_demand`): subscribes to a name when a connection first needs it.
//!
//! A subscription stays: the control plane sends updates and the removal of the resource. Names
//! that do not exist stay subscribed too; otherwise every connection to an address outside the mesh
//! would wait for the answer again. Applications choose what they dial, so the number of absent
//! names is bounded: the oldest are unsubscribed first.

use std::{
    collections::{BTreeMap, HashMap},
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
    unsent: SubscriptionChange,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resolution {
    Pending,
    Found,
    Absent(u64),
}

/// Names to subscribe to and to unsubscribe from, for the next request of the stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SubscriptionChange {
    pub(crate) subscribe: Vec<Arc<str>>,
    pub(crate) unsubscribe: Vec<Arc<str>>,
}

/// The control plane did not answer within the time limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("control plane did not resolve {name} within {} s", RESOLVE_TIMEOUT.as_secs())]
pub struct UnresolvedName {
    name: String,
}

impl Demand {
    /// Subscribes to `name` and waits until the control plane has sent it or reported it absent.
    /// `false`: it had answered before this call.
    ///
    /// # Errors
    /// [`UnresolvedName`]: no answer within 5 s. The subscription stays.
    pub async fn resolve(&self, name: &str) -> Result<bool, UnresolvedName> {
        let mut answers = self.0.answers.subscribe();
        if self.subscribe(name) {
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
            .map_err(|_| UnresolvedName { name: name.to_owned() })
            .map(|()| true)
    }

    /// Subscribes to `name`, unless it is subscribed already. Whether the control plane has
    /// answered for it.
    #[expect(clippy::must_use_candidate, reason = "who waits for a name by itself asks for no answer")]
    pub fn subscribe(&self, name: &str) -> bool {
        let mut subscribed = self.names();
        if let Some(state) = subscribed.names.get(name) {
            return *state != Resolution::Pending;
        }
        let name: Arc<str> = name.into();
        subscribed.names.insert(Arc::clone(&name), Resolution::Pending);
        subscribed.unsent.subscribe.push(name);
        self.0.added.notify_one();
        false
    }

    fn is_resolved(&self, name: &str) -> bool {
        self.names().names.get(name).is_none_or(|state| *state != Resolution::Pending)
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
    pub(super) fn record_answers<'a>(
        &self,
        there: impl IntoIterator<Item = &'a str>,
        gone: impl IntoIterator<Item = &'a str>,
    ) {
        let mut subscribed = self.names();
        for name in there {
            subscribed.set(name, Resolution::Found);
        }
        for name in gone {
            subscribed.count += 1;
            let state = Resolution::Absent(subscribed.count);
            subscribed.set(name, state);
        }
        while subscribed.absent.len() > MAX_ABSENT {
            let Some((_, oldest)) = subscribed.absent.pop_first() else { break };
            subscribed.names.remove(&oldest);
            subscribed.unsent.unsubscribe.push(oldest);
            self.0.added.notify_one();
        }
        drop(subscribed);
        self.0.answers.send_modify(|count| *count += 1);
    }

    fn names(&self) -> MutexGuard<'_, SubscribedNames> {
        self.0.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SubscribedNames {
    /// Ignores names that nobody subscribed to.
    fn set(&mut self, name: &str, state: Resolution) {
        let Some((name, _)) = self.names.get_key_value(name) else { return };
        let name = Arc::clone(name);
        if let Some(Resolution::Absent(when)) = self.names.insert(Arc::clone(&name), state) {
            self.absent.remove(&when);
        }
        if let Resolution::Absent(when) = state {
            self.absent.insert(when, name);
        }
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
            tokio::spawn(async move { demand.resolve("/10.0.0.1").await })
        };
        let (first, second) = (resolve(), resolve());
        let sent = demand.unsent().await;
        assert_eq!((texts(&sent.subscribe), sent.unsubscribe.len()), (vec!["/10.0.0.1"], 0));
        demand.record_answers(["other"], []);
        assert!(!first.is_finished() && !second.is_finished());
        demand.record_answers(["/10.0.0.1"], []);
        assert_eq!((first.await.unwrap(), second.await.unwrap()), (Ok(true), Ok(true)));
        assert_eq!(demand.resolve("/10.0.0.1").await, Ok(false));
        // The next stream subscribes to it again by itself.
        assert_eq!(texts(&demand.all()), ["/10.0.0.1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn absent_is_an_answer_and_a_timeout_keeps_the_subscription() {
        let demand = Demand::default();
        let error = demand.resolve("/10.0.0.1").await.unwrap_err();
        assert_eq!(error.to_string(), "control plane did not resolve /10.0.0.1 within 5 s");
        assert_eq!(texts(&demand.all()), ["/10.0.0.1"]);
        demand.record_answers([], ["/10.0.0.1"]);
        assert_eq!(demand.resolve("/10.0.0.1").await, Ok(false));
        // Once it exists, it is no longer a candidate for unsubscribing.
        demand.record_answers(["/10.0.0.1"], []);
        assert!(demand.names().absent.is_empty());
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
