//! How many tunnels begin at a time. A tunnel that begins tells everything that it has, and is told
//! everything that differs: megabytes each. After a restart all of them begin together; those that wait
//! cost nothing but their connections.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// Tunnels that begin at a time.
const AT_ONCE: usize = 12;
/// Of one node: some that broke are not noticed yet. Not so many that a few nodes could keep all others
/// waiting.
const OF_NODE: usize = 3;

/// Lets some begin at a time.
#[derive(Clone, Debug)]
pub(super) struct Beginnings {
    places: Arc<Semaphore>,
    nodes: Arc<Mutex<HashMap<String, Weak<Semaphore>>>>,
}

/// A tunnel begins, until this is dropped.
#[derive(Debug)]
pub(super) struct Beginning {
    _place: OwnedSemaphorePermit,
    _of_node: OwnedSemaphorePermit,
}

impl Default for Beginnings {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(AT_ONCE)), nodes: Arc::default() }
    }
}

impl Beginnings {
    /// Waits for a place. `None`: there was none in time.
    pub(super) async fn take(&self, node: &str, limit: Duration) -> Option<Beginning> {
        let of_node = self.of_node(node);
        let both = async {
            // The node's first: who waits for it is in nobody else's way.
            let of_node = of_node.acquire_owned().await.ok()?;
            let place = Arc::clone(&self.places).acquire_owned().await.ok()?;
            Some(Beginning { _place: place, _of_node: of_node })
        };
        timeout(limit, both).await.ok()?
    }

    fn of_node(&self, node: &str) -> Arc<Semaphore> {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = nodes.get(node).and_then(Weak::upgrade) {
            return known;
        }
        nodes.retain(|_, places| places.strong_count() > 0);
        let places = Arc::new(Semaphore::new(OF_NODE));
        nodes.insert(node.to_owned(), Arc::downgrade(&places));
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_mins(1);

    #[tokio::test(start_paused = true)]
    async fn some_begin_at_a_time_and_none_of_one_node_keep_the_others_waiting() {
        let beginnings = Beginnings::default();
        let mut begun = Vec::new();
        for _ in 0..OF_NODE {
            begun.push(beginnings.take("greedy", LIMIT).await.unwrap());
        }
        let start = tokio::time::Instant::now();
        assert!(beginnings.take("greedy", LIMIT).await.is_none());
        assert_eq!(start.elapsed(), LIMIT, "it waits");
        for number in OF_NODE..AT_ONCE {
            begun.push(beginnings.take(&format!("node-{number}"), LIMIT).await.unwrap());
        }
        assert!(beginnings.take("late", LIMIT).await.is_none());
        assert_eq!(start.elapsed(), 2 * LIMIT, "it waits");
        begun.pop();
        beginnings.take("late", LIMIT).await.unwrap();
    }
}
