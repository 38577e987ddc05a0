//! Undoing everything that the journal records, whichever run did it.

use std::io;

use serde::Serialize;
use tracing::warn;

use crate::observe::netns;

use super::{journal::Journal, netns_setup};

/// What was undone in netns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Undone {
    /// Netns that were put back as they were.
    pub netns_restored: usize,
    /// Recorded netns that do not exist any more.
    pub netns_gone: usize,
    /// Netns that could not be put back, and why.
    pub failed: Vec<String>,
}

/// Restores every netns in `journal`, through any process or mount that holds it. What failed stays
/// recorded.
///
/// # Errors
/// The journal cannot be written.
pub fn restore_all(journal: &mut Journal) -> io::Result<Undone> {
    let recorded = journal.netns().clone();
    let mut undone = Undone::default();
    let mut restored = Vec::new();
    if !recorded.is_empty() {
        let visited = netns::visit_all(|id, fd| {
            if !recorded.values().any(|record| record.id == id) {
                return;
            }
            // The inode may be another netns's by now; the cookie is not.
            let Some((cookie, record)) =
                netns::cookie(fd).ok().and_then(|cookie| recorded.get_key_value(&cookie))
            else {
                return;
            };
            match netns_setup::restore(fd, &record.sysctls_before) {
                Ok(()) => restored.push(*cookie),
                Err(error) => {
                    warn!(inode = id.inode, %error, "cannot restore a netns");
                    undone.failed.push(format!("netns {} of pod {}: {error}", id.inode, record.uid));
                }
            }
        });
        if let Err(error) = visited {
            warn!(%error, "cannot look for all netns");
            undone.failed.push(format!("netns that were not looked at: {error}"));
        }
    }
    undone.netns_restored = restored.len();
    undone.netns_gone = recorded.len().saturating_sub(restored.len() + undone.failed.len());
    let done = if undone.failed.is_empty() { recorded.keys().copied().collect() } else { restored };
    journal.remove_netns(done)?;
    Ok(undone)
}
