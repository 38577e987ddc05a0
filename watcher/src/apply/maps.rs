//! The kernel's maps and links: what of a step is theirs.

use std::net::IpAddr;

use adit_ebpf_common::pods::{ExcludedPort, INBOUND, OUTBOUND};
use adit_ebpf_loader::{Kernel, KernelError};
use ipnet::IpNet;

use crate::{
    model::exclusions::Exclusions,
    plan::{Step, address16},
};

/// Does `step` as far as it is about maps and links that need no netns; anything else is not ours.
pub fn apply(kernel: &mut Kernel, step: &Step) -> Result<(), KernelError> {
    match step {
        Step::RemoveCgroup(id) => kernel.remove_cgroup(*id),
        Step::RemoveAddress(address) => kernel.remove_pod(*address),
        Step::Unsteer(cookies) => kernel.unsteer(cookies),
        Step::SetExpected(name, info) => kernel.expect_pod(name, info),
        Step::RemoveExpected(name) => kernel.expect_pod_no_more(name),
        Step::SetPolicy(id, exclusions) => set_policy(kernel, *id, exclusions),
        Step::SetCgroup(id, info) => kernel.set_cgroup(*id, info),
        Step::SetAddress(address, record) => kernel.set_pod(*address, record),
        Step::ClearPolicy(id) => kernel.clear_policy(*id),
        Step::Withdraw(_) | Step::Release(_) | Step::Prepare(..) | Step::Steer(..) | Step::Offer(..) => {
            Ok(())
        }
    }
}

fn set_policy(kernel: &mut Kernel, policy_id: u32, exclusions: &Exclusions) -> Result<(), KernelError> {
    for (ports, direction) in [(&exclusions.outbound_ports, OUTBOUND), (&exclusions.inbound_ports, INBOUND)] {
        for port in ports {
            kernel.exclude_port(&ExcludedPort { policy_id, port: *port, direction })?;
        }
    }
    for cidr in &exclusions.outbound_cidrs {
        let (address, length) = mapped_cidr(cidr);
        kernel.exclude_cidr(policy_id, length, address)?;
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
