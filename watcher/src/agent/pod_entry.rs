//! One pod: what is known of it, and when it is observed next.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::warn;

use crate::{
    apply::in_clear::PodSockets,
    model::{
        exclusions::Exclusions,
        pod::{Pod, Selection},
        reason::{Reason, ReasonCode},
        state::State,
    },
    observe::{Observed, budget::Spent, cgroups, processes::Memory, routes::Outward, user_ns::IdMaps},
    plan::{Eligibility, PodPlan, PodView, desired::is_guarded},
};

use super::port_uses::PortUses;

/// A pod that was in plaintext stays so for at most this long while a tunnel is offered it.
const GRACE_PERIOD: Duration = Duration::from_secs(5);
/// An enrolled pod without any process keeps its netns for so long: between two containers there
/// may be a moment without one.
const EMPTY_TIME: Duration = Duration::from_secs(1);
/// A pod that runs by the word of its source, and of which no process was seen for so long, runs
/// where the programs do not reach it.
const UNSEEN_TIME: Duration = Duration::from_secs(5);
/// How soon an eligible pod is observed again when its processes come and go.
const PROCESS_PAUSE: Duration = Duration::from_millis(200);
/// How long a pod whose label is off waits until its source has ceased to announce it. Longer, the
/// source cannot be written to.
const ANNOUNCED_TIME: Duration = Duration::from_secs(30);
/// How soon a pod is observed again after something could not be done for it.
pub(super) const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// A pod whose label is off, and that peers may still take for one of the mesh.
#[derive(Clone, Copy, Debug)]
struct Leaving {
    /// Whether its source announced it by then.
    is_announced: bool,
    /// Until when its HBONE listener is served.
    until: Instant,
}

/// How a pod should have been treated before it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UntilFound {
    /// As it was.
    AsItWas,
    /// It should have been closed since it began, and nobody can say whether it was: it gets no
    /// grace period.
    Closed,
    /// It should have been closed and was not: what it made in clear is cut when it is enrolled.
    NotClosed,
}

/// A pod, and everything that is remembered of it.
#[derive(Debug)]
pub(super) struct PodEntry {
    /// Its specification, what was observed, and whether it can be enrolled.
    pub view: PodView,
    /// Its position in the source's list.
    pub rank: u64,
    /// What was last planned for it.
    pub plan: PodPlan,
    /// The id of its exclusions, and the exclusions that have this id.
    pub exclusions: Option<(u32, Arc<Exclusions>)>,
    /// Whether its treatment until a tunnel serves it was decided: only a pod that ran in plaintext
    /// until then gets a grace period.
    pub admitted: bool,
    /// How it should have been treated before it was found.
    pub until_found: UntilFound,
    /// Until when its traffic passes in plaintext although no tunnel serves it.
    pub grace_until: Option<Instant>,
    /// It was in the mesh, and its label is off.
    leaving: Option<Leaving>,
    /// What its last observation left to the next one.
    pub memory: Memory,
    /// The time that its observations took.
    pub spent: Spent,
    /// Why it could not be observed the last time. What was known before holds.
    pub doubt: Option<Reason>,
    /// Whether a process of it was ever seen.
    was_seen: bool,
    /// Its source does not name it any more, and processes of it may still run.
    pub object_gone: bool,
    /// Since when its source says that it runs, and no process of it was ever seen.
    pub unseen_since: Option<Instant>,
    /// Since when it has no process although it is enrolled.
    pub empty_since: Option<Instant>,
    /// The cookie of the netns that it was enrolled with last. It stays closed while the pod is.
    pub held_netns: Option<u64>,
    /// What could not be done for it.
    pub problem: Option<Reason>,
    /// How it numbers users and groups; `None`: that is not known. Only of one that guards some.
    pub id_maps: Option<IdMaps>,
    /// What its routes send out of interfaces that it excludes; `None`: that is not known. Only of one
    /// that excludes some.
    pub outward: Option<Outward>,
    /// The cookie of the netns that `id_maps` and `outward` are of.
    read_in: Option<u64>,
    /// The mesh whose sidecar was found in it, which carries its traffic.
    pub sidecar: Option<&'static str>,
    /// When one was last looked for.
    pub sidecar_looked_for: Option<Instant>,
    /// Applications of it that use the tunnel's ports.
    pub ports: PortUses,
    /// When it was last seen to change.
    changed_at: Instant,
    /// When it is observed again although no event named it.
    pub next_observation: Option<Instant>,
    /// The state that was reported last.
    pub state: Option<State>,
    /// Since when it should be open and is not.
    pub waiting_since: Option<Instant>,
}

