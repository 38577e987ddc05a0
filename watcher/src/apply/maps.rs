//! The maps that say which cgroup and which address is which pod: their contents, and changing
//! them.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use adit_ebpf_common::enrolment::{CgroupInfo, flag};
use adit_ebpf_loader::{ExclusionList, Kernel, KernelError};
use error_reporter::Report;
use tracing::{info, warn};

use crate::{
    model::exclusions::Exclusions,
    observe::cgroups::CgroupId,
    plan::{
        Plan, Reason, ReasonCode, cgroup_info,
        diff::{MapContents, MapWrite},
    },
};

use super::exclusion_lists::{entries, of_entries};

/// What was written to the maps.
#[derive(Debug)]
pub(crate) struct AppliedMaps {
    contents: MapContents,
    /// The entries of each exclusion list, by id: what has to be removed.
    lists: BTreeMap<u32, ExclusionList>,
    /// Lists that found no room, and why. They are not tried again before something is removed.
    refused: BTreeMap<u32, String>,
    last_exclusion_id: u32,
}

impl AppliedMaps {
    /// Reads what an earlier run left, and removes the exclusion lists that no entry names: a run
    /// that was killed between two writes leaves them. An empty list stands for each of the others,
    /// so that it is removed when no pod needs it.
    ///
    /// # Errors
    /// A map cannot be read, or a list not be removed.
    pub(crate) fn adopt(kernel: &mut Kernel) -> Result<Self, KernelError> {
        let mut contents = MapContents {
            cgroups: kernel.cgroups()?.into_iter().collect(),
            addresses: kernel.pods()?.into_iter().collect(),
            arrivals: kernel.netns()?.into_iter().collect(),
            expected: kernel.expected_pods()?.into_iter().collect(),
            ..MapContents::default()
        };
        let of_cgroups = contents.cgroups.values().map(|info| info.exclusion_id);
        let of_netns = contents.arrivals.values().map(|info| info.exclusion_id);
        let ids = of_cgroups.chain(of_netns);
        contents.exclusions = ids.filter(|id| *id != 0).map(|id| (id, Arc::default())).collect();
        let verdicts = kernel.verdicts();
        for cookie in verdicts.netns()?.iter().filter(|cookie| !contents.arrivals.contains_key(cookie)) {
            verdicts.end(*cookie)?;
        }
        contents.arrivals.keys().for_each(|cookie| count_verdicts(kernel, *cookie));
        let mut lists = kernel.exclusions()?;
        let last = [
            contents.exclusions.last_key_value().map(|(id, _)| *id),
            lists.last_key_value().map(|(id, _)| *id),
        ];
        for (id, list) in lists.extract_if(.., |id, _| !contents.exclusions.contains_key(id)) {
            info!(exclusion_id = id, entries = list.len(), "removing an exclusion list that no pod has");
            kernel.remove_exclusions(id, &list)?;
        }
        let last_exclusion_id = last.into_iter().flatten().max().unwrap_or(0);
        Ok(Self { contents, lists, refused: BTreeMap::new(), last_exclusion_id })
    }

    /// What the maps hold.
    #[must_use]
    pub(crate) fn contents(&self) -> &MapContents {
        &self.contents
    }

    /// The highest id that an exclusion list had when an earlier run ended; 0: there was none.
    #[must_use]
    pub(crate) fn last_exclusion_id(&self) -> u32 {
        self.last_exclusion_id
    }

    /// The exclusions that hold in the netns `cookie`.
    #[must_use]
    pub(crate) fn exclusions_in(&self, cookie: u64) -> Exclusions {
        let id = self.contents.arrivals.get(&cookie).map(|info| info.exclusion_id);
        id.and_then(|id| self.lists.get(&id)).map(of_entries).unwrap_or_default()
    }

    /// The cookies of the netns that a tunnel serves.
    #[must_use]
    pub(crate) fn ready_netns(&self) -> BTreeSet<u64> {
        let ready = self.contents.addresses.values().filter(|record| record.flags & flag::READY != 0);
        ready.map(|record| record.netns_cookie).collect()
    }

