//! Verdicts of the kernel programs, with names, for `watcher trace`.
//!
//! * `filter`: which of them a client gets, and what the programs leave out themselves

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
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tracing::{info, warn};

use crate::{
    apply::{Applier, settings::KernelFilter},
    plan::{PodView, address16},
    sys::pollable,
};

use super::{Answer, Answers, answers};

pub(crate) mod filter;

use self::filter::TraceFilter;

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
#[derive(Clone, Debug)]
pub struct TraceRequest {
    /// Only verdicts about this pod: uid, name or namespace/name.
    pub pod: Option<String>,
    /// Only verdicts about this port, at either end.
    pub port: Option<u16>,
    /// Only verdicts about this address, at either end.
    pub address: Option<IpAddr>,
    /// No verdicts whose either end is in one of these.
    pub not_addresses: Vec<IpNet>,
}

/// Runs any number of traces. The programs report what at least one of them wants; each gets what it
/// asked for.
#[derive(Debug, Default)]
pub struct Tracer {
    records: Option<Records>,
    clients: Vec<Client>,
    /// What the programs filter by.
    applied: KernelFilter,
}

/// The records of the programs.
#[derive(Debug)]
struct Records {
    trace: Trace,
    readable: AsyncFd<OwnedFd>,
    /// Records were left by the last turn; the fd does not say so again.
    has_more: bool,
}

/// Who runs `watcher trace`.
#[derive(Debug)]
struct Client {
    answers: Answers,
    filter: TraceFilter,
    lost: LostRecords,
}

impl Tracer {
    /// Has the programs report their verdicts, and sends them to the client behind `answers`.
    ///
    /// # Errors
    /// There is no such pod, or the records cannot be opened: a sentence for the user.
    pub(crate) fn start<'a>(
        &mut self,
        answers: &Answers,
        request: TraceRequest,
        pods: &(impl Iterator<Item = &'a PodView> + Clone),
        applier: &mut Applier,
    ) -> Result<(), String> {
        let TraceRequest { pod, port, address, not_addresses } = request;
        let view = pod.as_deref().map(|pod| answers::find(pods.clone(), pod)).transpose()?;
        if self.records.is_none() {
            self.records = Some(Records::open(&applier.kernel)?);
        }
        info!(pod, port, ?address, ?not_addresses, others = self.clients.len(), "trace on");
        let pod = view.map(|view| view.pod.uid.clone());
        let filter = TraceFilter { pod, port, address, not_addresses, marks: BTreeSet::new() };
        self.clients.push(Client { answers: answers.clone(), filter, lost: LostRecords::default() });
        self.update(pods, applier);
        Ok(())
    }

    /// Resolves when there may be records, or a client disconnected; never without a trace.
    pub async fn ready(&mut self) {
        let Some(records) = &mut self.records else { return std::future::pending().await };
        let mut closed: FuturesUnordered<_> =
            self.clients.iter().map(|client| client.answers.closed()).collect();
        tokio::select! {
            () = records.ready() => {}
            Some(()) = closed.next() => {}
        }
    }

    /// Sends the records that there are to those who asked for them.
    pub(crate) fn forward<'a>(&mut self, pods: impl Iterator<Item = &'a PodView>) {
        let Some(Records { trace, has_more, .. }) = &mut self.records else { return };
        let (names, clients) = (PodNames::of(pods), &mut self.clients);
        *has_more = forward_batch(
            || trace.next(),
            |record| {
                let wanted = clients.iter_mut().filter(|client| client.filter.lets_pass(&record));
                let mut line = None;
                for client in wanted {
                    client.give(line.get_or_insert_with(|| Answer::Ok(names.line(&record))));
                }
            },
        );
    }

    /// Lets go of clients that disconnected, and has the programs report what the others want of
    /// the pods as they are now.
    pub(crate) fn update<'a>(
        &mut self,
        pods: &(impl Iterator<Item = &'a PodView> + Clone),
        applier: &mut Applier,
    ) {
        if self.records.is_none() {
            return;
        }
        self.clients.retain(|client| !client.answers.is_closed());
        if self.clients.is_empty() {
            self.stop(applier);
            return;
        }
        for client in &mut self.clients {
            client.filter.update(pods.clone());
        }
        let wanted = filter::for_all(self.clients.iter().map(|client| &client.filter));
        applier.settings.trace(&mut applier.kernel, &self.applied, &wanted);
        self.applied = wanted;
    }

    /// Has the programs report nothing.
    pub fn stop(&mut self, applier: &mut Applier) {
        if self.records.take().is_some() {
            self.clients.clear();
            applier.settings.stop_trace(&mut applier.kernel, &std::mem::take(&mut self.applied));
            info!("trace off");
        }
    }
}

impl Records {
    /// Opens the records of the programs. Those of an earlier trace are dropped.
    fn open(kernel: &Kernel) -> Result<Self, String> {
        let mut trace = kernel.trace().map_err(|error| Report::new(&error).to_string())?;
        let readable = trace
            .as_fd()
            .try_clone_to_owned()
            .and_then(pollable)
            .map_err(|error| format!("cannot wait for records: {error}"))?;
        trace.skip();
        Ok(Self { trace, readable, has_more: false })
    }

    async fn ready(&mut self) {
        if self.has_more {
            return tokio::task::yield_now().await;
        }
        if let Ok(mut guard) = self.readable.readable().await {
            guard.clear_ready();
        }
    }
}

impl Client {
    fn give(&mut self, line: &Answer<TraceLine>) {
        if self.answers.give(line) || self.answers.is_closed() {
            return;
        }
        if let Some(count) = self.lost.add(Instant::now()) {
            warn!(count, "the client of a trace reads too slowly; records are lost");
        }
    }
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
