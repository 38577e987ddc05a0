//! One turn of the loop: everything that is due is read back, observed, planned and applied.

use std::{collections::BTreeSet, time::Instant};

use error_reporter::Report;
use tracing::{info, warn};

use crate::{observe::cgroups::CgroupId, plan::diff::DiffScope};

use super::{
    Agent,
    error::AgentError,
    planning::{self, Planned},
    queue::Work,
    startup,
};

impl Agent {
    /// Does everything that is due. `scan`: observes every pod, and reads back what is applied.
    pub(super) fn reconcile(&mut self, scan: bool) {
        if scan {
            // First: what is repaired afterwards may be how something passed.
            self.audit();
            self.read_back();
        }
        self.observe(scan);
        if scan {
            self.applier.scan_app_listeners(self.observer.opened());
            self.applier.sweep(Instant::now());
        }
        let now = Instant::now();
        self.check_reserved_ports(now);
        self.check_kept(now);
        self.check_early_listeners();
        if self.pods.is_synced() && self.kept.end_if_over(now) {
            self.applier.end_kept();
            self.applier.check_unused_tunnels();
            self.queue.reconcile_all();
        }
        if self.applier.detach_unused_tunnels(self.kept.tunnels(), now) {
            self.queue.reconcile_all();
        }
        self.queue.reconcile(self.pods.end_grace_periods(now));
        self.queue.reconcile(self.pods.left(now));
        self.applier.tunnels.retry(now);
        // Before the source has named all pods nothing is known: what an earlier run left stays.
        // Nor does anything follow for what it enrolled and could not be observed since.
        if self.pods.is_synced()
            && !self.awaits_adopted()
            && let Some(work) = self.queue.take_work(now)
        {
            self.apply(&work, now);
        }
        let followed = self.routes.set(self.pods.iter(), self.observer.opened());
        for uid in followed {
            if let Some(entry) = self.pods.get_mut(&uid) {
                entry.next_observation = Some(now);
            }
        }
        self.observer.close_netns();
        self.applier.do_due(now);
        self.tracer.update(&self.pods.views(), &mut self.applier);
        if self.is_ready() {
            self.applier.tunnels.send_snapshots();
        }
    }

    /// Has this version's programs decide as soon as the maps hold everything. Until then those of
    /// another version do, with their own maps.
    ///
    /// # Errors
    /// The kernel refused.
    pub(super) fn take_over(&mut self) -> Result<(), AgentError> {
        // What cannot be done for one pod must not leave the others to programs that know no news.
        let is_filled = self.is_ready() && self.queue.resync_at().is_none();
        let is_overdue = self.pods.is_synced() && self.kept.ends_at().is_none();
        if self.applier.kernel.must_be_filled() && (is_filled || is_overdue) {
            startup::attach(&mut self.applier, &self.config)?;
            info!("this version's maps are filled, and its programs decide");
        }
        Ok(())
    }

    /// Makes links again that somebody removed.
    fn attach_again(&mut self) {
        let Self { applier, config, .. } = self;
        if applier.kernel.must_be_filled() {
            return;
        }
        match applier.kernel.attach_pods(&config.attach) {
            Ok(false) => {}
            Ok(true) => {
                warn!(cgroup = %config.attach.display(), "another program removed links of ours; they are made again");
                self.reporter.corrected();
            }
            Err(error) => warn!(error = %Report::new(&error), "cannot attach the pods' programs again"),
        }
    }

    fn read_back(&mut self) {
        self.attach_again();
        match self.applier.read_back() {
            Ok(differs) => {
                if differs {
                    self.reporter.corrected();
                }
                self.queue.reconcile_all();
            }
            Err(error) => warn!(error = %Report::new(&error), "cannot read the maps back"),
        }
    }

    /// Observes the pods that are due, or all, and evaluates them.
    fn observe(&mut self, scan: bool) {
        let now = Instant::now();
        let mut uids = self.queue.take_observations();
        uids.extend(self.pods.due(now));
        if scan {
            uids.extend(self.pods.uids());
            self.observer.find_dirs();
        }
        self.pods.forget_ended(&uids);
        let uids = self.pods.within_budget(uids, now);
        if uids.is_empty() {
            return;
        }
        let enrolled = |uid: &str| self.applier.enrolled_netns(uid);
        let evaluated = self.observer.evaluate(&mut self.pods, &uids, enrolled, now);
        for (uid, before, found) in evaluated.changed.iter().filter(|_| scan) {
            self.reporter.correction(uid, before, found);
        }
        self.queue.reconcile(uids);
        self.queue.reconcile(evaluated.uids);
    }

    /// Plans pods, and applies the difference.
    fn apply(&mut self, work: &Work, now: Instant) {
        let mut uids = match work {
            Work::All => self.pods.uids(),
            Work::Pods(uids) => uids.clone(),
        };
        let Planned { plan, before } =
            planning::plan_pods(&uids, &mut self.pods, &self.applier, &self.kept, &self.config, now);
        let tunnels: BTreeSet<CgroupId> =
            self.applier.tunnel_cgroups().union(self.kept.tunnels()).copied().collect();
        let lists = self.pods.planned_lists();
        let scope = match work {
            Work::All => DiffScope::All { tunnels: &tunnels },
            Work::Pods(_) => DiffScope::Pods { before: &before, lists: &lists },
        };
        let report = self.applier.apply(scope, &plan, self.observer.opened());
        for uid in report.steered {
            self.pods.clear_problem(&uid);
        }
        for uid in plan.keys().filter(|uid| report.failed.iter().all(|(failed, _)| failed != *uid)) {
            self.pods.clear_map_problem(uid);
        }
        for (uid, reason) in report.failed {
            self.pods.set_problem(&uid, reason, now);
        }
        self.cut_clear(uids.iter().cloned());
        self.queue.applied(&mut uids, !self.applier.problems().is_empty(), now);
    }
}
