//! Answers to commands that only read.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use adit_ebpf_common::verdicts::ELSEWHERE;
use adit_ebpf_loader::KernelError;
use error_reporter::Report;

use crate::{
    apply::{Applier, exclusion_lists::of_entries},
    control::{
        Caller,
        answers::{self, explanation, pod_status, rejected_status},
        explain::Explanation,
        lists::{self, Here, PodLists},
        status::{PodStatus, Status},
    },
    observe::{routes::Outward, user_ns::IdMaps},
    plan::PodView,
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
        let routes = entry.outward.as_ref().map_or(&[][..], |outward| &outward.ranges);
        let container = caller.container.as_deref();
        explanation(view, self.pods.views(), container, ids, routes, destination, self.applier)
    }

    /// For `watcher status lists`; `pod` as of [`Self::explain`].
    ///
    /// # Errors
    /// No pod is called so, or several are, or a map cannot be read: a sentence for the user.
    pub(super) fn lists(&self, pod: Option<&str>) -> Result<Vec<PodLists>, String> {
        let only = pod.map(|pod| answers::find(self.pods.views(), pod)).transpose()?;
        let kernel = &self.applier.kernel;
        let failed = |error: KernelError| Report::new(&error).to_string();
        let maps = kernel.exclusions().map_err(failed)?;
        let mut all = Vec::new();
        for entry in self.pods.in_order() {
            let PodView { pod, observed, .. } = &entry.view;
            if only.is_some_and(|only| only.pod.uid != pod.uid) {
                continue;
            }
            let cgroup = observed.dir.as_ref().and_then(|dir| observed.cgroups.get(dir));
            let info = cgroup.map(|id| kernel.cgroup(*id)).transpose().map_err(failed)?.flatten();
            let exclusion_id = info.map_or(0, |info| info.exclusion_id);
            let in_maps = maps.get(&exclusion_id).map(of_entries).unwrap_or_default();
            let outward = entry.outward.clone().unwrap_or_default();
            let of_pod = |ids: &BTreeSet<u32>, number: fn(&IdMaps, u32) -> Option<u32>| {
                let here = |id: &u32| Some((number(entry.id_maps.as_ref()?, *id)?, *id));
                ids.iter().filter_map(here).collect::<BTreeMap<u32, u32>>()
            };
            let guards = &pod.exclusions.guards;
            let (users, groups) =
                (of_pod(&guards.users, IdMaps::user), of_pod(&guards.groups, IdMaps::group));
            let Outward { ranges: routes, devices } = &outward;
            let here = Here { routes, devices, users: &users, groups: &groups };
            let wanted = entry.exclusions_here();
            let mut entries = lists::entries(&in_maps, &wanted, &pod.levels, &here);
            let shown = if only.is_some() { entries.len() } else { entries.len().min(lists::FEW) };
            let left_out = entries.split_off(shown).len();
            all.push(PodLists {
                uid: pod.uid.clone(),
                name: pod.name.clone(),
                namespace: pod.namespace.clone(),
                exclusion_id,
                entries,
                left_out,
            });
        }
        Ok(all)
    }
}
