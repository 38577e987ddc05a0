//! Answers to commands that only read.

use std::net::SocketAddr;

use adit_ebpf_common::verdicts::ELSEWHERE;
use error_reporter::Report;

use crate::{
    apply::Applier,
    control::{
        answers::{self, explanation, pod_status, rejected_status},
        explain::Explanation,
        status::{PodStatus, Status},
    },
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
    /// No pod is called so, or several are, or a map cannot be read: a sentence for the user.
    pub(super) fn explain(&self, pod: &str, destination: SocketAddr) -> Result<Explanation, String> {
        let view = answers::find(self.pods.views(), pod)?;
        explanation(view, self.pods.views(), destination, self.applier)
            .map_err(|error| Report::new(&error).to_string())
    }
}
