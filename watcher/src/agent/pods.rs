//! The pods that the source told of, and what is known of each.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::warn;

use crate::{
    model::{
        exclusions::Exclusions,
        pod::{BadEntry, Entry, Pod, Update},
        reason::{Reason, ReasonCode},
        state::State,
    },
    observe::{Observed, processes::Sightings},
    plan::{Judged, Keys, Verdict, eligibility::Claims},
};

/// A pod, and everything that is remembered of it.
#[derive(Debug)]
pub struct Known {
    pub judged: Judged,
    /// Place in the source's list.
    rank: u64,
    /// What of the applied plan is this pod's.
    pub keys: Keys,
    pub policy: Option<(u32, Exclusions)>,
    /// Whether its treatment until a tunnel has it was decided: only a pod that ran in clear until now is
    /// treated leniently.
    pub met: bool,
    pub lenient_until: Option<Instant>,
    /// Where its young processes were seen.
    pub sightings: Sightings,
    /// Since when it has no process although it is enrolled.
    pub empty_since: Option<Instant>,
    /// What could not be done for it.
    pub problem: Option<Reason>,
    /// When it was last seen to change.
    changed_at: Instant,
    /// When it is looked at again although nothing told of a change.
    pub next_look: Option<Instant>,
    /// What was told of it last.
    pub state: Option<State>,
    /// Since when it should be open and is not.
    pub asked_at: Option<Instant>,
}

impl Known {
    fn new(pod: Arc<Pod>, rank: u64, now: Instant) -> Self {
        let judged = Judged { pod, observed: Observed::default(), verdict: Verdict::Plain(None) };
        Self {
            judged,
            rank,
            keys: Keys::default(),
            policy: None,
            met: false,
            lenient_until: None,
            sightings: Sightings::default(),
            empty_since: None,
            problem: None,
            changed_at: now,
            next_look: None,
            state: None,
            asked_at: None,
        }
    }

    pub fn is_plain(&self) -> bool {
        matches!(self.judged.verdict, Verdict::Plain(_))
    }

    pub fn is_lenient(&self, now: Instant) -> bool {
        self.lenient_until.is_some_and(|until| until > now)
    }

    /// Decides when to look again: soon after a change, since one seldom comes alone (a process before its
    /// addresses, IPv4 before IPv6, and no kernel tells a watcher outside of a netns of its addresses), then
    /// ever more rarely, until the periodic scan is enough.
    pub fn schedule(&mut self, now: Instant, changed: bool) {
        const SOON: Duration = Duration::from_millis(5);
        const SETTLED: Duration = Duration::from_millis(250);
        const SELDOM: Duration = Duration::from_secs(1);
        const LONG: Duration = Duration::from_secs(15);
        if changed {
            self.changed_at = now;
        }
        let age = now.saturating_duration_since(self.changed_at);
        let pause = match &self.judged.verdict {
            Verdict::Plain(_) => None,
            Verdict::Verified(_) => (age < LONG).then(|| age.max(SETTLED)),
            Verdict::Waiting(_) | Verdict::Refused { .. } => Some((age / 4).clamp(SOON, SELDOM)),
        };
        self.next_look = pause.map(|pause| now + pause);
    }

    /// Looks again at once, and eagerly from then on.
    pub fn hurry(&mut self, now: Instant) {
        self.changed_at = now;
        self.next_look = Some(now);
    }
}

/// An entry that is not used, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub entry: BadEntry,
    pub reason: Reason,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Pods {
    known: BTreeMap<String, Known>,
    pub refused: Vec<Refused>,
    pub claims: Claims,
    /// Whether the source has told of all pods.
    pub synced: bool,
    /// What is applied still of pods that are not known any more.
    pub gone: Keys,
    /// The states of those, for whoever counts.
    pub gone_states: Vec<State>,
    last_rank: u64,
}

impl Pods {
    pub fn get(&self, uid: &str) -> Option<&Known> {
        self.known.get(uid)
    }

    pub fn get_mut(&mut self, uid: &str) -> Option<&mut Known> {
        self.known.get_mut(uid)
    }

    pub fn uids(&self) -> BTreeSet<String> {
        self.known.keys().cloned().collect()
    }

    pub fn all(&self) -> impl Iterator<Item = &Known> {
        self.known.values()
    }

    pub fn all_mut(&mut self) -> impl Iterator<Item = (&String, &mut Known)> {
        self.known.iter_mut()
    }

    /// In the order of the source's list.
    pub fn in_order(&self) -> Vec<&Judged> {
        let mut known: Vec<&Known> = self.known.values().collect();
        known.sort_by_key(|known| known.rank);
        known.into_iter().map(|known| &known.judged).collect()
    }

    /// `uids` in that order.
    pub fn ranked(&self, uids: &BTreeSet<String>) -> Vec<String> {
        let mut ranked: Vec<(u64, &String)> =
            uids.iter().filter_map(|uid| Some((self.known.get(uid)?.rank, uid))).collect();
        ranked.sort_unstable();
        ranked.into_iter().map(|(_, uid)| uid.clone()).collect()
    }

