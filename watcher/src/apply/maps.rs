//! The maps that say which cgroup and which address is which pod: their contents, and changing
//! them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use adit_ebpf_common::{
    enrolment::{CgroupInfo, flag},
    exclusions::{ExcludedPort, INBOUND, OUTBOUND},
    lifecycle::Name,
};
use adit_ebpf_loader::{Kernel, KernelError};
use ipnet::IpNet;
use tracing::warn;

use crate::{
    model::exclusions::Exclusions,
    observe::cgroups::CgroupId,
    plan::{
        address16, cgroup_info,
        diff::{MapContents, MapWrite},
    },
};

/// What was written to the maps.
#[derive(Debug)]
pub(crate) struct AppliedMaps {
    contents: MapContents,
}

impl AppliedMaps {
    /// Reads what an earlier run left. The contents of its exclusion lists are not read: an empty
    /// list stands for each, so that it is removed when no pod needs it.
    ///
    /// # Errors
    /// A map cannot be read.
    pub(crate) fn read(kernel: &Kernel) -> Result<Self, KernelError> {
        let mut contents = MapContents {
            cgroups: kernel.cgroups()?.into_iter().collect(),
            addresses: kernel.pods()?.into_iter().collect(),
            arrivals: kernel.netns()?.into_iter().collect(),
            ..MapContents::default()
        };
        let of_cgroups = contents.cgroups.values().map(|info| info.exclusion_id);
        let of_netns = contents.arrivals.values().map(|info| info.exclusion_id);
        let of_addresses = contents.addresses.values().map(|record| record.exclusion_id);
        let ids = of_cgroups.chain(of_netns).chain(of_addresses);
        contents.exclusions = ids.filter(|id| *id != 0).map(|id| (id, Exclusions::default())).collect();
        Ok(Self { contents })
    }

    /// What the maps hold.
    #[must_use]
    pub(crate) fn contents(&self) -> &MapContents {
        &self.contents
    }

    /// The highest id of an exclusion list; 0: there is none.
    #[must_use]
    pub(crate) fn last_exclusion_id(&self) -> u32 {
        self.contents.exclusions.keys().next_back().copied().unwrap_or(0)
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
            MapWrite::SetExclusions(id, exclusions) => {
                set_exclusions(kernel, *id, exclusions)?;
                contents.exclusions.insert(*id, exclusions.clone());
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
            MapWrite::SetArrivals(info) => {
                kernel.set_netns(info)?;
                contents.arrivals.insert(info.netns_cookie, *info);
            }
            MapWrite::RemoveArrivals(cookie) => {
                kernel.remove_netns(*cookie)?;
                contents.arrivals.remove(cookie);
            }
            MapWrite::RemoveExclusions(id) => {
                kernel.clear_exclusions(*id)?;
                contents.exclusions.remove(id);
            }
            MapWrite::RemoveExpected(name) => {
                kernel.expect_pod_no_more(name)?;
                contents.expected.remove(name);
            }
        }
        Ok(())
    }

    /// Enters the cgroup of a tunnel.
    ///
    /// # Errors
    /// The kernel refused.
    pub(crate) fn add_tunnel(&mut self, kernel: &mut Kernel, id: CgroupId) -> Result<(), KernelError> {
        self.apply(kernel, &MapWrite::SetCgroup(id, cgroup_info(flag::TUNNEL, 0, &[])))
    }

    /// Records that the programs closed the new cgroup `id` by its `name`; its entry. `None`: no
    /// cgroup of this name is expected.
    pub(crate) fn record_closed(&mut self, id: CgroupId, name: &Name) -> Option<CgroupInfo> {
        let info = *self.contents.expected.get(name)?;
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
        let contents = &mut self.contents;
        if cgroups == contents.cgroups && addresses == contents.addresses && arrivals == contents.arrivals {
            return Ok(false);
        }
        warn!(
            cgroups = contents.cgroups.len(),
            found_cgroups = cgroups.len(),
            addresses = contents.addresses.len(),
            found_addresses = addresses.len(),
            netns = contents.arrivals.len(),
            found_netns = arrivals.len(),
            "another program changed our maps; repairing them"
        );
        contents.cgroups = cgroups;
        contents.addresses = addresses;
        contents.arrivals = arrivals;
        Ok(true)
    }
}

fn set_exclusions(
    kernel: &mut Kernel,
    exclusion_id: u32,
    exclusions: &Exclusions,
) -> Result<(), KernelError> {
    for (ports, direction) in [(&exclusions.outbound_ports, OUTBOUND), (&exclusions.inbound_ports, INBOUND)] {
        for port in ports {
            kernel.exclude_port(&ExcludedPort { exclusion_id, port: *port, direction })?;
        }
    }
    for cidr in &exclusions.outbound_cidrs {
        let (address, length) = mapped_cidr(cidr);
        kernel.exclude_cidr(exclusion_id, length, address)?;
    }
    Ok(())
}

/// `cidr` with its prefix length in IPv6 form: an IPv4 range is 96 bits longer.
fn mapped_cidr(cidr: &IpNet) -> ([u8; 16], u32) {
    let extra = if matches!(cidr.addr(), IpAddr::V4(_)) { 96 } else { 0 };
    (address16(cidr.network()), u32::from(cidr.prefix_len()) + extra)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_ranges_are_96_bits_longer() {
        for (cidr, length) in [("10.0.0.0/8", 104), ("0.0.0.0/0", 96), ("::/0", 0), ("fd00::1/128", 128)] {
            assert_eq!(mapped_cidr(&cidr.parse().unwrap()).1, length, "{cidr}");
        }
    }
}
