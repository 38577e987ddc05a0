//! Verdicts of the kernel programs, with names, for `watcher trace`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use adit_ebpf_common::{
    address::Address,
    trace::{Hook, Rule, TraceRecord},
};
use adit_ebpf_loader::{Kernel, Trace};
use error_reporter::Report;
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tracing::{info, warn};

use crate::{
    apply::Applier,
    plan::{PodView, address16},
    sys::pollable,
};

use super::{Answer, Answers, answers};

/// One verdict of the kernel programs, with names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceLine {
    /// The program that gave it.
    pub hook: String,
    /// The rule that decided.
    pub rule: String,
    /// The end on this node.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// The pod whose process made the call; none if no process did, or one of no known pod.
    pub caller: Option<String>,
    /// The pod that has the local address.
    pub local_pod: Option<String>,
    /// The pod of this node that has the remote address.
    pub remote_pod: Option<String>,
}

/// Which verdicts a client wants.
#[derive(Clone, Copy, Debug)]
pub struct TraceRequest<'a> {
    /// Only verdicts about this pod: uid, name or namespace/name.
    pub pod: Option<&'a str>,
    /// Only verdicts about this port, at either end.
    pub port: Option<u16>,
    /// Only verdicts about this address, at either end.
    pub address: Option<IpAddr>,
}

/// Runs at most one trace, since the programs have one filter.
#[derive(Debug, Default)]
pub struct Tracer(Option<TraceSession>);

impl Tracer {
    /// Has the programs report their verdicts, and sends them to the client behind `answers`.
    ///
    /// # Errors
    /// Another trace is running, there is no such pod, or the records cannot be opened: a sentence
    /// for the user.
    pub(crate) fn start<'a>(
        &mut self,
        answers: &Answers,
        request: TraceRequest<'_>,
        pods: impl Iterator<Item = &'a PodView>,
        applier: &mut Applier,
    ) -> Result<(), String> {
        if self.0.as_ref().is_some_and(|session| !session.is_over()) {
            return Err("another trace is running; only one at a time".to_owned());
        }
        let TraceRequest { pod, port, address } = request;
        let view = pod.map(|pod| answers::find(pods, pod)).transpose()?;
        self.0 = Some(TraceSession::start(&applier.kernel, answers.clone(), view)?);
        applier.settings.start_trace(&mut applier.kernel, port, address);
        info!(pod, port, ?address, "trace on");
        Ok(())
    }

    /// Resolves when there may be records, or the client disconnected; never without a trace.
    pub async fn ready(&mut self) {
        match &mut self.0 {
            Some(session) => session.ready().await,
            None => std::future::pending().await,
        }
    }

    /// Sends the records that there are to the client.
    pub(crate) fn forward<'a>(&mut self, pods: impl Iterator<Item = &'a PodView>) {
        if let Some(session) = &mut self.0 {
            session.forward(pods);
        }
    }

    /// Has the programs report nothing once the client disconnected.
    pub fn stop_if_over(&mut self, applier: &mut Applier) {
        if self.0.as_ref().is_some_and(TraceSession::is_over) {
            self.stop(applier);
        }
    }

    /// Has the programs report nothing.
    pub fn stop(&mut self, applier: &mut Applier) {
        if self.0.take().is_some() {
            applier.settings.stop_trace(&mut applier.kernel);
            info!("trace off");
        }
    }
}

/// A running `watcher trace`.
#[derive(Debug)]
struct TraceSession {
    trace: Trace,
    readable: AsyncFd<OwnedFd>,
    /// Records were left by the last turn; the fd does not say so again.
    has_more: bool,
    answers: Answers,
    filter: TraceFilter,
    lost: LostRecords,
}

/// How many records are handled in one turn of the loop. The programs may report as fast as they
/// are read, under a flood of SYNs for example, and everything else must have its turn.
const BATCH: usize = 256;
/// How often lost records are reported.
const LOSS_INTERVAL: Duration = Duration::from_secs(1);

/// Records that the client did not read in time.
#[derive(Debug, Default)]
struct LostRecords {
    count: u64,
    reported_at: Option<Instant>,
}

impl LostRecords {
    /// One more, at `now`. How many there were since the last report, if it is time for one.
    fn add(&mut self, now: Instant) -> Option<u64> {
        self.count += 1;
        if self.reported_at.is_some_and(|at| now < at + LOSS_INTERVAL) {
            return None;
        }
        self.reported_at = Some(now);
        Some(std::mem::take(&mut self.count))
    }
}

/// Handles what `next` gives, at most [`BATCH`]. Whether there may be more.
fn forward_batch<T>(mut next: impl FnMut() -> Option<T>, mut handle: impl FnMut(T)) -> bool {
    for _ in 0..BATCH {
        let Some(record) = next() else { return false };
        handle(record);
    }
    true
}

/// Which verdicts a session gets; an empty filter lets all pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct TraceFilter {
    cgroups: BTreeSet<u64>,
    addresses: BTreeSet<Address>,
}

