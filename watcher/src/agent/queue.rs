//! What has to be done, and for which pods.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// When everything is compared again after a step failed.
const RESYNC_PAUSE: Duration = Duration::from_secs(1);

/// The pods that wait for an observation, a comparison with what is applied, or a report, by uid.
#[derive(Debug)]
pub(super) struct Queue {
    observe: BTreeSet<String>,
    reconcile: BTreeSet<String>,
    report: BTreeSet<String>,
    /// Everything is compared.
    all: bool,
    /// When everything is compared again, since something could not be done.
    resync_at: Option<Instant>,
    /// Everything is observed.
    scan: bool,
    /// Pods may have cgroups in other directories than before.
    dirs_changed: bool,
}

/// What is compared with what is applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Every pod, and what belongs to none.
    All,
    /// These pods.
    Pods(BTreeSet<String>),
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            observe: BTreeSet::new(),
            reconcile: BTreeSet::new(),
            report: BTreeSet::new(),
            all: false,
            resync_at: None,
            scan: false,
            // Of none that is watched so far.
            dirs_changed: true,
        }
    }
}

impl Queue {
    /// Pods to be observed, then compared.
    pub(super) fn observe(&mut self, uids: impl IntoIterator<Item = String>) {
        self.observe.extend(uids);
    }

    /// Pods to be compared.
    pub(super) fn reconcile(&mut self, uids: impl IntoIterator<Item = String>) {
        self.reconcile.extend(uids);
    }

    /// Everything is to be compared.
    pub(super) fn reconcile_all(&mut self) {
        self.all = true;
    }

    /// Everything is to be observed.
    pub(super) fn scan(&mut self) {
        self.scan = true;
    }

    /// The pods `uids` were compared: their states are to be reported. `failed`: not everything
    /// could be done, so that everything is compared again soon.
    pub(super) fn applied(&mut self, uids: &mut BTreeSet<String>, failed: bool, now: Instant) {
        self.report.append(uids);
        self.resync_at = failed.then(|| now + RESYNC_PAUSE);
        self.dirs_changed = true;
    }

    /// Whether all that was queued so far was observed, and everything compared.
    pub(super) fn is_idle(&self) -> bool {
        !self.all && self.observe.is_empty()
    }

    /// The pods to be observed now.
    pub(super) fn take_observations(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.observe)
    }

    /// What is to be compared now, if anything is.
    pub(super) fn take_work(&mut self, now: Instant) -> Option<Work> {
        let all = std::mem::take(&mut self.all) || self.resync_at.is_some_and(|at| at <= now);
        let mut uids = std::mem::take(&mut self.reconcile);
        if all {
            // Pods that are gone are not among all pods, and have to be reported too.
            self.report.append(&mut uids);
            return Some(Work::All);
        }
        (!uids.is_empty()).then_some(Work::Pods(uids))
    }

    /// The pods whose states are to be reported now.
    pub(super) fn take_reports(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.report)
    }

    /// Whether everything is to be observed now.
    pub(super) fn take_scan(&mut self) -> bool {
        std::mem::take(&mut self.scan)
    }

    /// Whether pods may have cgroups in other directories than before.
    pub(super) fn take_dirs_changed(&mut self) -> bool {
        std::mem::take(&mut self.dirs_changed)
    }

    /// When everything is compared again.
    pub(super) fn resync_at(&self) -> Option<Instant> {
        self.resync_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_has_everything_compared_again_after_a_pause() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.reconcile(["a".to_owned()]);
        assert_eq!(queue.take_work(now), Some(Work::Pods(["a".to_owned()].into())));
        assert_eq!(queue.take_work(now), None);
        queue.applied(&mut ["a".to_owned()].into(), true, now);
        assert_eq!(queue.take_reports(), ["a".to_owned()].into());
        assert_eq!(queue.take_work(now), None);
        assert_eq!(queue.take_work(now + RESYNC_PAUSE), Some(Work::All));
        queue.applied(&mut BTreeSet::new(), false, now);
        assert_eq!(queue.resync_at(), None);
        queue.reconcile_all();
        queue.reconcile(["gone".to_owned()]);
        assert!(!queue.is_idle());
        assert_eq!(queue.take_work(now), Some(Work::All));
        assert!(queue.is_idle());
        assert_eq!(queue.take_reports(), ["gone".to_owned()].into());
    }
}