impl PodEntry {
    /// A pod that was not observed yet.
    pub(super) fn new(pod: Arc<Pod>, rank: u64, now: Instant) -> Self {
        let reason = Reason::new(ReasonCode::NotObserved, "it was not observed yet");
        let eligibility = match pod.selection {
            Selection::Enrolled | Selection::ObjectGone => Eligibility::Waiting(reason.clone()),
            Selection::Plain | Selection::LeftAlone(_) => Eligibility::Plain(None),
        };
        let observed = Observed::not_known(None, reason);
        let view = PodView { pod, observed, eligibility, closed_netns: BTreeMap::new() };
        Self {
            view,
            rank,
            plan: PodPlan::default(),
            exclusions: None,
            admitted: false,
            until_found: UntilFound::AsItWas,
            grace_until: None,
            leaving: None,
            memory: Memory::default(),
            spent: Spent::default(),
            doubt: None,
            was_seen: false,
            object_gone: false,
            unseen_since: None,
            empty_since: None,
            held_netns: None,
            problem: None,
            id_maps: None,
            outward: None,
            read_in: None,
            sidecar: None,
            sidecar_looked_for: None,
            ports: PortUses::default(),
            changed_at: now,
            next_observation: None,
            state: None,
            waiting_since: None,
        }
    }

    /// Its exclusions, with the node's numbers of users and groups, and with what its routes send out of
    /// interfaces. Whom the pod numbers in a way that is not known is not guarded, and routes that are
    /// not known exclude nothing.
    pub(super) fn exclusions_here(&self) -> Arc<Exclusions> {
        let exclusions = &self.view.pod.exclusions;
        if !exclusions.guards.has_ids() && exclusions.interfaces.is_empty() {
            return Arc::clone(exclusions);
        }
        let maps = self.id_maps.as_ref();
        let guards = exclusions
            .guards
            .translated(|id| maps.and_then(|maps| maps.user(id)), |id| maps.and_then(|maps| maps.group(id)));
        let mut here = Exclusions { guards, ..Exclusions::clone(exclusions) };
        if let Some(Outward { ranges, devices }) = &self.outward {
            here.exclude_also(ranges, devices);
        }
        Arc::new(here)
    }

    /// Takes in what was read in its netns; `netns`: its cookie, if it was found. What could not be read
    /// is what it was: not known is not gone. Of another netns it says nothing.
    pub(super) fn take_in(&mut self, netns: Option<u64>, outward: Option<Outward>, id_maps: Option<IdMaps>) {
        let exclusions = &self.view.pod.exclusions;
        let is_other = netns.is_some() && netns != self.read_in;
        if is_other || exclusions.interfaces.is_empty() {
            self.outward = None;
        }
        if is_other || !exclusions.guards.has_ids() {
            self.id_maps = None;
        }
        self.read_in = netns.or(self.read_in);
        self.outward = outward.or_else(|| self.outward.take());
        self.id_maps = id_maps.or_else(|| self.id_maps.take());
    }

    /// What its connections are judged by, with its netns `cookie` open.
    pub(super) fn sockets(&self, cookie: u64, netns: Arc<OwnedFd>) -> PodSockets {
        let PodView { pod, observed, .. } = &self.view;
        let guarded = observed.cgroups.iter().filter(|(path, _)| {
            // A container's cgroup, which is right below the pod's, or one below it.
            let below = path.ancestors().take_while(|path| Some(*path) != observed.dir.as_deref());
            below.last().is_some_and(|container| is_guarded(pod, container))
        });
        PodSockets {
            uid: pod.uid.clone(),
            cookie,
            netns,
            exclusions: self.exclusions_here(),
            guarded: guarded.map(|(_, id)| *id).collect(),
            cgroups: observed.cgroups.values().copied().collect(),
            dirs: observed.cgroups.clone(),
        }
    }

    /// Whether the pod is left alone.
    pub(super) fn is_plain(&self) -> bool {
        matches!(self.view.eligibility, Eligibility::Plain(_))
    }

    /// Whether it was observed at least once, so that something follows from what is missing.
    pub(super) fn is_observed(&self) -> bool {
        self.view.observed.unknown().is_none()
    }

    /// Whether it stays in the mesh, or closed, although its source does not name it any more:
    /// until its cgroup is empty. Only a label takes a pod out whose processes run.
    pub(super) fn outlives_object(&self) -> bool {
        !self.is_plain() && !self.view.observed.cgroups.is_empty() && !self.has_ended()
    }

