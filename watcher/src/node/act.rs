//! From what was seen to steps, and doing them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use adit_ebpf_loader::Kernel;
use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};

use crate::{
    enrol::{hand_over::Event, prepare_netns, publish, records::NetnsRecord, undo},
    observed::{netns, processes},
    reconcile::{Circumstances, Netns, Plan, Reason, Step, Verdict, steps, wanted},
};

use super::{Node, NodeError, cannot, chain, lingering::Lingering};

/// A pod that ran in clear goes on so for at most this long while a tunnel is asked to take it.
const LENIENT_FOR: Duration = Duration::from_secs(5);
/// How long tunnels have to acknowledge that their pods are gone, when everything is undone.
const FAREWELL: Duration = Duration::from_secs(2);

impl Node {
    /// Does what has to be done now.
    pub fn act(&mut self) {
        let now = Instant::now();
        if self.adopted.as_ref().is_some_and(|adopted| adopted.until <= now) {
            self.adopted = None;
            if self.tunnels.is_empty() && self.tunnel_up() {
                warn!("no tunnel came back after the restart");
                self.change_settings(|settings| settings.tunnel_up = 0);
            }
            self.detach_unused_tunnels();
        }
        self.lenient.retain(|_, until| *until > now);
        self.tunnels.retry(&self.applied.workloads);
        // Before the first usable pods file nothing is known; what an earlier run left stays as it is.
        if self.entries.is_some() {
            self.meet(now);
            self.choose_policies();
            let wanted = self.wanted();
            self.execute(steps(&self.applied, &wanted));
        }
        self.settle_lingering();
        if self.tracing.as_ref().is_some_and(super::asked::Tracing::is_over) {
            self.stop_tracing();
        }
    }

    /// Decides for each pod that is new how it is treated until a tunnel has it.
    fn meet(&mut self, now: Instant) {
        let mut met = std::mem::take(&mut self.met);
        met.retain(|uid| {
            self.judged
                .iter()
                .any(|judged| judged.pod.uid == *uid && !matches!(judged.verdict, Verdict::Plain(_)))
        });
        for judged in self.judged.iter().filter(|judged| !matches!(judged.verdict, Verdict::Plain(_))) {
            let first_seen = met.insert(judged.pod.uid.clone());
            let runs = matches!(judged.verdict, Verdict::Verified(_));
            let known = judged.observed.cgroups.values().any(|id| self.applied.cgroups.contains_key(id));
            if first_seen && runs && !known && !self.tunnels.is_empty() {
                self.lenient.insert(judged.pod.uid.clone(), now + LENIENT_FOR);
            }
        }
        self.met = met;
    }

    /// Gives every pod with exclusions an id; other exclusions get another id, so that the programs see
    /// the old list or the new one and nothing between.
    fn choose_policies(&mut self) {
        let mut before = std::mem::take(&mut self.policies);
        for judged in &self.judged {
            let exclusions = &judged.pod.exclusions;
            if exclusions.is_empty() || self.policies.contains_key(&judged.pod.uid) {
                continue;
            }
            let policy = match before.remove(&judged.pod.uid) {
                Some(policy) if policy.1 == *exclusions => policy,
                _ => {
                    self.last_policy = self.last_policy.wrapping_add(1).max(1);
                    (self.last_policy, exclusions.clone())
                }
            };
            self.policies.insert(judged.pod.uid.clone(), policy);
        }
    }

    fn wanted(&self) -> Plan {
        let ready = |uid: &str, cookie: u64| {
            let served = self.applied.workloads.get(uid).is_some_and(|workload| workload.cookie == cookie)
                && self.tunnels.serve(uid);
            served || self.adopted.as_ref().is_some_and(|adopted| adopted.ready.contains(&cookie))
        };
        let mut tunnels = self.tunnels.cgroup_ids();
        tunnels.extend(self.adopted.iter().flat_map(|adopted| adopted.tunnels.iter().copied()));
        wanted(
            &self.judged,
            &Circumstances {
                default_fail_mode: self.config.fail_mode,
                ready: &ready,
                lenient: &self.lenient.keys().cloned().collect(),
                policies: &self.policies.iter().map(|(uid, (id, _))| (uid.clone(), *id)).collect(),
                tunnels: &tunnels,
            },
        )
    }

    fn execute(&mut self, steps: Vec<Step>) {
        let mut problems = Vec::new();
        let mut entered: BTreeMap<u64, OwnedFd> = BTreeMap::new();
        for step in steps {
            debug!(?step, "step");
            let result = match &step {
                Step::Withdraw(uid) => {
                    self.withdraw(uid);
                    Ok(())
                }
                Step::Release(cookie) => {
                    self.release(*cookie);
                    Ok(())
                }
                Step::Prepare(cookie, netns) => {
                    match self.prepare(*cookie, netns) {
                        Ok(fd) => drop(entered.insert(*cookie, fd)),
                        Err(error) => self
                            .note_problem(&netns.uid, Reason::new("netns_not_prepared", error.to_string())),
                    }
                    Ok(())
                }
                Step::Steer(cookie, netns) => {
                    if let Some(fd) = entered.get(cookie) {
                        match self.kernel.steer(*cookie, fd.as_fd()) {
                            Ok(()) => {
                                self.problems.remove(&netns.uid);
                                self.applied.netns.insert(*cookie, netns.clone());
                            }
                            Err(error) => {
                                self.note_problem(
                                    &netns.uid,
                                    Reason::new("netns_not_steered", chain(&error)),
                                );
                            }
                        }
                    }
                    Ok(())
                }
                Step::Offer(uid, workload) => {
                    // Without its netns in order the pod stays closed, and is tried again.
                    if self.applied.netns.contains_key(&workload.cookie) {
                        self.tunnels.offer(uid, workload);
                        self.applied.workloads.insert(uid.clone(), workload.clone());
                    }
                    Ok(())
                }
                map_step => publish::apply(&mut self.kernel, map_step),
            };
            match result {
                Ok(()) => self.note_applied(step),
                Err(error) => problems.push(format!("{step:?}: {}", chain(&error))),
            }
        }
        for problem in &problems {
            if !self.unsettled.contains(problem) {
                error!(problem, "a step failed and is tried again");
            }
        }
        self.unsettled = problems;
        self.problems.retain(|uid, _| self.judged.iter().any(|judged| judged.pod.uid == *uid));
    }

