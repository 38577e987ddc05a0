//! What commands want to know.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
};

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED},
    pods::{CgroupInfo, flag},
    trace::{Hook, Rule, TraceRecord},
};
use adit_ebpf_loader::Trace;
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tracing::{debug, info, warn};

use crate::{
    control::{
        Answer, Answers, Asked, Request,
        explain::{self, Explanation},
        status::{EventsStatus, NetnsStatus, PodStatus, SourceStatus, Status},
    },
    model::{
        pod::{FailMode, Pod},
        state::State,
    },
    plan::{Judged, Reason, ReasonCode, Verdict, address16},
    source::Outcome,
    sys::pollable,
};

use super::{
    Node,
    pods::{Known, Refused},
};
use crate::model::error_chain::chain;

/// One verdict of the kernel programs, with names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceLine {
    pub hook: String,
    pub rule: String,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// The pod whose process called; none where no process calls, or where it is in no known pod.
    pub caller: Option<String>,
    pub local_pod: Option<String>,
    pub remote_pod: Option<String>,
}

/// A running `watcher trace`.
pub(super) struct Tracing {
    trace: Trace,
    readable: AsyncFd<OwnedFd>,
    answers: Answers,
    /// Only verdicts about these; both empty: all.
    cgroups: BTreeSet<u64>,
    addresses: BTreeSet<Address>,
}

impl Tracing {
    /// Resolves when there may be records, or the asker hung up; never, where nobody traces.
    pub async fn ready(tracing: &mut Option<Self>) {
        let Some(tracing) = tracing else { return std::future::pending().await };
        tokio::select! {
            readable = tracing.readable.readable() => {
                if let Ok(mut guard) = readable {
                    guard.clear_ready();
                }
            }
            () = tracing.answers.closed() => {}
        }
    }

    pub fn is_over(&self) -> bool {
        self.answers.is_closed()
    }

    fn concerns(&self, record: &TraceRecord) -> bool {
        (self.cgroups.is_empty() && self.addresses.is_empty())
            || self.cgroups.contains(&record.cgroup_id)
            || self.addresses.contains(&record.local)
            || self.addresses.contains(&record.remote)
    }
}

impl Node {
    /// Answers; gives back the asker of a detach, who is answered when that is done.
    pub fn answer(&mut self, asked: Asked) -> Option<Answers> {
        let Asked { request, answers } = asked;
        match request {
            Request::Status => drop(answers.give(&Answer::Ok(self.status()))),
            Request::Explain { pod, destination } => {
                let answer = match self.find(&pod) {
                    Ok(judged) => Answer::Ok(self.explain(judged, destination)),
                    Err(problem) => Answer::Error(problem),
                };
                answers.give(&answer);
            }
            Request::Trace { pod, port, address } => {
                if let Err(problem) = self.start_tracing(&answers, pod.as_deref(), port, address) {
                    answers.give(&Answer::<TraceLine>::Error(problem));
                }
            }
            Request::Detach => return Some(answers),
        }
        None
    }

    fn find(&self, named: &str) -> Result<&Judged, String> {
        let fits = |judged: &Judged| {
            let pod = &judged.pod;
            pod.uid == named || pod.name == named || format!("{}/{}", pod.namespace, pod.name) == named
        };
        let found: Vec<&Judged> = self.pods.in_order().into_iter().filter(|judged| fits(judged)).collect();
        match found.as_slice() {
            [one] => Ok(one),
            [] => Err(format!("no pod \"{named}\", expected a uid, name or namespace/name")),
            several => Err(format!("{} pods are called \"{named}\", name one by its uid", several.len())),
        }
    }

    fn status(&self) -> Status {
        let refused = self.pods.refused.iter().map(refused_status);
        Status {
            node: self.config.node.clone(),
            pid: std::process::id(),
            attached: self.config.attach.clone(),
            fail_mode: self.config.fail_mode,
            source: SourceStatus {
                name: self.source_name.clone(),
                synced: self.pods.synced,
                error: self.source_error.clone(),
                since_unix_secs: self.source_since,
            },
            events: EventsStatus {
                source: self.events.source,
                told: self.events.told,
                lost: self.events.lost,
                corrections: self.events.corrections,
            },
            ready: self.is_ready(),
            tunnels: self.tunnels.status(),
            turned_away: self.tunnels.turned_away.clone(),
            pods: self
                .pods
                .in_order()
                .into_iter()
                .map(|judged| self.pod_status(judged))
                .chain(refused)
                .collect(),
            lingering: self.lingering.iter().map(|(cookie, lingering)| lingering.status(*cookie)).collect(),
            problems: self.unsettled.clone(),
        }
    }

    /// Whether every pod that was there at the start has been found, and is enrolled as far as it can be.
    pub fn is_ready(&self) -> bool {
        self.pods.synced && !self.dirty.all && self.dirty.look.is_empty()
    }

