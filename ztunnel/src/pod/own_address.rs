//! Whether a pod has an address, asked for each connection that is made to it from inside.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use adit_netns::Netns;

use crate::socket;

/// How long an answer counts. A pod that loses an address without an end of its netns does that
/// itself, and nobody else is given the address as soon.
const COUNTS: Duration = Duration::from_secs(1);

/// The address that was asked for last, if the pod had it, and when.
#[derive(Debug, Default)]
pub(crate) struct OwnAddress(Mutex<Option<(IpAddr, Instant)>>);

impl OwnAddress {
    /// Whether `netns`, the pod's, has the address of `address`.
    pub(super) fn is(&self, netns: &Netns, address: SocketAddr) -> bool {
        let known = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_some_and(|(ip, at)| ip == address.ip() && at.elapsed() < COUNTS) {
            return true;
        }
        let is = socket::is_local(netns, address);
        let known = is.then(|| (address.ip(), Instant::now()));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = known;
        is
    }
}
