//! Which rules decide about a connection of a pod, for people who want to know why it is captured,
//! or not.
//!
//! The loader answers by the kernel programs' own lists, from the maps as they are: a pod whose
//! entries are not written yet is explained as the programs treat it now.

use std::net::SocketAddr;

use adit_ebpf_common::{address::UNSPECIFIED, flows::Destination, trace::Rule};
use adit_ebpf_loader::{Kernel, KernelError};
use serde::{Deserialize, Serialize};

use crate::{observe::cgroups::CgroupId, plan::address16};

/// The rules that decide about a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The pod that connects: `namespace/name`.
    pub pod: String,
    /// Where it connects to.
    pub destination: SocketAddr,
    /// What happens when the pod connects.
    pub outbound: String,
    /// The list that decided, and where it is written; `None`: no list did.
    #[serde(default)]
    pub because: Option<String>,
    /// What happens where the connection arrives, if that is a pod of this node and it arrives in
    /// clear.
    pub inbound: Option<String>,
}

/// Explains a TCP connection of `pod`, whose cgroup is `cgroup` (`None`: it has none yet).
/// `ids` are the user and the group of its process, as the node numbers them; `None`: some that
/// nobody names. `because` tells what made a rule decide. `arrives_in` is the cookie of the netns of the pod of this node that has the destination's
/// address.
///
/// # Errors
/// A map cannot be read.
pub fn explain(
    kernel: &Kernel,
    pod: String,
    cgroup: Option<CgroupId>,
    ids: [Option<u32>; 2],
    destination: SocketAddr,
    because: impl Fn(Rule) -> Option<String>,
    arrives_in: Option<u64>,
) -> Result<Explanation, KernelError> {
    let to = Destination::new(address16(destination.ip().to_canonical()), destination.port());
    let outbound = kernel.explain_connect(cgroup, None, ids, to)?;
    // A pod that dials its own address is not met by the inbound list. From any other netns the
    // rule is the same.
    let inbound = arrives_in
        .filter(|_| outbound != Rule::OwnAddress)
        .map(|netns| kernel.explain_arrival(netns, UNSPECIFIED, to))
        .transpose()?;
    Ok(Explanation {
        pod,
        destination,
        outbound: outbound.as_str().to_owned(),
        because: because(outbound),
        inbound: inbound.map(|rule| rule.as_str().to_owned()),
    })
}
