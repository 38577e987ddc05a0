//! What happens when something arrives: an update of the source, an event of the kernel, a message
//! of a tunnel. Each handler marks what it is about; the loop does the rest.

use std::{path::Path, sync::Arc, time::Instant};

use error_reporter::Report;
use tracing::{info, warn};

use crate::{
    apply::{Applier, tunnels::LostTunnel, zds_server::ZdsEvent},
    model::pod::{PodIdentity, Update},
    observe::{
        cgroup_path,
        cgroups::{self, CgroupId},
        events::{self, Event, EventSource},
    },
    plan::PodPlan,
};

use super::{Agent, boot::Found, pod_entry::UntilFound};

/// How many events are received before they are acted on.
const EVENT_BATCH: usize = 4096;

impl Agent {
    /// The source sent an update.
    pub(super) fn on_update(&mut self, update: Update) {
        let first = !self.pods.is_synced() && matches!(update, Update::All(_));
        if first {
            // What an earlier run left and no pod needs is found only by comparing everything.
            self.queue.reconcile_all();
            self.kept.begin(Instant::now());
        }
        self.reporter.source_update(&update, first);
        self.queue.observe(self.pods.apply_update(update, Instant::now()));
        if first {
            self.pods.set_until_found(match self.found {
                Found::OwnMaps => UntilFound::AsItWas,
                Found::OtherMaps => UntilFound::Closed,
                Found::Nothing => UntilFound::NotClosed,
            });
        }
        if first && self.pods.keeps_running() {
            self.keep_lost();
        }
    }

    /// Has those pods observed that an earlier watcher enrolled, that the source does not name, and
    /// whose processes run.
    fn keep_lost(&mut self) {
        let enrolled = self.applier.netns.by_cookie().iter();
        let lost: Vec<(u64, String, Option<PodIdentity>)> = enrolled
            .filter(|(_, netns)| !netns.uid.is_empty() && self.pods.get(&netns.uid).is_none())
            .map(|(cookie, netns)| (*cookie, netns.uid.clone(), netns.pod.clone()))
            .collect();
        if lost.is_empty() {
            return;
        }
        self.observer.find_dirs();
        for (cookie, uid, pod) in lost {
            let dir = self.observer.dir(&uid).filter(|dir| !matches!(cgroups::is_populated(dir), Ok(false)));
            if let Some(dir) = dir.cloned() {
                // Nobody else knows them any more.
                let exclusions = self.applier.maps.exclusions_in(cookie);
                self.pods.add_lost(&uid, pod, exclusions, dir, Instant::now());
                self.queue.observe([uid]);
            }
        }
    }

    /// Takes in what has happened by now.
    pub(super) fn on_ready_events(&mut self, events: &mut dyn EventSource) {
        for _ in 0..EVENT_BATCH {
            let Some(event) = events::ready(events) else { break };
            self.on_event(event);
        }
    }

    /// Something happened in a cgroup.
    pub(super) fn on_event(&mut self, event: Event) {
        self.reporter.event();
        match event {
            Event::Cgroup { path, closed } => {
                if let Some(id) = closed {
                    self.on_closed(id, &path);
                }
                self.queue.observe(self.observer.pods_at(&path, &self.pods));
            }
            Event::Process { cgroup_id } => {
                if let Some(entry) = self.pods.by_cgroup_mut(cgroup_id)
                    && entry.process_started(Instant::now())
                {
                    self.queue.observe([entry.view.pod.uid.clone()]);
                }
            }
            Event::WantsPort { cgroup_id } => self.on_port_wanted(cgroup_id),
            Event::Lost(count) => {
                self.reporter.events_lost(count);
                self.queue.scan();
            }
        }
    }

    /// The programs closed a cgroup. Whether its entry stays is decided when its pod is compared.
    fn on_closed(&mut self, id: CgroupId, path: &Path) {
        let Applier { maps, kernel, .. } = &mut self.applier;
        if let Some(info) = maps.record_closed(kernel, id) {
            self.pods.add_stray(PodPlan { cgroups: [(id, info)].into(), ..PodPlan::default() });
            let pod_path = cgroup_path::resolve(path, &self.config.attach);
            self.queue.reconcile(pod_path.map(|found| found.uid));
        }
    }

    /// Something happened on a tunnel's connection.
    pub(super) fn on_tunnel(&mut self, event: ZdsEvent) {
        match event {
            ZdsEvent::Hello { conn, pid, admission } => {
                let pod_at = |dir: &Path| self.pods.owner(dir).map(|entry| Arc::clone(&entry.view.pod));
                self.early.forget();
                if self.applier.admit_tunnel(conn, pid, admission, &self.layout, pod_at) {
                    self.queue.reconcile_all();
                }
            }
            ZdsEvent::Added { conn, offer, error } => {
                if error.is_some()
                    && let Some(entry) = self.pods.get_mut(&offer.uid)
                {
                    entry.grace_until = None;
                    // Often an application has one of the tunnel's ports.
                    entry.ports.look_soon(Instant::now());
                } else if let Some(entry) = self.pods.get_mut(&offer.uid)
                    && !entry.ports.using.is_empty()
                {
                    entry.ports.look_soon(Instant::now());
                }
                if error.is_none() && self.found == Found::Nothing {
                    self.early.acknowledged(&offer.uid);
                }
                self.applier.tunnels.acknowledge(conn, &offer, error);
                self.queue.reconcile([offer.uid]);
            }
            ZdsEvent::Withdrawn { conn, serial } => self.applier.draining.acknowledge(conn, serial),
            // From here on its acknowledgements say which pods are served.
            ZdsEvent::SnapshotTaken => {
                self.kept.end();
                self.applier.check_unused_tunnels();
                self.queue.reconcile_all();
            }
            ZdsEvent::Gone { conn, reason } => {
                if let Some(lost) = self.applier.remove_tunnel(conn, &reason) {
                    self.keep_served(lost);
                }
            }
        }
    }

    /// The connection of a tunnel ended. Pods that it served stay open as long as its listeners are
    /// there, for a while.
    fn keep_served(&mut self, lost: LostTunnel) {
        let now = Instant::now();
        let LostTunnel { cgroup_id, mut served } = lost;
        match self.applier.kernel.tunnel_netns() {
            Ok(live) => served.retain(|cookie| live.contains(cookie)),
            // What cannot be read is not known to be gone.
            Err(error) => warn!(error = %Report::new(&error), "cannot list the tunnels' listeners"),
        }
        if !served.is_empty() {
            info!(
                pods = served.len(),
                "the tunnel's listeners are open; its pods stay so until it reconnects"
            );
            self.kept.add(served, cgroup_id, now);
            // Before the source's first update the grace period does not run.
            if self.pods.is_synced() {
                self.kept.begin(now);
            }
        }
        if self.applier.tunnels.is_empty() {
            if self.kept.is_empty() {
                self.applier.without_tunnel();
            }
            self.pods.end_all_grace_periods();
        }
        self.queue.reconcile_all();
    }

    /// Looks whether the listeners of tunnels that are not connected are still there.
    pub(super) fn check_kept(&mut self, now: Instant) {
        if self.kept.next_check().is_none_or(|at| at > now) {
            return;
        }
        let live = match self.applier.kernel.tunnel_netns() {
            Ok(live) => live,
            Err(error) => {
                warn!(error = %Report::new(&error), "cannot list the tunnels' listeners");
                self.kept.check_later(now);
                return;
            }
        };
        if self.kept.keep_live(&live, now) {
            if self.kept.is_empty() && self.applier.tunnels.is_empty() {
                self.applier.without_tunnel();
            }
            self.queue.reconcile_all();
        }
    }
}
