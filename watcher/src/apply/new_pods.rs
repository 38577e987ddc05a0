//! Pods whose netns nobody knows yet: what arrives for them is dropped, by a program that sees every
//! packet and is therefore attached only while there may be such pods.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use adit_ebpf_common::enrolment::{CgroupInfo, flag};
use adit_ebpf_loader::Kernel;
use error_reporter::Report;
use tracing::{debug, warn};

use crate::plan::{Plan, diff::MapContents};

/// Attaching and detaching changes code of the kernel, so it does not follow each single pod.
const LINGER: Duration = Duration::from_mins(1);

/// Whether the program is attached, and since when nobody needs it.
#[derive(Debug)]
pub(crate) struct NewPods {
    /// The cgroup above all pods.
    cgroup: PathBuf,
    /// `None`: as an earlier run left it.
    attached: Option<bool>,
    unneeded_since: Option<Instant>,
}

impl NewPods {
    pub(crate) fn new(cgroup: PathBuf) -> Self {
        Self { cgroup, attached: None, unneeded_since: None }
    }

    /// To be called before `plan` is applied: attaches the program if the plan expects pods.
    pub(crate) fn prepare(&mut self, kernel: &mut Kernel, plan: &Plan) {
        if plan.values().any(|pod| !pod.expected.is_empty() || pod.cgroups.values().any(is_unknown)) {
            self.unneeded_since = None;
            self.set(kernel, true);
        }
    }

    /// Detaches the program when it has been of no use for some time.
    pub(crate) fn settle(&mut self, kernel: &mut Kernel, maps: &MapContents, now: Instant) {
        if self.attached == Some(false) {
            return;
        }
        if !maps.expected.is_empty() || maps.cgroups.values().any(is_unknown) {
            self.unneeded_since = None;
            self.set(kernel, true);
        } else if now.duration_since(*self.unneeded_since.get_or_insert(now)) >= LINGER {
            self.set(kernel, false);
        }
    }

    /// When to call [`Self::settle`] again.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.unneeded_since.filter(|_| self.attached != Some(false)).map(|since| since + LINGER)
    }

    fn set(&mut self, kernel: &mut Kernel, attached: bool) {
        if self.attached == Some(attached) {
            return;
        }
        match kernel.drop_unknown_arrivals(&self.cgroup, attached) {
            Ok(()) => debug!(attached, "what arrives for pods without a known netns is dropped"),
            Err(error) => {
                let error = Report::new(&error);
                warn!(%error, "what arrives for new pods cannot be dropped before their netns is known");
            }
        }
        // An error would come again with every pod.
        self.attached = Some(attached);
    }
}

/// Whether the programs drop what arrives for a cgroup with this entry.
fn is_unknown(info: &CgroupInfo) -> bool {
    const DECIDES: u32 = flag::IN_MESH | flag::FAIL_OPEN | flag::SIDECAR;
    let closed = (info.flags | info.detected) & DECIDES == flag::IN_MESH;
    closed && info.netns_cookie == 0
}
