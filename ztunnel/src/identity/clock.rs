//! The wall clock, by which certificates begin and end.

use std::{sync::Arc, time::SystemTime};

/// Tells the time. Tests move it.
///
/// It may jump either way, and it goes on while the node is suspended, which the clock of
/// [`tokio::time::Instant`] does not.
#[derive(Clone)]
pub(super) struct WallClock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl WallClock {
    /// The node's.
    pub(super) fn system() -> Self {
        Self(Arc::new(SystemTime::now))
    }

    #[cfg(test)]
    pub(super) fn new(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    pub(super) fn now(&self) -> SystemTime {
        (self.0)()
    }
}
