//! The netns of enrolled pods: steered, then prepared; released when their pods leave. Those of
//! pods that are kept closed are steered only: what arrives there is refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use adit_ebpf_loader::{Kernel, KernelError};
use error_reporter::Report;
use tracing::{info, warn};

use crate::{
    model::pod::PodIdentity,
    observe::{
        netns::{self, NetnsId, Visitor, Visitors},
        processes,
    },
    plan::{PodNetns, Reason, ReasonCode, diff::NetnsStep},
};

use super::{
    OpenNetns,
    app_listeners::AppListeners,
    draining::DrainingNetns,
    istio_rules,
    journal::{Journal, NetnsRecord},
    netns_setup::{self, Sysctls},
};

/// Netns whose inbound connections are steered, by cookie; each with whether it is prepared.
#[derive(Debug)]
pub(crate) struct SteeredNetns {
    by_cookie: BTreeMap<u64, PodNetns>,
}

/// What a [`NetnsStep`] needs besides the netns themselves.
pub(crate) struct NetnsTools<'a> {
    /// Attaches and removes the links.
    pub kernel: &'a mut Kernel,
    /// Records each preparation before it is done.
    pub journal: &'a mut Journal,
    /// Threads that enter the netns.
    pub visitors: &'a Visitors,
    /// Where released netns go, and from where they come back.
    pub draining: &'a mut DrainingNetns,
    /// Lists what listens in netns that are new.
    pub app_listeners: &'a mut AppListeners,
    /// Netns that were opened when their pods were observed.
    pub opened: &'a OpenNetns,
}

impl std::fmt::Debug for NetnsTools<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetnsTools").finish_non_exhaustive()
    }
}

/// What a [`NetnsStep`] led to, by the uids of the pods.
#[derive(Debug, Default)]
pub(crate) struct NetnsReport {
    /// Netns that are in order now, open.
    pub ready: OpenNetns,
    /// Pods whose netns are steered now.
    pub steered: Vec<String>,
    /// Pods whose netns could not be prepared or steered.
    pub failed: Vec<(String, Reason)>,
}

impl SteeredNetns {
    /// Takes over what an earlier run left, so that what no pod needs any more is undone. `steered`
    /// are the cookies of the netns that have links; those without one go to `draining`.
    #[must_use]
    pub(crate) fn adopt(journal: &Journal, steered: &[u64], draining: &mut DrainingNetns) -> Self {
        let adopted = |id: NetnsId, uid: &str, pod: Option<PodIdentity>, prepared: bool| PodNetns {
            id,
            pod_cgroup: PathBuf::new(),
            uid: uid.to_owned(),
            pod,
            v6: false,
            devices: BTreeSet::new(),
            prepared,
        };
        let mut by_cookie: BTreeMap<u64, PodNetns> = steered
            .iter()
            .map(|cookie| (*cookie, adopted(NetnsId { dev: 0, inode: 0 }, "", None, false)))
            .collect();
        for (cookie, record) in journal.netns() {
            let prepared = adopted(record.id, &record.uid, record.pod.clone(), true);
            match by_cookie.get_mut(cookie) {
                Some(netns) => *netns = prepared,
                None => draining.release(*cookie, prepared),
            }
        }
        Self { by_cookie }
    }

    /// All of them.
    #[must_use]
    pub(crate) fn by_cookie(&self) -> &BTreeMap<u64, PodNetns> {
        &self.by_cookie
    }

    /// Whether the sk_lookup program is attached to the netns.
    #[must_use]
    pub(crate) fn is_steered(&self, cookie: u64) -> bool {
        self.by_cookie.contains_key(&cookie)
    }

    /// Whether the netns is steered, and prepared for connections of a tunnel.
    #[must_use]
    pub(crate) fn is_prepared(&self, cookie: u64) -> bool {
        self.by_cookie.get(&cookie).is_some_and(|netns| netns.prepared)
    }

    /// The cookie of the netns that is prepared for the pod `uid`.
    #[must_use]
    pub(crate) fn of_pod(&self, uid: &str) -> Option<u64> {
        let prepared = |netns: &PodNetns| netns.uid == uid && netns.prepared;
        self.by_cookie.iter().find(|(_, netns)| prepared(netns)).map(|(cookie, _)| *cookie)
    }