    fn pod_status(&self, judged: &Judged) -> PodStatus {
        let pod = &judged.pod;
        let (state, reason) = self.state(judged);
        let facts = match &judged.verdict {
            Verdict::Verified(facts) => Some(facts),
            _ => None,
        };
        PodStatus {
            uid: Some(pod.uid.clone()),
            name: Some(pod.name.clone()),
            namespace: Some(pod.namespace.clone()),
            service_account: Some(pod.service_account.clone()),
            state,
            reason,
            fail_mode: Some(pod.fail_mode.unwrap_or(self.config.fail_mode)),
            addresses: facts.map(|facts| facts.addresses.clone()).unwrap_or_default(),
            netns: facts.map(|facts| NetnsStatus { inode: facts.id.inode, cookie: facts.cookie }),
            cgroups: judged.observed.cgroups.clone(),
            notes: pod.notes.clone(),
        }
    }

    fn info(&self, judged: &Judged) -> Option<&CgroupInfo> {
        let id = judged.observed.cgroups.get(judged.observed.dir.as_ref()?)?;
        self.applied.cgroups.get(id)
    }

    /// What becomes of the pod's traffic, and why it is not open.
    fn state(&self, judged: &Judged) -> (State, Option<Reason>) {
        let open = judged.pod.fail_mode.unwrap_or(self.config.fail_mode) == FailMode::Open;
        // Without a cgroup it has no traffic yet, and its first will meet this.
        let expected = flag::IN_MESH | if open { flag::FAIL_OPEN } else { 0 };
        let none_yet = judged.observed.cgroups.is_empty();
        let flags = self.info(judged).map_or(if none_yet { expected } else { 0 }, |info| info.flags);
        match &judged.verdict {
            Verdict::Plain(reason) => (State::Plain, reason.clone()),
            Verdict::Refused { reason, .. } => (State::Refused, Some(reason.clone())),
            Verdict::Waiting(reason) => (unserved(flags), Some(reason.clone())),
            Verdict::Verified(_) if flags & flag::READY != 0 && self.tunnel_up() => (State::Open, None),
            Verdict::Verified(_) => (unserved(flags), Some(self.why_unserved(&judged.pod.uid))),
        }
    }

    /// Tells the source what became of the pods that something was done for, and takes the time of those that are open
    /// now.
    pub fn note_states(&mut self) {
        for state in self.pods.gone_states.drain(..) {
            self.metrics.pod(Some(state), None);
        }
        let mut outcomes = std::mem::take(&mut self.outcomes);
        for uid in &std::mem::take(&mut self.to_note) {
            let Some(known) = self.pods.get(uid) else {
                if let Some(listener) = &self.listener {
                    outcomes.tell(listener, uid, None);
                }
                continue;
            };
            let judged = &known.judged;
            let (state, reason) = self.state(judged);
            if let Some(listener) = &self.listener {
                let addresses = match &judged.verdict {
                    Verdict::Verified(facts) => facts.addresses.clone(),
                    _ => Vec::new(),
                };
                let Pod { name, namespace, .. } = judged.pod.as_ref();
                let outcome =
                    Outcome { name: name.clone(), namespace: namespace.clone(), state, reason, addresses };
                outcomes.tell(listener, uid, Some(outcome));
            }
            let Some(known) = self.pods.get_mut(uid) else { continue };
            self.metrics.pod(known.state.replace(state), Some(state));
            if state == State::Open
                && let Some(asked_at) = known.asked_at.take()
            {
                let took = asked_at.elapsed();
                self.metrics.enrolled_after(took.as_secs_f64());
                debug!(uid, took_us = took.as_micros(), "pod open");
            }
        }
        self.outcomes = outcomes;
    }

    /// Tells the source that nobody is in the mesh any more.
    pub fn note_all_left(&mut self) {
        let Some(listener) = &self.listener else { return };
        for known in self.pods.all() {
            let Pod { uid, name, namespace, .. } = known.judged.pod.as_ref();
            let (name, namespace) = (name.clone(), namespace.clone());
            let left = Outcome { name, namespace, state: State::Plain, reason: None, addresses: Vec::new() };
            self.outcomes.tell(listener, uid, Some(left));
        }
    }

    fn why_unserved(&self, uid: &str) -> Reason {
        if let Some(reason) = self.pods.get(uid).and_then(|known| known.problem.clone()) {
            return reason;
        }
        if self.tunnels.is_empty() {
            return Reason::new(ReasonCode::NoTunnel, "no tunnel is connected");
        }
        match self.tunnels.failure(uid) {
            Some(error) => Reason::new(ReasonCode::TunnelRefused, format!("the tunnel refused it: {error}")),
            None => Reason::new(ReasonCode::NotAcknowledged, "the tunnel has not acknowledged it yet"),
        }
    }

