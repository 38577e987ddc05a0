//! What nobody has told of yet, asked of the control plane when a connection needs it (`xds.on_demand`).
//!
//! Names that were asked for stay asked for: the control plane tells of their changes, and of their end. A name that
//! leads nowhere is kept too, or every connection to the outer world would wait for the answer again; but applications
//! choose what they dial, so only so many of those are kept, the oldest go first.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

/// How long a connection waits for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Names that lead nowhere.
const ABSENT: usize = 65_536;

/// The connections' end, and the stream's: what is asked for, and what is answered.
#[derive(Clone, Debug, Default)]
pub struct Demand(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    asked: Mutex<Asked>,
    /// There is something to send.
    added: Notify,
    /// Counts responses.
    answers: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Asked {
    names: HashMap<Arc<str>, State>,
    /// By the time at which they were found to be absent.
    absent: BTreeMap<u64, Arc<str>>,
    count: u64,
    unsent: Names,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Known,
    Absent(u64),
}

/// What the control plane is to be asked for from now on, and what no more.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Names {
    pub subscribe: Vec<Arc<str>>,
    pub unsubscribe: Vec<Arc<str>>,
}

/// The control plane did not say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the control plane did not say within {} s who or what {name} is", PATIENCE.as_secs())]
pub struct Unanswered {
    name: String,
}

impl Demand {
    /// Waits until the control plane has told of `name`, or that there is nothing of that name. `false`: it had done so
    /// before.
    pub async fn answer(&self, name: &str) -> Result<bool, Unanswered> {
        let mut answers = self.0.answers.subscribe();
        if self.ask(name) {
            return Ok(false);
        }
        let answered = async {
            while !self.is_answered(name) {
                if answers.changed().await.is_err() {
                    return;
                }
            }
        };
        timeout(PATIENCE, answered).await.map_err(|_| Unanswered { name: name.to_owned() }).map(|()| true)
    }

    /// Has the control plane asked, unless it was before. Whether it has answered.
    pub fn ask(&self, name: &str) -> bool {
        let mut asked = self.asked();
        if let Some(state) = asked.names.get(name) {
            return *state != State::Waiting;
        }
        let name: Arc<str> = name.into();
        asked.names.insert(Arc::clone(&name), State::Waiting);
        asked.unsent.subscribe.push(name);
        self.0.added.notify_one();
        false
    }

    fn is_answered(&self, name: &str) -> bool {
        self.asked().names.get(name).is_none_or(|state| *state != State::Waiting)
    }

    /// All that is asked for, for a stream's first request. What was not sent yet is among it.
    pub(super) fn all(&self) -> Vec<Arc<str>> {
        let mut asked = self.asked();
        asked.unsent = Names::default();
        asked.names.keys().cloned().collect()
    }

    /// What is to be sent, once there is something.
    pub(super) async fn unsent(&self) -> Names {
        loop {
            let unsent = std::mem::take(&mut self.asked().unsent);
            if unsent != Names::default() {
                return unsent;
            }
            self.0.added.notified().await;
        }
    }

    /// The control plane has told of `there`, and that `gone` are not there. To be called when the mesh shows it.
    pub(super) fn answered<'a>(
        &self,
        there: impl IntoIterator<Item = &'a str>,
        gone: impl IntoIterator<Item = &'a str>,
    ) {
        let mut asked = self.asked();
        for name in there {
            asked.set(name, State::Known);
        }
        for name in gone {
            asked.count += 1;
            let state = State::Absent(asked.count);
            asked.set(name, state);
        }
        while asked.absent.len() > ABSENT {
            let Some((_, oldest)) = asked.absent.pop_first() else { break };
            asked.names.remove(&oldest);
            asked.unsent.unsubscribe.push(oldest);
            self.0.added.notify_one();
        }
        drop(asked);
        self.0.answers.send_modify(|count| *count += 1);
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.0.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Asked {
    /// What was told without having been asked for stays that.
    fn set(&mut self, name: &str, state: State) {
        let Some((name, _)) = self.names.get_key_value(name) else { return };
        let name = Arc::clone(name);
        if let Some(State::Absent(when)) = self.names.insert(Arc::clone(&name), state) {
            self.absent.remove(&when);
        }
        if let State::Absent(when) = state {
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
    async fn a_name_is_asked_for_once_and_all_who_want_it_get_the_answer() {
        let demand = Demand::default();
        let ask = || {
            let demand = demand.clone();
            tokio::spawn(async move { demand.answer("/10.0.0.1").await })
        };
        let (first, second) = (ask(), ask());
        let sent = demand.unsent().await;
        assert_eq!((texts(&sent.subscribe), sent.unsubscribe.len()), (vec!["/10.0.0.1"], 0));
        demand.answered(["other"], []);
        assert!(!first.is_finished() && !second.is_finished());
        demand.answered(["/10.0.0.1"], []);
        assert_eq!((first.await.unwrap(), second.await.unwrap()), (Ok(true), Ok(true)));
        assert_eq!(demand.answer("/10.0.0.1").await, Ok(false));
        // The next stream asks for it again, by itself.
        assert_eq!(texts(&demand.all()), ["/10.0.0.1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_leads_nowhere_is_an_answer_and_who_gave_up_leaves_the_question() {
        let demand = Demand::default();
        let error = demand.answer("/10.0.0.1").await.unwrap_err();
        assert!(error.to_string().contains("within 5 s who or what /10.0.0.1 is"), "{error}");
        assert_eq!(texts(&demand.all()), ["/10.0.0.1"]);
        demand.answered([], ["/10.0.0.1"]);
        assert_eq!(demand.answer("/10.0.0.1").await, Ok(false));
        // It comes to be, and is no longer among those that may be forgotten.
        demand.answered(["/10.0.0.1"], []);
        assert!(demand.asked().absent.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn of_what_leads_nowhere_the_oldest_are_forgotten() {
        let demand = Demand::default();
        let names: Vec<String> = (0..ABSENT + 2).map(|number| number.to_string()).collect();
        for name in &names {
            demand.ask(name);
        }
        assert_eq!(demand.unsent().await.subscribe.len(), ABSENT + 2);
        demand.answered([names[0].as_str()], names[1..].iter().map(String::as_str));
        assert_eq!(texts(&demand.unsent().await.unsubscribe), ["1"]);
        assert_eq!(demand.all().len(), ABSENT + 1);
    }
}