    /// Takes a step about maps over into what is applied; the others did so themselves.
    fn note_applied(&mut self, step: Step) {
        let applied = &mut self.applied;
        match step {
            Step::RemoveCgroup(id) => drop(applied.cgroups.remove(&id)),
            Step::RemoveAddress(address) => drop(applied.addresses.remove(&address)),
            Step::SetCgroup(id, info) => drop(applied.cgroups.insert(id, info)),
            Step::SetAddress(address, record) => drop(applied.addresses.insert(address, record)),
            Step::SetPolicy(id, exclusions) => drop(applied.policies.insert(id, exclusions)),
            Step::ClearPolicy(id) => drop(applied.policies.remove(&id)),
            Step::Unsteer(_)
            | Step::Withdraw(_)
            | Step::Release(_)
            | Step::Prepare(..)
            | Step::Steer(..)
            | Step::Offer(..) => {}
        }
    }

    fn prepare(&mut self, cookie: u64, netns: &Netns) -> io::Result<OwnedFd> {
        let fd = processes::open_netns(&netns.pod_cgroup, netns.id)?;
        if netns::cookie(fd.as_fd())? != cookie {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the pod moved to another netns meanwhile"));
        }
        let record = NetnsRecord {
            id: netns.id,
            uid: netns.uid.clone(),
            fwmark_accept_before: prepare_netns::fwmark_accept(fd.as_fd())?,
        };
        self.records.add_netns(cookie, record)?;
        self.lingering.remove(&cookie);
        prepare_netns::prepare(fd.as_fd(), netns.v6)?;
        Ok(fd)
    }

    fn withdraw(&mut self, uid: &str) {
        let pending = self.tunnels.withdraw(uid);
        if let Some(workload) = self.applied.workloads.remove(uid)
            && let Some(netns) = self.applied.netns.get(&workload.cookie)
        {
            info!(uid, "pod left the mesh");
            self.lingering.insert(workload.cookie, Lingering::new(netns.clone(), pending));
        }
    }

    fn release(&mut self, cookie: u64) {
        if let Some(netns) = self.applied.netns.remove(&cookie) {
            self.lingering.entry(cookie).or_insert_with(|| Lingering::new(netns, BTreeSet::default()));
        }
    }

    /// Takes over what the maps and links really hold, so that the next round repairs what somebody else
    /// changed, or what could not be done.
    pub fn repair(&mut self) {
        let (cgroups, pods, steered) =
            match (self.kernel.cgroups(), self.kernel.pods(), self.kernel.steered()) {
                (Ok(cgroups), Ok(pods), Ok(steered)) => (cgroups, pods, steered),
                (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => {
                    warn!(error = %chain(&error), "cannot read the maps back");
                    return;
                }
            };
        self.applied.cgroups = cgroups.into_iter().collect();
        self.applied.addresses = pods.into_iter().collect();
        self.applied.netns.retain(|cookie, _| steered.contains(cookie));
        for cookie in steered {
            if !self.applied.netns.contains_key(&cookie)
                && let Err(error) = self.kernel.unsteer(cookie)
            {
                warn!(cookie, error = %chain(&error), "cannot remove the link of a netns");
            }
        }
    }

    /// Undoes everything, at once.
    pub async fn detach(mut self, events: &mut mpsc::UnboundedReceiver<Event>) -> Result<(), NodeError> {
        // Applications first, the tunnels' own entries stay until they have let go.
        let tunnels = self.tunnels.cgroup_ids();
        let mut nothing = Plan::default();
        nothing.cgroups.extend(
            self.applied.cgroups.iter().filter(|(id, _)| tunnels.contains(id)).map(|(id, info)| (*id, *info)),
        );
        self.execute(steps(&self.applied, &nothing));
        let deadline = Instant::now() + FAREWELL;
        while self.lingering.values().any(|lingering| !lingering.pending.is_empty()) {
            match tokio::time::timeout_at(deadline.into(), events.recv()).await {
                Ok(Some(event)) => self.on_tunnel(event),
                Ok(None) | Err(_) => break,
            }
        }
        let undone = undo::restore_all(&mut self.records).map_err(cannot("restore the pods' netns"))?;
        for problem in &undone.failed {
            warn!(problem, "left behind");
        }
        let Self { kernel, config, mut records, .. } = self;
        // Our fds keep links alive that are unpinned only.
        drop(kernel);
        Kernel::remove(&config.pins)
            .map_err(|source| NodeError::Kernel { what: "remove the pinned links and maps", source })?;
        for id in records.tunnels().keys().copied().collect::<Vec<_>>() {
            records.remove_tunnel(id).map_err(cannot("forget the tunnels"))?;
        }
        Ok(())
    }
}