    /// The cgroups of tunnels.
    #[must_use]
    pub(crate) fn tunnel_cgroups(&self) -> BTreeSet<CgroupId> {
        let tunnels = self.contents.cgroups.iter().filter(|(_, info)| info.flags & flag::TUNNEL != 0);
        tunnels.map(|(id, _)| *id).collect()
    }

    /// Does `write` and records it.
    ///
    /// # Errors
    /// The kernel refused; then nothing is recorded.
    pub(crate) fn apply(&mut self, kernel: &mut Kernel, write: &MapWrite) -> Result<(), KernelError> {
        let contents = &mut self.contents;
        match write {
            MapWrite::RemoveCgroup(id) => {
                kernel.remove_cgroup(*id)?;
                contents.cgroups.remove(id);
            }
            MapWrite::RemoveAddress(address) => {
                kernel.remove_pod(*address)?;
                contents.addresses.remove(address);
            }
            MapWrite::SetExpected(name, info) => {
                kernel.expect_pod(name, info)?;
                contents.expected.insert(*name, *info);
            }
            MapWrite::SetCgroup(id, info) => {
                kernel.set_cgroup(*id, info)?;
                contents.cgroups.insert(*id, *info);
            }
            MapWrite::SetAddress(address, record) => {
                kernel.set_pod(*address, record)?;
                contents.addresses.insert(*address, *record);
            }
            MapWrite::SetArrivals(cookie, info) => {
                kernel.set_netns(*cookie, info)?;
                if contents.arrivals.insert(*cookie, *info).is_none() {
                    count_verdicts(kernel, *cookie);
                }
            }
            MapWrite::RemoveArrivals(cookie) => {
                kernel.remove_netns(*cookie)?;
                contents.arrivals.remove(cookie);
                kernel.verdicts().end(*cookie)?;
            }
            MapWrite::RemoveExclusions(id) => {
                if let Some(list) = self.lists.get(id) {
                    kernel.remove_exclusions(*id, list)?;
                }
                self.lists.remove(id);
                self.refused.clear();
                contents.exclusions.remove(id);
            }
            MapWrite::RemoveExpected(name) => {
                kernel.expect_pod_no_more(name)?;
                contents.expected.remove(name);
            }
        }
        Ok(())
    }

