//! Pods that ran before the first watcher did: what they have in clear is cut when they are
//! enrolled.

use std::{collections::BTreeSet, sync::Arc};

use tracing::warn;

use crate::{
    apply::{
        boot::{self, BootPod, NotCut},
        netns,
    },
    model::pod::FailMode,
    observe::cgroups::CgroupId,
};

use super::{Agent, pod_entry::UntilFound};

/// What a watcher found attached when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Programs that use its own maps.
    OwnMaps,
    /// Programs that use other maps: nobody can say how they treated a pod.
    OtherMaps,
    /// Nothing, as after a boot: nobody closed any pod.
    Nothing,
}

impl Agent {
    /// Cuts what those of `uids` have in clear that should have been closed since they began. They
    /// are in the mesh by now, or closed. Not of a pod that is open without a tunnel: it chose
    /// that.
    pub(super) fn cut_clear(&mut self, uids: impl IntoIterator<Item = String>) {
        let (mut pods, mut done) = (Vec::new(), Vec::new());
        for uid in uids {
            let Some(entry) = self.pods.get(&uid).filter(|entry| entry.until_found == UntilFound::NotClosed)
            else {
                continue;
            };
            let view = &entry.view;
            if view.pod.fail_mode.unwrap_or(self.config.fail_mode) == FailMode::Open {
                done.push(uid);
                continue;
            }
            let cookie = view.eligibility.facts().map(|facts| facts.cookie);
            let steered =
                cookie.and_then(|cookie| Some((cookie, self.applier.netns.by_cookie().get(&cookie)?)));
            // Until its entries are written, what is cut could be made again.
            let Some((cookie, netns)) = steered.filter(|_| entry.problem.is_none()) else { continue };
            match netns::open_netns(cookie, netns, self.observer.opened()) {
                Ok(fd) => pods.push(BootPod {
                    uid,
                    netns: fd,
                    exclusions: Arc::clone(&view.pod.exclusions),
                    cgroups: view.observed.cgroups.values().copied().collect(),
                }),
                Err(error) => warn!(uid, %error, "cannot look for connections that the pod made in clear"),
            }
        }
        if !pods.is_empty() {
            let tunnels: BTreeSet<CgroupId> =
                self.applier.tunnel_cgroups().union(self.kept.tunnels()).copied().collect();
            let results = boot::cut(self.applier.visitors(), &pods, &tunnels);
            for (BootPod { uid, .. }, result) in pods.into_iter().zip(results) {
                match result {
                    Ok(count) => {
                        self.reporter.connections_cut(count);
                        done.push(uid);
                    }
                    Err(NotCut::Unsupported) => {
                        self.applier.note_that_nothing_can_be_cut();
                        done.push(uid);
                    }
                    // Its next observation leads here again.
                    Err(NotCut::Failed) => {}
                }
            }
        }
        for uid in done {
            if let Some(entry) = self.pods.get_mut(&uid) {
                entry.until_found = UntilFound::Closed;
            }
        }
    }
}
