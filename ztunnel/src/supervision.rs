//! Tasks and threads that must not end before the process does. If one does, by itself or by a
//! panic, the process shuts down in order and says which one: half a tunnel that looks healthy is
//! worse than one that starts again.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use tokio::sync::watch;
use tracing::error;

/// The panics of this process.
static PANICS: AtomicU64 = AtomicU64::new(0);

/// Logs and counts every panic, on whichever thread and in whatever task.
pub fn observe_panics() {
    std::panic::set_hook(Box::new(|panic| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        let said = panic.payload_as_str().unwrap_or("no message");
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        error!(error = said, place, thread = thread::current().name(), "panic");
    }));
}

/// How many there were, once [`observe_panics`] was called.
#[must_use]
pub fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// Watches over those that must not end.
#[derive(Clone, Debug, Default)]
pub struct Supervisor(Arc<watch::Sender<Option<EndedEarly>>>);

/// The first one that ended although it must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndedEarly {
    /// Its name.
    pub name: String,
    /// Whether it panicked.
    pub panicked: bool,
}

impl fmt::Display for EndedEarly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.panicked { "panicked" } else { "ended by itself" };
        write!(f, "{} {how}, without which this process cannot work", self.name)
    }
}

impl Supervisor {
    /// For a task or thread to hold as long as it runs.
    #[must_use]
    pub fn lifeline(&self, name: impl Into<String>) -> Lifeline {
        Lifeline { supervisor: self.clone(), name: name.into(), released: false }
    }

    /// Runs `work`, which must not end.
    pub async fn watch(self, name: &'static str, work: impl Future<Output = ()>) {
        let _lifeline = self.lifeline(name);
        work.await;
    }

    /// Resolves when one has ended.
    pub async fn ended_early(&self) -> EndedEarly {
        let mut ended = self.0.subscribe();
        match ended.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(ended)) => ended.clone(),
            // We hold the sender, and waited for something.
            _ => std::future::pending().await,
        }
    }
}

/// Reports its holder when it is dropped.
#[derive(Debug)]
pub struct Lifeline {
    supervisor: Supervisor,
    name: String,
    released: bool,
}

impl Lifeline {
    /// The holder may end.
    pub fn release(mut self) {
        self.released = true;
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let ended = EndedEarly { name: std::mem::take(&mut self.name), panicked: thread::panicking() };
        self.supervisor.0.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert(ended);
            is_first
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_one_to_end_is_named_with_how_it_ended() {
        let supervisor = Supervisor::default();
        let panics = tokio::spawn(supervisor.clone().watch("discovery", async { panic!("on purpose") }));
        assert!(panics.await.unwrap_err().is_panic());
        supervisor.clone().watch("certificates", async {}).await;
        let ended = supervisor.ended_early().await;
        assert_eq!(ended, EndedEarly { name: "discovery".to_owned(), panicked: true });
        assert_eq!(ended.to_string(), "discovery panicked, without which this process cannot work");
    }

    #[tokio::test]
    async fn one_that_was_released_may_end() {
        let supervisor = Supervisor::default();
        supervisor.lifeline("worker-0").release();
        let nothing = tokio::time::timeout(std::time::Duration::from_millis(10), supervisor.ended_early());
        assert!(nothing.await.is_err());
    }
}