    /// Writes the exclusion lists of `plan` that are not there yet. The plan as far as they found
    /// room, and the pods whose lists did not, by uid, with the reason.
    pub(crate) fn add_exclusions<'a>(
        &mut self,
        kernel: &mut Kernel,
        plan: &'a Plan,
    ) -> (Cow<'a, Plan>, Vec<(String, Reason)>) {
        let (mut fitting, mut refused) = (Cow::Borrowed(plan), Vec::new());
        for (uid, pod) in plan {
            let Some((id, exclusions)) = &pod.exclusions else { continue };
            if let Err(why) = self.set_exclusions(kernel, *id, exclusions) {
                fitting.to_mut().insert(uid.clone(), pod.without_exclusions());
                refused.push((uid.clone(), Reason::new(ReasonCode::ExclusionsNotSet, why)));
            }
        }
        (fitting, refused)
    }

    fn set_exclusions(
        &mut self,
        kernel: &mut Kernel,
        id: u32,
        exclusions: &Arc<Exclusions>,
    ) -> Result<(), String> {
        if self.contents.exclusions.get(&id) == Some(exclusions) {
            return Ok(());
        }
        if let Some(why) = self.refused.get(&id) {
            return Err(why.clone());
        }
        let wanted = entries(exclusions);
        let there = self.lists.get(&id).cloned().unwrap_or_default();
        let written = kernel
            .add_exclusions(id, &wanted.without(&there))
            .and_then(|()| kernel.remove_exclusions(id, &there.beyond(&wanted)));
        match written {
            Ok(()) => {
                self.lists.insert(id, wanted);
                self.contents.exclusions.insert(id, Arc::clone(exclusions));
                Ok(())
            }
            Err(error) => {
                let (ports, cidrs, ids) = (wanted.ports.len(), wanted.cidrs.len(), wanted.ids.len());
                let guards = if ids == 0 { String::new() } else { format!(", and {ids} of guards") };
                let why = format!(
                    "no room for the exclusion list, which takes {ports} entries of ports and {cidrs} of addresses{guards}: {}",
                    Report::new(&error)
                );
                self.refused.insert(id, why.clone());
                Err(why)
            }
        }
    }

    /// Enters the cgroup of a tunnel.
    ///
    /// # Errors
    /// The kernel refused.
    pub(crate) fn add_tunnel(&mut self, kernel: &mut Kernel, id: CgroupId) -> Result<(), KernelError> {
        self.apply(kernel, &MapWrite::SetCgroup(id, cgroup_info(flag::TUNNEL, 0, &[])))
    }

    /// Records that the programs changed the entry of the cgroup `id`; the entry, as it is now.
    /// `None`: there is none any more, or it cannot be read, which the next comparison repairs.
    pub(crate) fn record_closed(&mut self, kernel: &Kernel, id: CgroupId) -> Option<CgroupInfo> {
        self.contents.cgroups.remove(&id);
        let info = kernel.cgroup(id).ok().flatten()?;
        self.contents.cgroups.insert(id, info);
        Some(info)
    }

    /// Reads the maps back, so that the next comparison repairs what others changed. Whether they
    /// differed.
    ///
    /// # Errors
    /// A map cannot be read; then nothing changes here.
    pub(crate) fn read_back(&mut self, kernel: &Kernel) -> Result<bool, KernelError> {
        let cgroups: BTreeMap<_, _> = kernel.cgroups()?.into_iter().collect();
        let addresses: BTreeMap<_, _> = kernel.pods()?.into_iter().collect();
        let arrivals: BTreeMap<_, _> = kernel.netns()?.into_iter().collect();
        let expected: BTreeMap<_, _> = kernel.expected_pods()?.into_iter().collect();
        let lists = kernel.exclusions()?;
        self.refused.clear();
        let contents = &mut self.contents;
        // The programs closed them, and the events that say so are on their way.
        let closed = |id: &CgroupId, info: &CgroupInfo| match contents.cgroups.get(id) {
            None => contents.expected.values().any(|expected| expected == info),
            Some(known) => known.without_netns() == *info,
        };
        let closed: Vec<_> = cgroups.iter().filter(|(id, info)| closed(id, info)).collect();
        let closed: Vec<_> = closed.into_iter().map(|(id, info)| (*id, *info)).collect();
        contents.cgroups.extend(closed);
        if cgroups == contents.cgroups
            && addresses == contents.addresses
            && arrivals == contents.arrivals
            && expected == contents.expected
            && lists == self.lists
        {
            return Ok(false);
        }
        warn!(
            cgroups = contents.cgroups.len(),
            found_cgroups = cgroups.len(),
            addresses = contents.addresses.len(),
            found_addresses = addresses.len(),
            netns = contents.arrivals.len(),
            found_netns = arrivals.len(),
            lists = self.lists.len(),
            found_lists = lists.len(),
            "another program changed our maps; repairing them"
        );
        contents.cgroups = cgroups;
        contents.addresses = addresses;
        contents.arrivals = arrivals;
        contents.expected = expected;
        // An empty list stands for one that has to be written again, or removed.
        contents.exclusions.retain(|id, _| lists.contains_key(id));
        for (id, list) in &lists {
            if self.lists.get(id) != Some(list) {
                contents.exclusions.insert(*id, Arc::default());
            }
        }
        self.lists = lists;
        Ok(true)
    }
}

/// Counts apart what is decided in a netns. Without room for it, it is counted with all others: that
/// is no reason to close a pod.
fn count_verdicts(kernel: &Kernel, netns_cookie: u64) {
    if let Err(error) = kernel.verdicts().begin(netns_cookie) {
        warn!(netns_cookie, error = %Report::new(&error), "verdicts of a pod are not counted apart");
    }
}
