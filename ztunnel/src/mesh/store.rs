//! The current snapshot.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::Mesh;

/// Where a connection takes its snapshot from. Read without locks by all workers; written by one source.
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
    pub fn new(mesh: Mesh) -> Self {
        Self { current: ArcSwap::from_pointee(mesh), version: watch::Sender::new(0) }
    }

    pub fn snapshot(&self) -> Arc<Mesh> {
        self.current.load_full()
    }

    /// Counts replacements. Whoever is told of one finds it in the next [`snapshot`](Self::snapshot).
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    pub fn replace(&self, mesh: Mesh) {
        self.current.store(Arc::new(mesh));
        self.version.send_modify(|version| *version += 1);
    }
}