    /// Whether its cgroup is gone or without any process, for sure.
    pub(super) fn has_ended(&self) -> bool {
        match self.view.pod.cgroup.as_ref().or(self.view.observed.dir.as_ref()) {
            Some(dir) => matches!(cgroups::is_populated(dir), Ok(false)),
            None => self.is_observed(),
        }
    }

    /// Whether it runs, by the word of its source, where the programs do not reach it.
    pub(super) fn runs_elsewhere(&self, now: Instant) -> bool {
        self.unseen_since.is_some_and(|since| now.saturating_duration_since(since) >= UNSEEN_TIME)
    }

    /// Notes whether a process of it was seen by now. What was seen once has a cgroup that is
    /// known.
    fn note_unseen(&mut self, now: Instant) {
        let Eligibility::Waiting(reason) = &self.view.eligibility else {
            self.unseen_since = None;
            return;
        };
        let unseen = matches!(reason.code, ReasonCode::NoCgroup | ReasonCode::NoProcess)
            && self.view.pod.is_running
            && !self.was_seen;
        self.unseen_since = unseen.then(|| self.unseen_since.unwrap_or(now));
    }

    /// It could not be observed. Whether what was known of it holds, since anything was.
    pub(super) fn keeps_verdict(&mut self, reason: &Reason, now: Instant) -> bool {
        if self.doubt.as_ref() != Some(reason) {
            let (uid, code) = (&self.view.pod.uid, reason.code.code());
            warn!(uid, code, reason = reason.text, "pod not observed; what is known of it holds");
            self.doubt = Some(reason.clone());
        }
        let keeps = self.is_observed() && !self.is_plain();
        if keeps {
            self.next_observation = Some(self.not_before(now + RETRY_PAUSE, now));
        }
        keeps
    }

    /// `at`, or later if it took more than its share of time.
    fn not_before(&self, at: Instant, now: Instant) -> Instant {
        self.spent.wait_until(now).map_or(at, |until| until.max(at))
    }

    /// Whether its traffic passes in plaintext although no tunnel serves it.
    pub(super) fn in_grace(&self, now: Instant) -> bool {
        self.grace_until.is_some_and(|until| until > now)
    }

    /// Whether its HBONE listener is served on although its label is off: until peers had the time
    /// to hear that its source does not announce it any more. `is_prepared`: its netns has what
    /// the tunnel's connections to the application need.
    pub(super) fn leave(&mut self, is_prepared: bool, grace: Duration, now: Instant) -> bool {
        let is_off = matches!(self.view.pod.selection, Selection::Plain | Selection::LeftAlone(_));
        let is_announced = self.view.pod.is_announced;
        let may_be_dialled = is_announced || self.plan.workload.is_some();
        if !is_off || !is_prepared || !may_be_dialled || grace.is_zero() {
            self.leaving = None;
            return false;
        }
        let until = match self.leaving {
            Some(leaving) if leaving.is_announced == is_announced => leaving.until,
            _ if is_announced => now + ANNOUNCED_TIME.max(grace),
            _ => now + grace,
        };
        self.leaving = Some(Leaving { is_announced, until });
        if until <= now {
            self.leaving = None;
        }
        until > now
    }

    /// Until when its HBONE listener is served although its label is off.
    pub(super) fn leaves_at(&self) -> Option<Instant> {
        self.leaving.map(|leaving| leaving.until)
    }

    /// A tunnel serves it: no later gap between two tunnels lets it out in plaintext.
    pub(super) fn end_grace(&mut self) {
        self.grace_until = None;
    }

    /// Decides, for a pod that is new, how it is treated until a tunnel serves it. `is_closed`: the
    /// programs refuse its traffic already.
    pub(super) fn admit(&mut self, is_closed: bool, has_tunnel: bool, now: Instant) {
        if self.is_plain() {
            (self.admitted, self.grace_until, self.waiting_since) = (false, None, None);
            // A label that comes later fails no connection.
            self.until_found = UntilFound::AsItWas;
            return;
        }
        if std::mem::replace(&mut self.admitted, true) {
            return;
        }
        self.waiting_since = Some(now);
        if self.view.eligibility.facts().is_some() && !is_closed && has_tunnel {
            self.grace_until = Some(now + GRACE_PERIOD);
        }
    }

