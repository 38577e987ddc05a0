//! Does what the plan says. Each part owns what it applied:
//!
//! * `maps`: the kernel's maps of cgroups, addresses and exclusions; `exclusion_lists`: what of the
//!   latter is in them
//! * `settings`: the programs' settings, which hold for the whole node
//! * `netns`: prepared and steered netns; `netns_setup`: the rule, route and sysctls of each
//! * `istio_rules`: what Istio's node agent left in a pod's netns
//! * `draining`: netns of pods that left, while connections still need them; `pinned_sweep`: what
//!   stays of netns that are gone
//! * `new_pods`: what arrives for pods before their netns is known
//! * `app_listeners`: ports that applications listen on
//! * `kubelet`: the kubelet's connections, which pass
//! * `in_clear`: which connections no tunnel carries; `boot`: those that pods made before the first
//!   watcher ran, which are cut; `clear_audit`: those that should never be, which are counted
//! * `tunnels`: connected tunnels, their pods and acknowledgements; `tunnel_cgroups`: where
//!   they run
//! * `tunnel_changes`: tunnels come and go
//! * `zds_server`: ZDS, the protocol by which tunnels get their pods
//! * [`journal`]: what was changed outside the maps, on disk; [`restore`]: undoing it after a crash;
//!   [`removal`]: undoing everything at the end

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use adit_ebpf_common::enrolment::{NetnsInfo, flag};
use adit_ebpf_loader::{Kernel, KernelError};
use error_reporter::Report;
use tracing::{debug, error, warn};

use crate::{
    observe::{
        cgroups::{self, CgroupId},
        connections::Connection,
        netns::Visitors,
    },
    plan::{
        Plan, Reason, ReasonCode,
        diff::{self, Applied, ApplyStep, DiffScope, MapWrite, TunnelStep},
    },
};

use self::{
    app_listeners::{AppListeners, OnReservedPorts},
    clear_audit::{Audited, ClearAudit},
    draining::DrainingNetns,
    in_clear::PodSockets,
    journal::Journal,
    kubelet::KubeletCgroup,
    maps::AppliedMaps,
    netns::{NetnsReport, NetnsTools, SteeredNetns},
    new_pods::NewPods,
    pinned_sweep::PinnedSweep,
    settings::KernelSettings,
    tunnel_cgroups::UnusedTunnelCgroups,
    tunnels::Tunnels,
};

pub(crate) mod app_listeners;
pub(crate) mod boot;
pub(crate) mod clear_audit;
pub(crate) mod draining;
pub(crate) mod exclusion_lists;
pub(crate) mod in_clear;
pub(crate) mod istio_rules;
pub mod journal;
pub(crate) mod kubelet;
pub(crate) mod maps;
pub(crate) mod netns;
pub(crate) mod netns_setup;
pub(crate) mod new_pods;
mod pinned_sweep;
pub mod removal;
pub mod restore;
pub(crate) mod settings;
pub(crate) mod tunnel_cgroups;
mod tunnel_changes;
pub(crate) mod tunnels;
pub(crate) mod zds_server;

/// Open netns, by cookie.
pub type OpenNetns = BTreeMap<u64, Arc<OwnedFd>>;

/// Everything that is applied, and the means to change it. Its parts know nothing of each other;
/// what one gives to the next passes through here.
#[derive(Debug)]
pub struct Applier {
    /// The loaded programs and maps.
    pub kernel: Kernel,
    /// What the maps hold.
    pub(crate) maps: AppliedMaps,
    /// The programs' settings.
    pub(crate) settings: KernelSettings,
    /// Netns of enrolled pods.
    pub(crate) netns: SteeredNetns,
    /// Netns of pods that left.
    pub(crate) draining: DrainingNetns,
    /// Ports that applications listen on.
    pub(crate) app_listeners: AppListeners,
    /// Connected tunnels.
    pub(crate) tunnels: Tunnels,
    unused_tunnel_cgroups: UnusedTunnelCgroups,
    kubelet: KubeletCgroup,
    new_pods: NewPods,
    pinned_sweep: PinnedSweep,
    clear_audit: ClearAudit,
    journal: Journal,
    visitors: Arc<Visitors>,
    /// What the node as a whole lacks, as sentences.
    problems: Vec<String>,
    /// Whether connections were to be cut, and the kernel cannot.
    cannot_cut: bool,
    /// What listings of listeners have found on the tunnel's ports.
    on_reserved_ports: OnReservedPorts,
}

