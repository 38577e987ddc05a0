//! Failed connections: counts by reason, and the last ones, for the admin server.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde::Serialize;

use crate::reason::FailureReason;

/// Number of failures kept.
const LAST: usize = 50;

/// A connection that failed, as its access record says it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FailedConnection {
    /// When it failed.
    #[serde(skip)]
    pub at: SystemTime,
    /// `inbound` or `outbound`.
    pub direction: &'static str,
    /// Why.
    pub reason: FailureReason,
    /// The client.
    pub src: SocketAddr,
    /// The destination.
    pub dst: SocketAddr,
    /// The error with its causes.
    pub error: String,
}

/// Counts of failures, and the last ones.
#[derive(Debug, Default)]
pub(crate) struct FailedConnections(Mutex<Tally>);

#[derive(Debug, Default)]
struct Tally {
    counts: BTreeMap<(&'static str, FailureReason), u64>,
    last: VecDeque<FailedConnection>,
}

impl FailedConnections {
    /// Adds a failure.
    pub(crate) fn add(&self, failed: FailedConnection) {
        let mut tally = self.tally();
        *tally.counts.entry((failed.direction, failed.reason)).or_default() += 1;
        if tally.last.len() == LAST {
            tally.last.pop_front();
        }
        tally.last.push_back(failed);
    }

    /// How many by direction and reason.
    pub(crate) fn counts(&self) -> BTreeMap<(&'static str, FailureReason), u64> {
        self.tally().counts.clone()
    }

    /// The last ones, the latest first.
    pub(crate) fn last(&self) -> Vec<FailedConnection> {
        self.tally().last.iter().rev().cloned().collect()
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