    /// Decides when to observe the pod again: soon after a change, since one seldom comes alone (a
    /// process before its addresses, IPv4 before IPv6, and no kernel notifies a watcher outside of
    /// a netns of its addresses), then ever more rarely, until the periodic scan is enough.
    pub(super) fn schedule(&mut self, now: Instant, changed: bool) {
        const SOON: Duration = Duration::from_millis(5);
        const SETTLED: Duration = Duration::from_millis(250);
        const SELDOM: Duration = Duration::from_secs(1);
        const LONG: Duration = Duration::from_secs(15);
        if changed {
            self.changed_at = now;
        }
        self.was_seen |= !self.view.observed.netns.is_empty();
        self.note_unseen(now);
        let age = now.saturating_duration_since(self.changed_at);
        let pause = match &self.view.eligibility {
            Eligibility::Plain(_) => None,
            Eligibility::Eligible(_) => (age < LONG).then(|| age.max(SETTLED)),
            Eligibility::Waiting(_) | Eligibility::Refused { .. } => Some((age / 4).clamp(SOON, SELDOM)),
        };
        // Its end need not be reported by an event that is its own.
        let pause = if self.object_gone { Some(pause.unwrap_or(SELDOM)) } else { pause };
        let pause = if self.empty_since.is_some() { Some(EMPTY_TIME / 4) } else { pause };
        self.next_observation = pause.map(|pause| self.not_before(now + pause, now));
    }

    /// Has the pod observed at once, and often from then on.
    pub(super) fn requeue_now(&mut self, now: Instant) {
        self.changed_at = now;
        self.next_observation = Some(now);
    }

    /// A process of the pod began a program. Whether the pod has to be observed at once.
    pub(super) fn process_started(&mut self, now: Instant) -> bool {
        if self.view.eligibility.facts().is_none() {
            return true;
        }
        // An eligible pod has nothing to gain.
        let soon = self.not_before(now + PROCESS_PAUSE, now);
        self.next_observation = Some(self.next_observation.map_or(soon, |next| next.min(soon)));
        false
    }