impl TraceFilter {
    fn of_pod(view: &PodView) -> Self {
        let addresses = view.eligibility.facts().into_iter().flat_map(|facts| &facts.addresses);
        Self {
            cgroups: view.observed.cgroups.values().copied().collect(),
            addresses: addresses.map(|address| address16(*address)).collect(),
        }
    }

    fn lets_pass(&self, record: &TraceRecord) -> bool {
        (self.cgroups.is_empty() && self.addresses.is_empty())
            || self.cgroups.contains(&record.cgroup_id)
            || self.addresses.contains(&record.local)
            || self.addresses.contains(&record.remote)
    }
}

impl TraceSession {
    /// Opens the records of the programs, for `pod` or for all. Records of an earlier trace are
    /// dropped.
    fn start(kernel: &Kernel, answers: Answers, pod: Option<&PodView>) -> Result<Self, String> {
        let mut trace = kernel.trace().map_err(|error| Report::new(&error).to_string())?;
        let readable = trace
            .as_fd()
            .try_clone_to_owned()
            .and_then(pollable)
            .map_err(|error| format!("cannot wait for records: {error}"))?;
        trace.skip();
        let filter = pod.map(TraceFilter::of_pod).unwrap_or_default();
        Ok(Self { trace, readable, has_more: false, answers, filter, lost: LostRecords::default() })
    }

    async fn ready(&mut self) {
        if self.has_more {
            return tokio::task::yield_now().await;
        }
        tokio::select! {
            readable = self.readable.readable() => {
                if let Ok(mut guard) = readable {
                    guard.clear_ready();
                }
            }
            () = self.answers.closed() => {}
        }
    }

    /// Whether the client disconnected.
    fn is_over(&self) -> bool {
        self.answers.is_closed()
    }

    fn forward<'a>(&mut self, pods: impl Iterator<Item = &'a PodView>) {
        let names = PodNames::of(pods);
        let Self { trace, answers, filter, lost, .. } = self;
        self.has_more = forward_batch(
            || trace.next(),
            |record| {
                if !filter.lets_pass(&record) || answers.give(&Answer::Ok(names.line(&record))) {
                    return;
                }
                if let Some(count) = lost.add(Instant::now()).filter(|_| !answers.is_closed()) {
                    warn!(count, "the client of the trace reads too slowly; records are lost");
                }
            },
        );
    }
}

/// Names of pods, by what identifies them in a record.
#[derive(Debug, Default)]
struct PodNames {
    by_address: BTreeMap<Address, String>,
    by_cgroup: BTreeMap<u64, String>,
}

impl PodNames {
    fn of<'a>(pods: impl Iterator<Item = &'a PodView>) -> Self {
        let mut names = Self::default();
        for view in pods {
            let name = view.full_name();
            for address in view.eligibility.facts().into_iter().flat_map(|facts| &facts.addresses) {
                names.by_address.insert(address16(*address), name.clone());
            }
            for id in view.observed.cgroups.values() {
                names.by_cgroup.insert(*id, name.clone());
            }
        }
        names
    }

    fn line(&self, record: &TraceRecord) -> TraceLine {
        let pod = || self.by_cgroup.get(&record.cgroup_id).cloned();
        // No process calls then; the address may be one that no map names.
        let arrives = record.hook == Hook::SkLookup as u16;
        let unknown = |what: &str, number: u16| format!("{what} {number}");
        TraceLine {
            hook: Hook::from_number(record.hook)
                .map_or_else(|| unknown("hook", record.hook), |hook| hook.as_str().to_owned()),
            rule: Rule::from_number(record.rule)
                .map_or_else(|| unknown("rule", record.rule), |rule| rule.as_str().to_owned()),
            local: SocketAddr::new(ip(&record.local), record.local_port),
            remote: SocketAddr::new(ip(&record.remote), record.remote_port),
            caller: (!arrives).then(pod).flatten(),
            local_pod: self.by_address.get(&record.local).cloned().or_else(|| arrives.then(pod).flatten()),
            remote_pod: self.by_address.get(&record.remote).cloned(),
        }
    }
}

fn ip(address: &Address) -> IpAddr {
    Ipv6Addr::from(*address).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_ends_although_there_are_always_more_records() {
        let mut handled = 0;
        assert!(forward_batch(|| Some(()), |()| handled += 1));
        assert_eq!(handled, BATCH);
        let mut three = [1, 2, 3].into_iter();
        assert!(!forward_batch(|| three.next(), |_| handled += 1));
        assert_eq!(handled, BATCH + 3);
    }

    #[test]
    fn losses_are_counted_and_reported_once_a_second() {
        let (mut lost, start) = (LostRecords::default(), Instant::now());
        assert_eq!(lost.add(start), Some(1));
        for _ in 0..1000 {
            assert_eq!(lost.add(start), None);
        }
        assert_eq!(lost.add(start + LOSS_INTERVAL), Some(1001));
    }
}
