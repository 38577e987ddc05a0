//! How much one pod, and what others do to it, may take of this process: file descriptors, and
//! places for work under way.

mod descriptors;
mod places;

pub use descriptors::ProcessDescriptors;
pub(crate) use descriptors::{DescriptorLease, PodDescriptors};
pub(crate) use places::{NoPlace, Place, Places};

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::time::timeout;

use crate::{config::BudgetConfig, rarely::Rarely};

/// How long work may wait for a place. As long as a TCP connect and a handshake may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Interval of the log lines that say that a pod is over its budget.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// The budget of one pod.
#[derive(Debug)]
pub(crate) struct PodBudget {
    pub descriptors: PodDescriptors,
    /// Handshakes of peers, of which nothing is known before they are done.
    handshakes: Places,
    /// Connects to its applications.
    dials: Places,
    /// When it was last said that it has too many connections.
    pub said: Rarely,
}

impl PodBudget {
    pub(crate) fn new(limits: &BudgetConfig, process: &Arc<ProcessDescriptors>) -> Self {
        Self {
            descriptors: PodDescriptors::new(process, limits.pod_descriptors.map(|most| most as usize)),
            handshakes: Places::new(limits.pod_handshakes as usize),
            dials: Places::new(limits.pod_dials as usize),
            said: Rarely::every(SAY_AGAIN),
        }
    }

    /// A place for the handshake of `client`.
    ///
    /// # Errors
    /// There is none in time, or too many wait.
    pub(crate) async fn handshake(&self, client: IpAddr) -> Result<Place<'_>, NoPlace> {
        timeout(PATIENCE, self.handshakes.take(client)).await.unwrap_or(Err(NoPlace))
    }

    /// A place for the connect to an application on behalf of `client`.
    ///
    /// # Errors
    /// There is none in time, or too many wait.
    pub(crate) async fn dial(&self, client: IpAddr) -> Result<Place<'_>, NoPlace> {
        timeout(PATIENCE, self.dials.take(client)).await.unwrap_or(Err(NoPlace))
    }
}
