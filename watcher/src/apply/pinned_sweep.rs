//! Counts of connections of netns that are gone.
//!
//! A count goes with the preparation of its netns. Where the tunnel dials once more after that, or
//! where its programs are gone before its sockets, an entry stays that nobody asks for. A map full
//! of those could not count for a netns that needs it.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use adit_ebpf_loader::Kernel;
use tracing::{info, warn};

use crate::observe::netns;

use super::journal::Journal;

/// All processes of the node are looked at for it.
const PAUSE: Duration = Duration::from_hours(1);

/// When to look for them next.
#[derive(Debug, Default)]
pub(crate) struct PinnedSweep {
    next: Option<Instant>,
}

impl PinnedSweep {
    /// Removes the counts of netns that are gone, at the first call and then once in a while.
    pub(crate) fn sweep(&mut self, kernel: &mut Kernel, journal: &Journal, now: Instant) {
        if self.next.is_some_and(|next| now < next) {
            return;
        }
        self.next = Some(now + PAUSE);
        if let Err(error) = remove_gone(kernel, journal) {
            warn!(%error, "cannot tell which counts of connections belong to netns that are gone");
        }
    }
}

/// # Errors
/// It is not known which netns there are; then nothing is removed.
fn remove_gone(kernel: &mut Kernel, journal: &Journal) -> io::Result<()> {
    let mut gone = kernel.netns_with_pinned_connections().map_err(io::Error::other)?;
    gone.retain(|cookie| !journal.netns().contains_key(cookie));
    if gone.is_empty() {
        return Ok(());
    }
    let living = living()?;
    gone.retain(|cookie| !living.contains(cookie));
    for cookie in &gone {
        kernel.forget_pinned_connections(*cookie).map_err(io::Error::other)?;
    }
    if !gone.is_empty() {
        info!(netns = gone.len(), "counts of connections of netns that are gone were removed");
    }
    Ok(())
}

/// The cookies of all netns. The node's own are only left alone, so one that cannot be opened may be
/// missing.
fn living() -> io::Result<BTreeSet<u64>> {
    let own = ["/proc/self/ns/net", "/proc/1/ns/net"].into_iter().filter_map(|path| File::open(path).ok());
    let mut living: BTreeSet<u64> = own.map(|file| netns::cookie(file.as_fd())).collect::<Result<_, _>>()?;
    let mut unknown = None;
    netns::visit_all(|_, fd| match netns::cookie(fd) {
        Ok(cookie) => drop(living.insert(cookie)),
        Err(error) => unknown = Some(error),
    })?;
    unknown.map_or(Ok(living), Err)
}
