//! Undoes everything at the end of `watcher run --detach`.

use std::{io, path::Path};

use adit_ebpf_loader::{Kernel, KernelError};
use tracing::warn;

use super::{Applier, restore};

impl Applier {
    /// Restores every prepared netns at once, whatever still uses it, and removes links and maps.
    ///
    /// # Errors
    /// The journal cannot be written, or the kernel refused.
    pub fn remove_everything(mut self, pins: &Path) -> Result<(), RemoveError> {
        let undone = restore::restore_all(&mut self.journal)
            .map_err(|source| RemoveError::Io { what: "restore the pods' netns", source })?;
        for problem in &undone.failed {
            warn!(problem, "left behind");
        }
        let Self { kernel, mut journal, .. } = self;
        // Our fds keep links alive that are unpinned only.
        drop(kernel);
        Kernel::remove(pins).map_err(RemoveError::Kernel)?;
        for id in journal.tunnels().keys().copied().collect::<Vec<_>>() {
            journal
                .remove_tunnel(id)
                .map_err(|source| RemoveError::Io { what: "remove the tunnels from the journal", source })?;
        }
        Ok(())
    }
}

/// Why not everything was removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// A file could not be written.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot remove the pinned links and maps")]
    Kernel(#[source] KernelError),
}
