//! Somebody else empties maps behind the watcher's back.

use std::{thread, time::Duration};

use adit_ebpf_common::enrolment::flag;
use adit_ebpf_loader::Kernel;
use testbed::wait::wait_for;

use super::rig::Rig;

/// A map that says what is a pod's. Any one of them can be lost without a packet in clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emptied {
    /// `cgroup_info_map`, apart from the tunnels' entries: the netns of pods are known.
    Cgroups,
    /// `pod_by_netns`: what arrives is refused.
    Netns,
    /// `pod_by_addr`: nobody's own addresses are known.
    Addresses,
}

impl Rig {
    /// Empties one map of a node, and waits until its watcher has filled it again. Nothing else is
    /// done meanwhile.
    pub fn empty(&mut self, node: usize, which: Emptied) {
        let mut kernel = Kernel::open(&self.pins(node)).expect("the node's maps");
        let pods = self.enrolled(node).len();
        let removed = remove(&mut kernel, which);
        if removed == 0 {
            return;
        }
        wait_for("the watcher to fill the map again", || {
            self.check();
            thread::sleep(Duration::from_millis(50));
            count(&kernel, which) >= removed.min(pods)
        });
    }
}

/// How many entries were removed.
fn remove(kernel: &mut Kernel, which: Emptied) -> usize {
    match which {
        Emptied::Cgroups => {
            let entries = pods_cgroups(kernel);
            entries.iter().map(|id| kernel.remove_cgroup(*id).expect("removed")).count()
        }
        Emptied::Netns => {
            let entries = kernel.netns().expect("the map");
            entries.iter().map(|(cookie, _)| kernel.remove_netns(*cookie).expect("removed")).count()
        }
        Emptied::Addresses => {
            let entries = kernel.pods().expect("the map");
            entries.iter().map(|(address, _)| kernel.remove_pod(*address).expect("removed")).count()
        }
    }
}

fn count(kernel: &Kernel, which: Emptied) -> usize {
    match which {
        Emptied::Cgroups => pods_cgroups(kernel).len(),
        Emptied::Netns => kernel.netns().expect("the map").len(),
        Emptied::Addresses => kernel.pods().expect("the map").len(),
    }
}

/// The cgroups that have entries and are no tunnel's.
fn pods_cgroups(kernel: &Kernel) -> Vec<u64> {
    let entries = kernel.cgroups().expect("the map");
    entries.into_iter().filter(|(_, info)| info.flags & flag::TUNNEL == 0).map(|(id, _)| id).collect()
}
