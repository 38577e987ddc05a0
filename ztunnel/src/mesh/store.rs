//! Holds the current snapshot of the mesh.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::{Mesh, MeshChange};

/// The source of a connection's snapshot. All workers read it without locks; one task writes it.
#[derive(Debug)]
pub struct Store {
    current: ArcSwap<Mesh>,
    version: watch::Sender<u64>,
}

impl Default for Store {
    fn default() -> Self {
        Self::new(Mesh::default())
    }
}

impl Store {
    /// Starts with `mesh`, version 0.
    #[must_use]
    pub fn new(mesh: Mesh) -> Self {
        Self { current: ArcSwap::from_pointee(mesh), version: watch::Sender::new(0) }
    }

    /// The current snapshot.
    pub fn snapshot(&self) -> Arc<Mesh> {
        self.current.load_full()
    }

    /// Counts replacements. A subscriber that is notified of one sees it in the next
    /// [`snapshot`](Self::snapshot).
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Applies added, changed and removed resources. Only the single writer calls this.
    pub fn apply(&self, changes: impl IntoIterator<Item = MeshChange>) {
        self.replace(self.snapshot().with(changes));
    }

    /// Replaces the mesh. Only the one source may call this.
    pub fn replace(&self, mesh: Mesh) {
        self.current.store(Arc::new(mesh));
        self.version.send_modify(|version| *version += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::tests::workload;

    #[test]
    fn a_change_is_visible_once_announced_and_old_snapshots_stay() {
        let store = Store::default();
        let (before, mut versions) = (store.snapshot(), store.subscribe());
        assert!(!versions.has_changed().unwrap());
        store.replace(Mesh::new([workload("web-1", "10.0.0.1")], [], []));
        assert!(versions.has_changed().unwrap());
        assert_eq!(*versions.borrow_and_update(), 1);
        assert_eq!(store.snapshot().workloads().count(), 1);
        assert_eq!(before.workloads().count(), 0);
    }
}