    /// All netns that are steered for the pod `uid`, by cookie.
    #[must_use]
    pub(crate) fn all_of_pod(&self, uid: &str) -> BTreeMap<u64, PodNetns> {
        let of_pod = self.by_cookie.iter().filter(|(_, netns)| netns.uid == uid);
        of_pod.map(|(cookie, netns)| (*cookie, netns.clone())).collect()
    }

    /// Does `step` and records it.
    ///
    /// # Errors
    /// The links cannot be removed. Netns that cannot be prepared or steered are in the report.
    pub(crate) fn apply(
        &mut self,
        step: &NetnsStep,
        tools: &mut NetnsTools<'_>,
    ) -> Result<NetnsReport, KernelError> {
        match step {
            NetnsStep::Unsteer(cookies) => tools.kernel.unsteer(cookies)?,
            NetnsStep::Release(cookie) => {
                // One that was only closed has nothing to be restored.
                if let Some(netns) = self.by_cookie.remove(cookie)
                    && tools.journal.netns().contains_key(cookie)
                {
                    tools.draining.release(*cookie, netns);
                }
            }
            NetnsStep::Steer(batch) => return Ok(self.steer(batch, tools)),
        }
        Ok(NetnsReport::default())
    }

    /// Steers first: whatever else fails, nothing arrives past what the maps say.
    fn steer(&mut self, batch: &[(u64, PodNetns)], tools: &mut NetnsTools<'_>) -> NetnsReport {
        let mut report = NetnsReport::default();
        let failed = |netns: &PodNetns, code, error: String| (netns.uid.clone(), Reason::new(code, error));
        let mut open = Vec::new();
        for (cookie, netns) in batch {
            let is_steered = self.by_cookie.contains_key(cookie) && tools.kernel.is_steering(*cookie);
            if !netns.prepared && is_steered {
                // It may be that no process leads to it any more.
                self.by_cookie.insert(*cookie, netns.clone());
                report.steered.push(netns.uid.clone());
                continue;
            }
            match open_netns(*cookie, netns, tools.opened) {
                Ok(fd) => open.push((*cookie, netns, fd)),
                Err(error) => {
                    report.failed.push(failed(netns, ReasonCode::NetnsNotPrepared, error.to_string()));
                }
            }
        }
        let fds: Vec<_> = open.iter().map(|(cookie, _, fd)| (*cookie, fd.as_fd())).collect();
        let results = tools.kernel.steer(&fds);
        let mut steered = Vec::new();
        for ((cookie, netns, fd), result) in open.into_iter().zip(results) {
            if let Err(error) = result {
                let text = Report::new(&error).to_string();
                report.failed.push(failed(netns, ReasonCode::NetnsNotSteered, text));
                continue;
            }
            let prepared = netns.prepared && self.is_prepared(cookie);
            self.by_cookie.insert(cookie, PodNetns { prepared, ..netns.clone() });
            steered.push((cookie, netns, fd));
        }
        let (to_prepare, closed): (Vec<_>, Vec<_>) =
            steered.into_iter().partition(|(_, netns, _)| netns.prepared);
        report.steered.extend(closed.iter().map(|(_, netns, _)| netns.uid.clone()));
        report.ready = prepare(to_prepare, tools, &mut report.failed);
        for (cookie, netns) in batch.iter().filter(|(cookie, _)| report.ready.contains_key(cookie)) {
            report.steered.push(netns.uid.clone());
            self.by_cookie.insert(*cookie, netns.clone());
        }
        report
    }

    /// Compares with `linked`, the netns that the kernel has links for: those without one are
    /// steered again by the next comparison, and links that belong to no pod are removed. Whether
    /// links were missing.
    pub(crate) fn read_back(&mut self, kernel: &mut Kernel, linked: Vec<u64>) -> bool {
        let before = self.by_cookie.len();
        self.by_cookie.retain(|cookie, _| linked.contains(cookie));
        let missing = before - self.by_cookie.len();
        if missing > 0 {
            warn!(missing, "another program removed links of netns; attaching them again");
        }
        let strays: BTreeSet<u64> =
            linked.into_iter().filter(|cookie| !self.by_cookie.contains_key(cookie)).collect();
        if !strays.is_empty()
            && let Err(error) = kernel.unsteer(&strays)
        {
            warn!(netns = ?strays, error = %Report::new(&error), "cannot remove the links of netns");
        }
        missing > 0
    }
}