/// What [`Applier::apply`] led to for single pods, by uid.
#[derive(Debug, Default)]
pub struct ApplyReport {
    /// Their netns are steered now.
    pub steered: Vec<String>,
    /// What could not be done, and is tried again.
    pub failed: Vec<(String, Reason)>,
}

impl Applier {
    /// Takes over what the maps, links and `journal` hold.
    ///
    /// # Errors
    /// What is there cannot be read, with what was tried.
    pub(crate) fn adopt(
        mut kernel: Kernel,
        settings: KernelSettings,
        journal: Journal,
        visitors: Arc<Visitors>,
        pods_cgroup: PathBuf,
        kubelet: KubeletCgroup,
    ) -> Result<Self, (&'static str, KernelError)> {
        let maps = AppliedMaps::adopt(&mut kernel).map_err(|error| ("take over the maps", error))?;
        let linked = kernel.steered().map_err(|error| ("list the netns links", error))?;
        let mut draining = DrainingNetns::default();
        Ok(Self {
            maps,
            settings,
            netns: SteeredNetns::adopt(&journal, &linked, &mut draining),
            draining,
            app_listeners: AppListeners::default(),
            tunnels: Tunnels::default(),
            unused_tunnel_cgroups: UnusedTunnelCgroups::due_at(Instant::now()),
            kubelet,
            new_pods: NewPods::new(pods_cgroup),
            pinned_sweep: PinnedSweep::default(),
            clear_audit: ClearAudit::default(),
            kernel,
            journal,
            visitors,
            problems: Vec::new(),
            cannot_cut: false,
            on_reserved_ports: OnReservedPorts::new(),
        })
    }

    /// Replaces the programs of an earlier build on tunnels that it left, which go on to serve until
    /// they connect. To be called before the pods' programs are attached, whose redirects an
    /// earlier build may not understand.
    pub(crate) fn update_tunnel_programs(&mut self) {
        for (id, dir) in self.journal.tunnels() {
            // A cgroup that is gone has no sockets, and another one at its path is not the tunnel's.
            if cgroups::id(dir).is_ok_and(|found| found == *id)
                && let Err(error) = self.kernel.attach_tunnel(dir)
            {
                let (cgroup, error) = (dir.display(), Report::new(&error));
                warn!(%cgroup, %error, "cannot update the programs of a tunnel");
            }
        }
    }

    /// What could not be done for the node as a whole by the last [`Self::apply`].
    #[must_use]
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// What no step of a plan changes, as sentences.
    pub(crate) fn lasting_problems(&self) -> impl Iterator<Item = String> {
        const NOT_FILLED: &str = "the programs of another version decide, by what its watcher wrote last, until the source has named all pods";
        const NOT_CUT: &str = "pods keep connections that they made in clear before the first watcher ran: the kernel cannot cut them (CONFIG_INET_DIAG_DESTROY); restart these pods";
        let not_filled = self.kernel.must_be_filled().then_some(NOT_FILLED);
        let late = self.kernel.closes_late().map(|why| {
            format!(
                "new pods are closed a moment after their cgroups were made: {why}; see `watcher preflight`"
            )
        });
        let always = not_filled.into_iter().chain(self.cannot_cut.then_some(NOT_CUT)).map(str::to_owned);
        always.chain(late).chain(self.kubelet.problem())
    }