    /// `observed`, with the netns of the last observation while the pod is without any process for
    /// a moment only.
    pub(super) fn keep_netns_while_empty(&mut self, mut observed: Observed) -> Observed {
        let earlier = &self.view.observed;
        let emptied = observed.netns.is_empty()
            && observed.gap.is_none()
            && !observed.cgroups.is_empty()
            && !earlier.netns.is_empty();
        if !emptied {
            self.empty_since = None;
            return observed;
        }
        let since = *self.empty_since.get_or_insert_with(Instant::now);
        if since.elapsed() < EMPTY_TIME {
            observed.netns.clone_from(&earlier.netns);
        }
        observed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_now_is_what_it_was() {
        let exclusions = Exclusions { interfaces: ["net1".to_owned()].into(), ..Exclusions::default() };
        let pod = Pod { exclusions: Arc::new(exclusions), ..Pod::default() };
        let mut entry = PodEntry::new(Arc::new(pod), 0, Instant::now());
        let routes = Outward { devices: [7].into(), ..Outward::default() };
        for (netns, read, known) in [
            (Some(1), None, None),
            (Some(1), Some(routes.clone()), Some(&routes)),
            (Some(1), None, Some(&routes)),
            (None, None, Some(&routes)),
            (Some(2), None, None),
            (Some(2), Some(Outward::default()), Some(&Outward::default())),
        ] {
            entry.take_in(netns, read, None);
            assert_eq!(entry.outward.as_ref(), known, "{netns:?}");
        }
        entry.view.pod = Arc::new(Pod::default());
        entry.take_in(None, None, None);
        assert_eq!(entry.outward, None);
    }

    #[test]
    fn a_pod_is_observed_ever_more_rarely() {
        let now = Instant::now();
        let mut entry = PodEntry::new(Arc::new(Pod::default()), 1, now);
        entry.view.eligibility = Eligibility::Waiting(Reason::new(ReasonCode::NoProcess, ""));
        let (mut at, mut observations) = (now, 0);
        entry.schedule(now, true);
        while let Some(next) = entry.next_observation.filter(|next| *next < now + Duration::from_mins(1)) {
            assert!(next > at);
            (at, observations) = (next, observations + 1);
            entry.schedule(at, false);
        }
        assert!((60..200).contains(&observations), "{observations} observations in a minute");
        entry.view.eligibility = Eligibility::Plain(None);
        entry.schedule(at, true);
        assert_eq!(entry.next_observation, None);
    }

    #[test]
    fn a_pod_that_runs_unseen_for_some_seconds_runs_elsewhere() {
        let (began, pod) = (Instant::now(), Pod { is_running: true, ..Pod::default() });
        let mut entry = PodEntry::new(Arc::new(pod), 1, began);
        let waiting = |code| Eligibility::Waiting(Reason::new(code, ""));
        entry.view.eligibility = waiting(ReasonCode::NoCgroup);
        entry.schedule(began, true);
        entry.view.eligibility = waiting(ReasonCode::NoProcess);
        entry.schedule(began + UNSEEN_TIME / 2, true);
        assert!(!entry.runs_elsewhere(began + UNSEEN_TIME / 2) && entry.runs_elsewhere(began + UNSEEN_TIME));
        // Once it was seen it is known where it is.
        entry.view.observed.netns = vec![crate::observe::ObservedNetns::Host];
        entry.schedule(began + UNSEEN_TIME, true);
        assert!(!entry.runs_elsewhere(began + UNSEEN_TIME * 2));
    }

    #[test]
    fn an_error_keeps_the_verdict_of_a_pod_that_was_observed_and_is_in_the_mesh() {
        let (now, pod) = (Instant::now(), Pod { selection: Selection::Enrolled, ..Pod::default() });
        let mut entry = PodEntry::new(Arc::new(pod), 1, now);
        assert!(matches!(entry.view.eligibility, Eligibility::Waiting(_)) && !entry.is_observed());
        let error = Reason::new(ReasonCode::NotObserved, "too many open files");
        assert!(!entry.keeps_verdict(&error, now), "nothing is known of it");
        entry.view.observed = Observed::default();
        assert!(entry.keeps_verdict(&error, now));
        assert_eq!((entry.next_observation, &entry.doubt), (Some(now + RETRY_PAUSE), &Some(error.clone())));
        entry.view.eligibility = Eligibility::Plain(None);
        assert!(!entry.keeps_verdict(&error, now), "a label came: until more is known it is closed");
    }

    #[test]
    fn a_pod_leaves_when_its_source_announces_it_no_more_and_peers_had_time_to_hear_of_it() {
        let (now, grace) = (Instant::now(), Duration::from_secs(5));
        let mut entry = PodEntry::new(Arc::new(Pod::default()), 1, now);
        assert!(!entry.leave(true, grace, now), "nobody takes it for one of the mesh");
        let announced = |is_announced| Arc::new(Pod { is_announced, ..Pod::default() });
        entry.view.pod = announced(true);
        assert!(!entry.leave(false, grace, now), "its netns has nothing that could serve");
        assert!(!entry.leave(true, Duration::ZERO, now), "not wanted");
        assert!(entry.leave(true, grace, now));
        let after = |seconds| now + Duration::from_secs(seconds);
        assert!(entry.leave(true, grace, after(9)), "the annotation is still there");
        entry.plan.workload = Some(crate::plan::PodWorkload {
            name: String::new(),
            namespace: String::new(),
            service_account: String::new(),
            cookie: 1,
            netns: crate::observe::netns::NetnsId { dev: 4, inode: 1 },
            pod_cgroup: std::path::PathBuf::new(),
        });
        entry.view.pod = announced(false);
        assert!(entry.leave(true, grace, after(10)) && entry.leave(true, grace, after(14)));
        assert_eq!(entry.leaves_at(), Some(after(15)));
        assert!(!entry.leave(true, grace, after(15)));
        // A source that cannot be written to keeps nobody for ever.
        entry.view.pod = announced(true);
        assert!(entry.leave(true, grace, after(20)) && !entry.leave(true, grace, after(50)));
    }

    #[test]
    fn only_a_pod_that_ran_in_plaintext_gets_a_grace_period() {
        let now = Instant::now();
        let eligible = || {
            let mut entry = PodEntry::new(Arc::new(Pod::default()), 1, now);
            entry.view.eligibility = Eligibility::Eligible(crate::observe::netns::NetnsFacts {
                id: crate::observe::netns::NetnsId { dev: 4, inode: 1 },
                cookie: 1,
                addresses: Vec::new(),
                link_local_v4: Vec::new(),
                devices: BTreeMap::new(),
                guest: None,
            });
            entry
        };
        for (is_closed, has_tunnel, expected) in
            [(false, true, true), (true, true, false), (false, false, false)]
        {
            let mut entry = eligible();
            entry.admit(is_closed, has_tunnel, now);
            assert_eq!(entry.in_grace(now), expected, "closed {is_closed}, tunnel {has_tunnel}");
            assert!(!entry.in_grace(now + GRACE_PERIOD));
        }
        // Decided once: a tunnel that connects later changes nothing.
        let mut entry = eligible();
        entry.admit(false, false, now);
        entry.admit(false, true, now);
        assert!(!entry.in_grace(now));
        // A tunnel served it: what follows is no grace.
        let mut entry = eligible();
        entry.admit(false, true, now);
        entry.end_grace();
        entry.admit(false, true, now);
        assert!(!entry.in_grace(now));
    }
}
