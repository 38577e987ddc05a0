//! One watcher for each node.
//!
//! Two watchers would repair each other's maps for ever. So the one that works holds an exclusive
//! lock (`flock(2)`) on the folder of the node's pins, which is what they would fight over: whoever
//! can change the pins sees the lock, also from another container. The kernel releases it when its
//! holder ends, however that was. A second watcher stands by until then, and takes over what the
//! pins keep running.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::Duration,
};

use tracing::info;

use crate::metrics::Metrics;

/// How soon a watcher that stands by takes over, at most.
const INTERVAL: Duration = Duration::from_millis(50);

/// The right to change what is pinned for the node; released on drop.
#[derive(Debug)]
pub(super) struct NodeLock {
    _folder: File,
    /// Whether another watcher had it.
    pub stood_by: bool,
}

/// Waits for the lock on `pins`, and makes the folder where it is missing. Meanwhile `metrics` says
/// that this watcher stands by.
///
/// # Errors
/// The folder cannot be made, opened or locked.
pub(super) async fn acquire(pins: &Path, metrics: &Metrics) -> io::Result<NodeLock> {
    let mut stood_by = false;
    loop {
        if let Some(folder) = try_acquire(pins)? {
            metrics.set_standing_by(false);
            return Ok(NodeLock { _folder: folder, stood_by });
        }
        if !stood_by {
            info!(pins = %pins.display(), "another watcher works for this node; standing by until it ends");
            metrics.set_standing_by(true);
        }
        stood_by = true;
        tokio::time::sleep(INTERVAL).await;
    }
}

/// `None`: another process has it.
fn try_acquire(pins: &Path) -> io::Result<Option<File>> {
    fs::create_dir_all(pins)?;
    let folder = File::open(pins)?;
    match folder.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // Its last holder may have removed the folder, and somebody else may have made and locked a new
    // one.
    let is_current = fs::metadata(pins).is_ok_and(|found| {
        folder.metadata().is_ok_and(|locked| (locked.dev(), locked.ino()) == (found.dev(), found.ino()))
    });
    Ok(is_current.then_some(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time_and_a_removed_folder_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let pins = dir.path().join("adit/node");
        let held = try_acquire(&pins).unwrap().expect("nobody has it");
        assert!(try_acquire(&pins).unwrap().is_none());
        fs::remove_dir(&pins).unwrap();
        let next = try_acquire(&pins).unwrap().expect("another folder");
        drop(held);
        assert!(try_acquire(&pins).unwrap().is_none());
        drop(next);
        assert!(try_acquire(&pins).unwrap().is_some());
    }
}
