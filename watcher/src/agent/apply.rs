//! From what was seen to steps, and doing them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ffi::OsString,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use adit_ebpf_common::lifecycle::{Name, name};
use adit_ebpf_loader::Kernel;
use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};

use crate::{
    apply::{maps, restore, zds_server::Event},
    model::pod::Pod,
    observe::cgroup_path,
    plan::{Circumstances, Judged, Netns, Plan, Reason, ReasonCode, Step, Verdict, steps, wanted},
};

use super::{Node, NodeError, cannot, draining::Lingering};
use crate::model::error_chain::chain;

/// A pod that ran in clear goes on so for at most this long while a tunnel is asked to take it.
const LENIENT_FOR: Duration = Duration::from_secs(5);
/// How long tunnels have to acknowledge that their pods are gone, when everything is undone.
const FAREWELL: Duration = Duration::from_secs(2);
/// When everything is compared again after a step failed.
pub const AGAIN: Duration = Duration::from_secs(1);

/// What the cgroup of `pod` may be called.
fn expected_names(pod: &Pod, attached: &Path) -> Vec<Name> {
    let given = pod.cgroup.as_ref().and_then(|dir| dir.file_name());
    let names = match given {
        Some(given) => vec![given.to_owned()],
        None => cgroup_path::names(&pod.uid, attached).into_iter().map(OsString::from).collect(),
    };
    names.iter().filter_map(|given| name(given.as_bytes())).collect()
}

impl Node {
    /// Does what has to be done now: for the pods that something happened to, or for all of them.
    pub fn act(&mut self) {
        let now = Instant::now();
        if self.pods.synced && self.adopted.as_ref().is_some_and(|adopted| adopted.until <= now) {
            self.adopted = None;
            self.dirty.all = true;
            if self.tunnels.is_empty() && self.tunnel_up() {
                warn!("no tunnel came back after the restart");
                self.change_settings(|settings| settings.tunnel_up = 0);
            }
            self.detach_unused_tunnels();
        }
        for (uid, known) in self.pods.all_mut() {
            if known.lenient_until.is_some_and(|until| until <= now) {
                known.lenient_until = None;
                self.dirty.act.insert(uid.clone());
            }
        }
        self.tunnels.retry(&self.applied.workloads);
        // Before the source has told of all pods nothing is known; what an earlier run left stays as it is.
        if self.pods.synced {
            let all = std::mem::take(&mut self.dirty.all) || self.all_due.is_some_and(|due| due <= now);
            let uids = if all { self.pods.uids() } else { std::mem::take(&mut self.dirty.act) };
            if all || !uids.is_empty() {
                self.dirty.act.clear();
                self.act_on(&uids, all, now);
            }
        }
        self.opened.clear();
        self.list_new(now);
        self.settle_lingering();
        if self.tracing.as_ref().is_some_and(super::answers::Tracing::is_over) {
            self.stop_tracing();
        }
    }

    fn act_on(&mut self, uids: &BTreeSet<String>, all: bool, now: Instant) {
        let (mut whole, mut keys) = (Plan::default(), std::mem::take(&mut self.pods.gone));
        for uid in uids {
            self.meet(uid, now);
            self.choose_policy(uid);
            let Some(known) = self.pods.get(uid) else { continue };
            let plan = self.plan_of(&known.judged, now);
            let own = plan.keys();
            let Some(known) = self.pods.get_mut(uid) else { continue };
            if own.expects_more_than(&known.keys) {
                // Its cgroup may have been made just before it was expected.
                known.next_look = Some(now);
            }
            keys.extend(std::mem::replace(&mut known.keys, own.clone()));
            keys.extend(own);
            whole.extend(plan);
        }
        let applied = if all {
            whole.extend(self.plan_of_tunnels());
            self.applied.clone()
        } else {
            self.applied.part(&keys)
        };
        self.execute(steps(&applied, &whole));
        self.all_due = (!self.unsettled.is_empty()).then(|| now + AGAIN);
        self.to_note.extend(uids.iter().cloned());
        self.dirs_changed = true;
    }

    /// Decides, for a pod that is new, how it is treated until a tunnel has it.
    fn meet(&mut self, uid: &str, now: Instant) {
        let tunnels = !self.tunnels.is_empty();
        let Some(known) = self.pods.get_mut(uid) else { return };
        if known.is_plain() {
            (known.met, known.lenient_until, known.asked_at) = (false, None, None);
            return;
        }
        let first_seen = !std::mem::replace(&mut known.met, true);
        if !first_seen {
            return;
        }
        known.asked_at = Some(now);
        let runs = matches!(known.judged.verdict, Verdict::Verified(_));
        let applied = &self.applied.cgroups;
        let closed = known.judged.observed.cgroups.values().any(|id| applied.contains_key(id));
        if runs && !closed && tunnels {
            known.lenient_until = Some(now + LENIENT_FOR);
        }
    }

    /// Gives a pod with exclusions an id; other exclusions get another id, so that the programs see the old
    /// list or the new one and nothing between.
    fn choose_policy(&mut self, uid: &str) {
        let Some(known) = self.pods.get_mut(uid) else { return };
        let exclusions = &known.judged.pod.exclusions;
        match &known.policy {
            _ if exclusions.is_empty() => known.policy = None,
            Some((_, before)) if before == exclusions => {}
            _ => {
                self.last_policy = self.last_policy.wrapping_add(1).max(1);
                known.policy = Some((self.last_policy, exclusions.clone()));
            }
        }
    }