    /// The kernel cannot cut connections.
    pub(crate) fn note_that_nothing_can_be_cut(&mut self) {
        if !std::mem::replace(&mut self.cannot_cut, true) {
            warn!(advice = "restart the pods", "the kernel cannot cut connections that pods made in clear");
        }
    }

    /// Threads that enter netns.
    pub(crate) fn visitors(&self) -> &Visitors {
        &self.visitors
    }

    /// Whether a tunnel serves the pod `uid` in the netns `cookie`.
    #[must_use]
    pub fn is_served(&self, uid: &str, cookie: u64) -> bool {
        self.tunnels.workloads().get(uid).is_some_and(|workload| workload.cookie == cookie)
            && self.tunnels.serve(uid)
    }

    /// The cookie of the netns that `uid` is enrolled with, maybe by an earlier run.
    #[must_use]
    pub fn enrolled_netns(&self, uid: &str) -> Option<u64> {
        let offered = self.tunnels.workloads().get(uid).map(|workload| workload.cookie);
        offered.or_else(|| self.netns.of_pod(uid))
    }

    /// Brings what is applied to `plan`, within `scope`. `opened` has netns that are open already.
    pub(crate) fn apply(&mut self, scope: DiffScope<'_>, plan: &Plan, opened: &OpenNetns) -> ApplyReport {
        let (plan, refused) = self.maps.add_exclusions(&mut self.kernel, plan);
        let plan = &*plan;
        self.new_pods.prepare(&mut self.kernel, plan);
        let applied = Applied {
            maps: self.maps.contents(),
            netns: self.netns.by_cookie(),
            workloads: self.tunnels.workloads(),
        };
        let steps = diff::steps(&applied, scope, plan);
        let (mut report, mut ready, mut problems) = (ApplyReport::default(), OpenNetns::new(), Vec::new());
        report.failed.extend(refused);
        for step in steps {
            debug!(?step, "step");
            let result = match &step {
                // Its netns could not be steered, which is tried again: until then it stays closed.
                ApplyStep::Map(MapWrite::SetCgroup(_, info))
                    if info.netns_cookie != 0 && !self.netns.is_steered(info.netns_cookie) =>
                {
                    Ok(())
                }
                ApplyStep::Map(write) => {
                    self.forget_what_was_in_clear(write);
                    self.maps.apply(&mut self.kernel, write)
                }
                ApplyStep::Netns(step) => {
                    let mut tools = NetnsTools {
                        kernel: &mut self.kernel,
                        journal: &mut self.journal,
                        visitors: &self.visitors,
                        draining: &mut self.draining,
                        app_listeners: &mut self.app_listeners,
                        opened,
                    };
                    self.netns.apply(step, &mut tools).map(|done: NetnsReport| {
                        ready.extend(done.ready);
                        report.steered.extend(done.steered);
                        report.failed.extend(done.failed);
                    })
                }
                ApplyStep::Tunnel(step) => {
                    self.apply_to_tunnels(step, &ready);
                    Ok(())
                }
            };
            if let Err(error) = result {
                // What can be said of a pod is tried again for that pod alone.
                if let ApplyStep::Map(write) = &step
                    && let Some(uid) = write.pod(plan)
                {
                    let text = format!("cannot write an entry of the pod: {}", Report::new(&error));
                    report.failed.push((uid.to_owned(), Reason::new(ReasonCode::NotInMaps, text)));
                    continue;
                }
                problems.push(format!("{step:?}: {}", Report::new(&error)));
            }
        }
        for problem in &problems {
            if !self.problems.contains(problem) {
                error!(problem, "a step failed; trying again");
            }
        }
        self.problems = problems;
        report
    }