    fn explain(&self, judged: &Judged, destination: SocketAddr) -> Explanation {
        let up = self.tunnel_up();
        let info = self.info(judged);
        let own = match &judged.verdict {
            Verdict::Verified(facts) => facts.addresses.as_slice(),
            _ => &[],
        };
        let outbound =
            explain::outbound(info, own, &judged.pod.exclusions, &self.config.dns_resolvers, up, destination);
        let there = destination.ip().to_canonical();
        let receiver = self.pods.all().map(|known| &known.judged).find(
            |other| matches!(&other.verdict, Verdict::Verified(facts) if facts.addresses.contains(&there)),
        );
        let inbound = receiver.filter(|_| outbound != Rule::OwnAddress).map(|receiver| {
            let record = self.applied.addresses.get(&address16(there));
            let listens =
                record.is_none_or(|record| self.may_listen(record.netns_cookie, destination.port(), there));
            explain::inbound(record, &receiver.pod.exclusions, up, listens, destination.port())
                .as_str()
                .to_owned()
        });
        Explanation {
            pod: format!("{}/{}", judged.pod.namespace, judged.pod.name),
            destination,
            outbound: outbound.as_str().to_owned(),
            inbound,
        }
    }

    fn start_tracing(
        &mut self,
        answers: &Answers,
        pod: Option<&str>,
        port: Option<u16>,
        address: Option<IpAddr>,
    ) -> Result<(), String> {
        if self.tracing.as_ref().is_some_and(|tracing| !tracing.is_over()) {
            return Err("somebody traces already, and there is one filter only".to_owned());
        }
        let (cgroups, addresses) = match pod.map(|pod| self.find(pod)).transpose()? {
            None => Default::default(),
            Some(judged) => {
                let addresses = match &judged.verdict {
                    Verdict::Verified(facts) => facts.addresses.iter().copied().map(address16).collect(),
                    _ => BTreeSet::new(),
                };
                (judged.observed.cgroups.values().copied().collect(), addresses)
            }
        };
        let trace = self.kernel.trace().map_err(|error| chain(&error))?;
        let readable = trace
            .as_fd()
            .try_clone_to_owned()
            .and_then(pollable)
            .map_err(|error| format!("cannot wait for records: {error}"))?;
        let mut tracing = Tracing { trace, readable, answers: answers.clone(), cgroups, addresses };
        // What an earlier trace left unread is not about this one.
        while tracing.trace.next().is_some() {}
        self.tracing = Some(tracing);
        self.change_settings(|settings| {
            settings.debug = 1;
            settings.debug_port = port.map_or(0, u32::from);
            settings.debug_address = address.map_or(UNSPECIFIED, address16);
        });
        info!(pod, port, ?address, "trace on");
        Ok(())
    }

    pub fn stop_tracing(&mut self) {
        if self.tracing.take().is_some() {
            self.change_settings(|settings| settings.debug = 0);
            info!("trace off");
        }
    }

    pub fn pass_trace_on(&mut self) {
        let Some(mut tracing) = self.tracing.take() else { return };
        let names = self.names();
        while let Some(record) = tracing.trace.next() {
            if tracing.concerns(&record) && !tracing.answers.give(&Answer::Ok(self.line(&record, &names))) {
                if tracing.is_over() {
                    break;
                }
                warn!("the reader of the trace is too slow, a record is lost");
            }
        }
        self.tracing = Some(tracing);
    }

    /// Pods by address.
    fn names(&self) -> BTreeMap<Address, String> {
        let mut names = BTreeMap::new();
        for Known { judged, .. } in self.pods.all() {
            if let Verdict::Verified(facts) = &judged.verdict {
                names.extend(facts.addresses.iter().map(|address| (address16(*address), name(judged))));
            }
        }
        names
    }

    fn line(&self, record: &TraceRecord, names: &BTreeMap<Address, String>) -> TraceLine {
        let caller = self
            .pods
            .all()
            .map(|known| &known.judged)
            .find(|judged| judged.observed.cgroups.values().any(|id| *id == record.cgroup_id));
        let unknown = |what: &str, number: u16| format!("{what} {number}");
        TraceLine {
            hook: Hook::from_number(record.hook)
                .map_or_else(|| unknown("hook", record.hook), |hook| hook.as_str().to_owned()),
            rule: Rule::from_number(record.rule)
                .map_or_else(|| unknown("rule", record.rule), |rule| rule.as_str().to_owned()),
            local: SocketAddr::new(ip(&record.local), record.local_port),
            remote: SocketAddr::new(ip(&record.remote), record.remote_port),
            caller: caller.map(name),
            local_pod: names.get(&record.local).cloned(),
            remote_pod: names.get(&record.remote).cloned(),
        }
    }
}

fn name(judged: &Judged) -> String {
    format!("{}/{}", judged.pod.namespace, judged.pod.name)
}

fn ip(address: &Address) -> IpAddr {
    Ipv6Addr::from(*address).to_canonical()
}

/// What becomes of the traffic of a pod that no tunnel serves.
fn unserved(flags: u32) -> State {
    if flags & flag::IN_MESH != 0 && flags & flag::FAIL_OPEN == 0 { State::Closed } else { State::Bypassed }
}

fn refused_status(refused: &Refused) -> PodStatus {
    PodStatus {
        uid: refused.entry.uid.clone(),
        name: refused.entry.name.clone(),
        namespace: None,
        service_account: None,
        state: State::Refused,
        reason: Some(refused.reason.clone()),
        fail_mode: None::<FailMode>,
        addresses: Vec::new(),
        netns: None,
        cgroups: BTreeMap::new(),
        notes: Vec::new(),
    }
}
