//! Looks at the connections of pods that should have none in clear, a few pods with each scan.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    apply::netns,
    model::{pod::FailMode, state::State},
    observe::cgroups::CgroupId,
};

use super::Agent;

impl Agent {
    /// Counts connections in clear of some of the pods that a tunnel serves and that fail closed. What
    /// the others have may have been made while no tunnel served them.
    pub(super) fn audit(&mut self) {
        let config = &self.config;
        let audited = self.pods.iter().filter(|entry| {
            let mode = entry.view.pod.fail_mode.unwrap_or(config.fail_mode);
            entry.state == Some(State::Open) && mode == FailMode::Closed && !entry.object_gone
        });
        let audited = audited.filter_map(|entry| Some((entry.view.eligibility.facts()?.cookie, entry)));
        let audited: BTreeMap<u64, _> = audited.collect();
        let all: BTreeSet<u64> = audited.keys().copied().collect();
        let mut pods = Vec::new();
        for cookie in self.applier.next_to_audit(&all) {
            let steered = self.applier.netns.by_cookie().get(&cookie);
            let (Some(entry), Some(steered)) = (audited.get(&cookie), steered) else { continue };
            // One that ends just now has its turn never, and one that cannot be opened the next time.
            let Ok(fd) = netns::open_netns(cookie, steered, self.observer.opened()) else { continue };
            pods.push(entry.sockets(cookie, fd));
        }
        let tunnels: BTreeSet<CgroupId> =
            self.applier.tunnel_cgroups().union(self.kept.tunnels()).copied().collect();
        let found = self.applier.audit(&pods, &tunnels);
        self.reporter.connections_in_clear(found);
    }
}