/// Prepares open netns side by side; those that are in order now.
fn prepare(
    open: Vec<(u64, &PodNetns, Arc<OwnedFd>)>,
    tools: &mut NetnsTools<'_>,
    failed: &mut Vec<(String, Reason)>,
) -> OpenNetns {
    let mut fail = |netns: &PodNetns, reason: Reason| failed.push((netns.uid.clone(), reason));
    let sysctls = tools.visitors.visit_each(&open, |visitor, (_, _, fd)| Sysctls::of(visitor, fd.as_fd()));
    let (mut records, mut readable) = (Vec::new(), Vec::new());
    for ((cookie, netns, fd), sysctls) in open.into_iter().zip(sysctls) {
        match sysctls {
            Ok(sysctls) => {
                let (id, uid, sysctls_before) = (netns.id, netns.uid.clone(), sysctls.values());
                records.push((cookie, NetnsRecord::new(id, uid, netns.pod.clone(), sysctls_before)));
                readable.push((cookie, netns, fd, sysctls));
            }
            Err(error) => fail(netns, not_prepared(&error)),
        }
    }
    // Before the change, and all in one write: a write per netns would take longer than the rest.
    if let Err(error) = tools.journal.add_netns(records) {
        for (_, netns, ..) in readable.drain(..) {
            let dir = tools.journal.dir().display();
            fail(netns, not_prepared(&format_args!("cannot record the netns in {dir}: {error}")));
        }
    }
    for (cookie, _, fd, _) in &readable {
        tools.app_listeners.add(tools.kernel, *cookie, Arc::clone(fd));
    }
    let results = tools.visitors.visit_each(&readable, |visitor: &Visitor, (_, netns, fd, sysctls)| {
        prepare_one(visitor, fd.as_fd(), sysctls, netns)
    });
    let mut ready = OpenNetns::new();
    for ((cookie, netns, fd, _), result) in readable.into_iter().zip(results) {
        tools.draining.cancel(cookie);
        match result {
            Ok(()) => drop(ready.insert(cookie, fd)),
            Err(reason) => fail(netns, reason),
        }
    }
    ready
}

fn not_prepared(error: &dyn std::fmt::Display) -> Reason {
    Reason::new(ReasonCode::NetnsNotPrepared, error.to_string())
}

/// Takes out what Istio's node agent left in a netns, and prepares it.
fn prepare_one(
    visitor: &Visitor,
    fd: BorrowedFd<'_>,
    sysctls: &Sysctls,
    netns: &PodNetns,
) -> Result<(), Reason> {
    let taken_out =
        visitor.enter(fd, || Ok(istio_rules::take_out())).map_err(|error| not_prepared(&error))?;
    match taken_out {
        Ok(None) => {}
        Ok(Some(tables)) => {
            let pod = netns.pod.as_ref().map_or(&*netns.uid, |pod| &*pod.name);
            info!(pod, tables, "took out the rules that Istio's node agent had left in the pod's netns");
        }
        Err(error) => return Err(Reason::new(ReasonCode::IstioRules, Report::new(&error).to_string())),
    }
    netns_setup::prepare(visitor, fd, sysctls, netns).map_err(|error| not_prepared(&error))
}

/// The netns itself: the fd from when its pod was observed, else through one of the pod's
/// processes.
pub(crate) fn open_netns(cookie: u64, netns: &PodNetns, opened: &OpenNetns) -> io::Result<Arc<OwnedFd>> {
    if let Some(fd) = opened.get(&cookie) {
        return Ok(Arc::clone(fd));
    }
    let fd = processes::open_netns(&netns.pod_cgroup, netns.id)?;
    if netns::cookie(fd.as_fd())? != cookie {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the pod moved to another netns meanwhile"));
    }
    Ok(Arc::new(fd))
}