    /// Takes over what the source says; the uids of the pods that are new, other than before, or gone.
    pub fn take(&mut self, update: Update, now: Instant) -> BTreeSet<String> {
        let mut changed = BTreeSet::new();
        match update {
            Update::All(entries) => {
                self.synced = true;
                self.last_rank = 0;
                let before = std::mem::take(&mut self.refused);
                let mut listed = BTreeSet::new();
                for entry in entries {
                    if let Entry::Pod(pod) = &entry
                        && listed.contains(&pod.uid)
                    {
                        self.refuse_duplicate(pod);
                        continue;
                    }
                    self.last_rank += 1;
                    let rank = self.last_rank;
                    listed.extend(self.set(entry, Some(rank), now, &mut changed));
                }
                let gone: Vec<String> =
                    self.known.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
                for uid in gone {
                    self.forget(&uid);
                    changed.insert(uid);
                }
                for Refused { entry, reason } in
                    self.refused.iter().filter(|refused| !before.contains(refused))
                {
                    let BadEntry { index, uid, name, .. } = entry;
                    warn!(index, uid, name, code = reason.code.code(), reason = reason.text, "entry refused");
                }
            }
            Update::Changed(batch) => {
                for (uid, change) in batch {
                    self.refused.retain(|refused| refused.entry.uid.as_ref() != Some(&uid));
                    match change {
                        Some(entry) => drop(self.set(entry, None, now, &mut changed)),
                        None if self.known.contains_key(&uid) => {
                            self.forget(&uid);
                            changed.insert(uid);
                        }
                        None => {}
                    }
                }
            }
            Update::Unusable(_) => {}
        }
        changed
    }

    /// Takes one entry; the uid that it is about. A bad one leaves the last good one of its uid in force.
    fn set(
        &mut self,
        entry: Entry,
        rank: Option<u64>,
        now: Instant,
        changed: &mut BTreeSet<String>,
    ) -> Option<String> {
        let pod = match entry {
            Entry::Pod(pod) => pod,
            Entry::Bad(entry) => {
                let text = match entry.index {
                    Some(index) => format!("entry {index}: {}", entry.problem),
                    None => entry.problem.clone(),
                };
                let uid = entry.uid.clone();
                self.refused.push(Refused { entry, reason: Reason::new(ReasonCode::BadEntry, text) });
                return uid;
            }
        };
        let uid = pod.uid.clone();
        if let Some(known) = self.known.get_mut(&uid) {
            known.rank = rank.unwrap_or(known.rank);
            if known.judged.pod != pod {
                known.judged.pod = pod;
                known.hurry(now);
                changed.insert(uid.clone());
            }
        } else {
            let rank = rank.unwrap_or_else(|| {
                self.last_rank += 1;
                self.last_rank
            });
            self.known.insert(uid.clone(), Known::new(pod, rank, now));
            changed.insert(uid.clone());
        }
        Some(uid)
    }

    fn refuse_duplicate(&mut self, pod: &Pod) {
        let text = format!("uid {} is an earlier pod's", pod.uid);
        let (uid, name) = (Some(pod.uid.clone()), Some(pod.name.clone()));
        let entry = BadEntry { index: None, uid, name, problem: text.clone() };
        self.refused.push(Refused { entry, reason: Reason::new(ReasonCode::DuplicateUid, text) });
    }

    fn forget(&mut self, uid: &str) {
        if let Some(known) = self.known.remove(uid) {
            self.gone.extend(known.keys);
            self.gone_states.extend(known.state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(uid: &str, name: &str) -> Entry {
        Entry::Pod(Arc::new(Pod { uid: uid.to_owned(), name: name.to_owned(), ..Pod::default() }))
    }

    fn names(pods: &Pods) -> Vec<&str> {
        pods.in_order().into_iter().map(|judged| judged.pod.name.as_str()).collect()
    }

    #[test]
    fn updates_change_what_they_name_and_nothing_else() {
        let (mut pods, now) = (Pods::default(), Instant::now());
        let all =
            |list: &[(&str, &str)]| Update::All(list.iter().map(|(uid, name)| entry(uid, name)).collect());
        assert_eq!(pods.take(all(&[("b", "1"), ("a", "2"), ("b", "3")]), now).len(), 2);
        assert_eq!(names(&pods), ["1", "2"]);
        assert_eq!(pods.refused[0].reason.code, ReasonCode::DuplicateUid);
        assert!(pods.take(all(&[("b", "1"), ("a", "2")]), now).is_empty());
        let changes = vec![
            ("c".to_owned(), Some(entry("c", "4"))),
            ("b".to_owned(), None),
            ("nobody".to_owned(), None),
        ];
        assert_eq!(pods.take(Update::Changed(changes), now), ["b".to_owned(), "c".to_owned()].into());
        assert_eq!(names(&pods), ["2", "4"]);
        assert_eq!(pods.take(Update::Unusable("away".to_owned()), now).len(), 0);
        // What became unreadable stays as it was.
        let bad = BadEntry { index: None, uid: Some("a".to_owned()), name: None, problem: "p".to_owned() };
        let left = vec![Entry::Bad(bad)];
        assert_eq!(pods.take(Update::All(left), now), ["c".to_owned()].into());
        assert_eq!((names(&pods), pods.refused.len()), (vec!["2"], 1));
    }

    #[test]
    fn a_pod_is_looked_at_ever_more_rarely() {
        let now = Instant::now();
        let mut known = Known::new(Arc::new(Pod::default()), 1, now);
        known.judged.verdict = Verdict::Waiting(Reason::new(ReasonCode::NoProcess, ""));
        let (mut at, mut looks) = (now, 0);
        known.schedule(now, true);
        while let Some(next) = known.next_look.filter(|next| *next < now + Duration::from_mins(1)) {
            assert!(next > at);
            (at, looks) = (next, looks + 1);
            known.schedule(at, false);
        }
        assert!((60..200).contains(&looks), "{looks} looks in a minute");
        known.judged.verdict = Verdict::Plain(None);
        known.schedule(at, true);
        assert_eq!(known.next_look, None);
    }
}
