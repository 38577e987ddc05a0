//! Holds the current snapshot of the mesh, and whether it may be judged by.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::{Mesh, MeshChange, OwnNode};

/// The source of a connection's snapshot. All workers read it without locks; one task writes it.
///
/// An empty mesh may mean that there is nothing, or that nobody has told anything yet. Without
/// policies everything is allowed, so no connection may be judged by the latter:
/// [`is_known`](Self::is_known) tells them apart.
#[derive(Debug)]
pub struct Store {
    current: ArcSwap<Mesh>,
    version: watch::Sender<u64>,
    knowledge: watch::Sender<Knowledge>,
}

/// What is known of the mesh as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knowledge {
    /// Not every kind of resource that decides about connections was told once.
    Untold,
    /// It was, to a predecessor. The source itself has not told everything yet.
    Recalled,
    /// The source has told everything.
    Told,
}

impl Default for Store {
    fn default() -> Self {
        Self::new(Mesh::default())
    }
}

impl Store {
    /// Starts with `mesh`, version 0, which is all that there is.
    #[must_use]
    pub fn new(mesh: Mesh) -> Self {
        Self {
            current: ArcSwap::from_pointee(mesh),
            version: watch::Sender::new(0),
            knowledge: watch::Sender::new(Knowledge::Told),
        }
    }

    /// Starts with nothing, and not even that is known: until [`now_knows`](Self::now_knows).
    #[must_use]
    pub fn untold() -> Self {
        Self { knowledge: watch::Sender::new(Knowledge::Untold), ..Self::new(Mesh::default()) }
    }

    /// The same for a tunnel on `node`: what is told of others there helps new pods.
    #[must_use]
    pub fn untold_on(node: OwnNode) -> Self {
        Self { knowledge: watch::Sender::new(Knowledge::Untold), ..Self::new(Mesh::on_node(node)) }
    }

    /// Whether every kind of resource that decides about connections was told once. Ask this
    /// before you take a [`snapshot`](Self::snapshot) to judge by.
    pub fn is_known(&self) -> bool {
        *self.knowledge.borrow() != Knowledge::Untold
    }

    /// Whether the source has told everything itself.
    pub fn is_told(&self) -> bool {
        *self.knowledge.borrow() == Knowledge::Told
    }

    /// Waits until it [is known](Self::is_known).
    pub async fn until_known(&self) {
        // An error means that the sender is gone; `self` holds it.
        let _ = self.knowledge.subscribe().wait_for(|knows| *knows != Knowledge::Untold).await;
    }

    /// What the current snapshot may be judged by, from now on. Wakes those who wait for a change.
    pub fn now_knows(&self, knowledge: Knowledge) {
        if self.knowledge.send_replace(knowledge) != knowledge {
            self.version.send_modify(|version| *version += 1);
        }
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

    #[tokio::test]
    async fn what_nobody_told_is_not_known_and_an_empty_mesh_is() {
        let store = Store::untold();
        let mut versions = store.subscribe();
        store.replace(Mesh::new([workload("web-1", "10.0.0.1")], [], []));
        assert!(!store.is_known());
        versions.mark_unchanged();
        store.now_knows(Knowledge::Recalled);
        assert!(store.is_known() && !store.is_told() && versions.has_changed().unwrap());
        store.until_known().await;
        store.now_knows(Knowledge::Told);
        assert!(store.is_told());
        assert!(Store::default().is_told());
    }

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