    fn plan_of(&self, judged: &Judged, now: Instant) -> Plan {
        let ready = |uid: &str, cookie: u64| {
            let served = self.applied.workloads.get(uid).is_some_and(|workload| workload.cookie == cookie)
                && self.tunnels.serve(uid);
            served || self.adopted.as_ref().is_some_and(|adopted| adopted.ready.contains(&cookie))
        };
        let known = |uid: &str| self.pods.get(uid);
        wanted(
            std::iter::once(judged),
            &Circumstances {
                default_fail_mode: self.config.fail_mode,
                default_dns_capture: self.config.dns_capture,
                ready: &ready,
                lenient: &|uid| known(uid).is_some_and(|known| known.is_lenient(now)),
                policy: &|uid| known(uid).and_then(|known| known.policy.as_ref()).map_or(0, |(id, _)| *id),
                names: &|pod| expected_names(pod, &self.config.attach),
                tunnels: &BTreeSet::new(),
            },
        )
    }

    fn plan_of_tunnels(&self) -> Plan {
        let mut tunnels = self.tunnels.cgroup_ids();
        tunnels.extend(self.adopted.iter().flat_map(|adopted| adopted.tunnels.iter().copied()));
        wanted(
            &[],
            &Circumstances {
                default_fail_mode: self.config.fail_mode,
                default_dns_capture: self.config.dns_capture,
                ready: &|_, _| false,
                lenient: &|_| false,
                policy: &|_| 0,
                names: &|_| Vec::new(),
                tunnels: &tunnels,
            },
        )
    }

    fn execute(&mut self, steps: Vec<Step>) {
        let mut problems = Vec::new();
        // Those that stand together are prepared together.
        let as_netns = |step: &Step| match step {
            Step::Prepare(cookie, netns) => Some((*cookie, netns.clone())),
            _ => None,
        };
        let runs = steps.chunk_by(|a, b| as_netns(a).is_some() == as_netns(b).is_some());
        let runs = runs.map(|run| run.iter().filter_map(as_netns).collect::<Vec<(u64, Netns)>>());
        let mut to_prepare: VecDeque<_> = runs.filter(|run| !run.is_empty()).collect();
        let mut prepared: BTreeMap<u64, Arc<OwnedFd>> = BTreeMap::new();
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
                Step::Prepare(cookie, _) => {
                    if to_prepare.front().is_some_and(|run| run.iter().any(|(first, _)| first == cookie))
                        && let Some(run) = to_prepare.pop_front()
                    {
                        prepared.extend(self.prepare(&run));
                    }
                    Ok(())
                }
                Step::Steer(cookie, netns) => {
                    if let Some(fd) = prepared.get(cookie) {
                        match self.kernel.steer(*cookie, fd.as_fd()) {
                            Ok(()) => {
                                self.forget_problem(&netns.uid);
                                self.applied.netns.insert(*cookie, netns.clone());
                            }
                            Err(error) => {
                                self.note_problem(
                                    &netns.uid,
                                    Reason::new(ReasonCode::NetnsNotSteered, chain(&error)),
                                );
                            }
                        }
                    }
                    Ok(())
                }
                Step::Offer(uid, workload) => {
                    // Without its netns in order the pod stays closed, and is tried again.
                    if self.applied.netns.contains_key(&workload.cookie) {
                        let netns = prepared.get(&workload.cookie);
                        self.tunnels.offer(uid, workload, netns);
                        self.applied.workloads.insert(uid.clone(), workload.clone());
                    }
                    Ok(())
                }
                map_step => maps::apply(&mut self.kernel, map_step),
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
            Step::SetExpected(name, info) => drop(applied.expected.insert(name, info)),
            Step::RemoveExpected(name) => drop(applied.expected.remove(&name)),
            Step::Unsteer(_)
            | Step::Withdraw(_)
            | Step::Release(_)
            | Step::Prepare(..)
            | Step::Steer(..)
            | Step::Offer(..) => {}
        }
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
        let before = (self.applied.cgroups.len(), self.applied.addresses.len(), self.applied.netns.len());
        let (cgroups, addresses) = (cgroups.into_iter().collect(), pods.into_iter().collect());
        let as_left = cgroups == self.applied.cgroups && addresses == self.applied.addresses;
        self.applied.cgroups = cgroups;
        self.applied.addresses = addresses;
        self.applied.netns.retain(|cookie, _| steered.contains(cookie));
        let after = (self.applied.cgroups.len(), self.applied.addresses.len(), self.applied.netns.len());
        if !as_left || before.2 != after.2 {
            self.events.corrections += 1;
            self.metrics.corrected();
            warn!(?before, ?after, "somebody else changed our maps or links, they are put right");
        }
        self.dirty.all = true;
        let left: BTreeSet<u64> =
            steered.into_iter().filter(|cookie| !self.applied.netns.contains_key(cookie)).collect();
        if !left.is_empty()
            && let Err(error) = self.kernel.unsteer(&left)
        {
            warn!(netns = ?left, error = %chain(&error), "cannot remove the links of netns");
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
        self.note_all_left();
        let deadline = Instant::now() + FAREWELL;
        while self.lingering.values().any(|lingering| !lingering.pending.is_empty()) {
            match tokio::time::timeout_at(deadline.into(), events.recv()).await {
                Ok(Some(event)) => self.on_tunnel(event),
                Ok(None) | Err(_) => break,
            }
        }
        let undone = restore::restore_all(&mut self.records).map_err(cannot("restore the pods' netns"))?;
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
