//! Answers to commands that only read.

use std::net::SocketAddr;

use adit_ebpf_common::verdicts::ELSEWHERE;

use crate::{
    apply::Applier,
    control::{
        Caller,
        answers::{self, explanation, pod_status, rejected_status},
        explain::Explanation,
        status::{PodStatus, Status},
    },
    observe::user_ns::IdMaps,
};

use super::{config::AgentConfig, planning, pod_entry::PodEntry, pods::PodTable, reporter::Reporter};

/// The owners that answers are read from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Commands<'a> {
    /// What the watcher is configured to do.
    pub config: &'a AgentConfig,
    /// The pods.
    pub pods: &'a PodTable,
    /// What is applied.
    pub applier: &'a Applier,
    /// The state of source and events.
    pub reporter: &'a Reporter,
    /// Whether every pod has been observed.
    pub ready: bool,
}

impl Commands<'_> {
    /// For `watcher status`.
    pub(super) fn status(&self) -> Status {
        let Self { config, pods, applier, reporter, ready } = *self;
        let pod = |entry: &PodEntry| {
            let state = planning::state_of(entry, applier, config);
            let cookie = entry.view.eligibility.facts().map(|facts| facts.cookie);
            PodStatus {
                not_observed: entry.doubt.clone(),
                reserved_ports: entry.ports.using.clone(),
                verdicts: cookie.map(|cookie| answers::verdicts(applier, cookie)).unwrap_or_default(),
                ..pod_status(&entry.view, state, config.fail_mode)
            }
        };
        let rejected = pods.rejected().iter();
        Status {
            node: config.node.clone(),
            pid: std::process::id(),
            attached: config.attach.clone(),
            fail_mode: config.fail_mode,
            source: reporter.source_status(pods.is_synced()),
            events: reporter.events_status(),
            ready,
            tunnels: answers::tunnels(applier),
            rejected_tunnel: applier.tunnels.rejected().cloned(),
            pods: (pods.in_order().into_iter().map(pod))
                .chain(rejected.map(|rejected| rejected_status(&rejected.entry, &rejected.reason)))
                .collect(),
            other_verdicts: answers::verdicts(applier, ELSEWHERE),
            draining: answers::draining(applier),
            problems: applier.problems().iter().cloned().chain(applier.lasting_problems()).collect(),
        }
    }

    /// For `watcher explain`; `pod` is a uid, name or namespace/name.
    ///
    /// # Errors
    /// No pod is called so, or several are, it has no such container or user, or a map cannot be read: a
    /// sentence for the user.
    pub(super) fn explain(
        &self,
        pod: &str,
        caller: &Caller,
        destination: SocketAddr,
    ) -> Result<Explanation, String> {
        let view = answers::find(self.pods.views(), pod)?;
        let entry = self.pods.get(&view.pod.uid).ok_or("the pod is gone")?;
        let here = |what: &str, id: Option<u32>, number: fn(&IdMaps, u32) -> Option<u32>| {
            let Some(id) = id else { return Ok(None) };
            // Without guards nobody asks how the pod numbers them, nor does the number matter.
            let Some(maps) = &entry.id_maps else { return Ok(Some(id)) };
            number(maps, id).map(Some).ok_or_else(|| format!("the pod has no {what} {id}"))
        };
        let ids = [here("user", caller.uid, IdMaps::user)?, here("group", caller.gid, IdMaps::group)?];
        explanation(view, self.pods.views(), caller.container.as_deref(), ids, destination, self.applier)
    }
}