    fn apply_to_tunnels(&mut self, step: &TunnelStep, ready: &OpenNetns) {
        // Without its netns in order the pod stays closed; its netns is tried again.
        if let TunnelStep::Offer(_, workload) = step
            && !self.netns.is_prepared(workload.cookie)
        {
            return;
        }
        if let Some((cookie, pending)) = self.tunnels.apply(step, ready)
            && let Some(netns) = self.netns.by_cookie().get(&cookie)
        {
            self.draining.withdraw(cookie, netns.clone(), pending);
        }
    }

    /// Reads back what the maps and links hold, so that the next comparison repairs what others
    /// changed. Whether something differed.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read_back(&mut self) -> Result<bool, KernelError> {
        let linked = self.kernel.steered()?;
        let maps_differ = self.maps.read_back(&self.kernel)?;
        Ok(self.netns.read_back(&mut self.kernel, linked) || maps_differ)
    }

    /// What is due by time: offers, listings of sockets, netns that drain.
    pub fn do_due(&mut self, now: Instant) {
        let tunnels = &self.tunnels;
        let (kernel, steered) = (&mut self.kernel, self.netns.by_cookie());
        let found =
            self.app_listeners.list_new(kernel, &self.visitors, steered, |uid| tunnels.serve(uid), now);
        self.on_reserved_ports.extend(found);
        self.draining.settle(kernel, &mut self.journal);
        self.new_pods.settle(kernel, self.maps.contents(), now);
        self.kubelet.check(kernel, now);
    }

    /// When [`Self::do_due`] or a retry has something to do next.
    #[must_use]
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        let unused = self.unused_tunnel_cgroups.next_check().map(|at| at.max(now));
        [
            self.tunnels.next_retry(),
            self.draining.next_check(now),
            self.app_listeners.due(),
            self.new_pods.due(),
            self.kubelet.next_check(),
            unused,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Removes what stays of netns that are gone, once in a while.
    pub fn sweep(&mut self, now: Instant) {
        self.pinned_sweep.sweep(&mut self.kernel, &self.journal, now);
    }

    /// Those of `netns` whose connections are looked at next.
    pub(crate) fn next_to_audit(&mut self, netns: &BTreeSet<u64>) -> Vec<u64> {
        self.clear_audit.next_of(netns)
    }

    /// How many connections `pods` have made since the last look that no tunnel carries.
    pub(crate) fn audit(&mut self, pods: &[PodSockets], tunnels: &BTreeSet<CgroupId>) -> Audited {
        let kernel = &self.kernel;
        let is_kubelets = |connection: &Connection| {
            // As its opener sees it.
            kernel.is_of_kubelet(connection.remote, connection.local).unwrap_or(true)
        };
        self.clear_audit.look(&self.visitors, pods, tunnels, is_kubelets)
    }

    /// What a pod has in clear may be right where another rule held for it until now.
    fn forget_what_was_in_clear(&mut self, write: &MapWrite) {
        const PASSES: u32 = flag::IN_MESH | flag::FAIL_OPEN | flag::SIDECAR;
        let (cookie, info) = match write {
            MapWrite::SetArrivals(cookie, info) => (cookie, Some(info)),
            MapWrite::RemoveArrivals(cookie) => (cookie, None),
            _ => return,
        };
        let rule = |info: &NetnsInfo| (info.flags & PASSES, info.exclusion_id);
        if self.maps.contents().arrivals.get(cookie).map(rule) != info.map(rule) {
            self.clear_audit.forget(*cookie);
        }
    }

    /// Compares the recorded listening ports with the kernel's list, for the netns in `opened`.
    pub fn scan_app_listeners(&mut self, opened: &OpenNetns) {
        let found = app_listeners::scan(&mut self.kernel, &self.visitors, self.netns.by_cookie(), opened);
        self.on_reserved_ports.extend(found);
    }

    /// What listens on the tunnel's ports, of the netns whose listeners were listed since the last call.
    pub(crate) fn take_on_reserved_ports(&mut self) -> OnReservedPorts {
        std::mem::take(&mut self.on_reserved_ports)
    }
}
