//! Readiness of this process, and the tasks that are pending while it is not ready.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The pending tasks by name. Ready when there is none.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, usize>>>);

impl Readiness {
    /// Adds a pending task. It is pending again when its guard is dropped: whoever was responsible
    /// for it is gone. Tasks with the same name count separately.
    #[must_use]
    pub fn task(&self, name: &'static str) -> ReadyGuard {
        let mut guard = ReadyGuard { readiness: self.clone(), name, pending: false };
        guard.pending();
        guard
    }

    /// Names of the pending tasks, sorted. Empty: ready.
    #[must_use]
    pub fn pending(&self) -> Vec<&'static str> {
        self.tasks().keys().copied().collect()
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<&'static str, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One task of [`Readiness`].
#[derive(Debug)]
pub struct ReadyGuard {
    readiness: Readiness,
    name: &'static str,
    pending: bool,
}

impl ReadyGuard {
    /// The task is done.
    pub fn ready(&mut self) {
        if std::mem::take(&mut self.pending) {
            let mut tasks = self.readiness.tasks();
            if let Some(count) = tasks.get_mut(self.name) {
                *count -= 1;
                if *count == 0 {
                    tasks.remove(self.name);
                }
            }
        }
    }

    /// The task is done once and for all.
    pub fn done(mut self) {
        self.ready();
        self.readiness = Readiness::default();
    }

    /// The task is pending, again if it was done.
    pub fn pending(&mut self) {
        if !std::mem::replace(&mut self.pending, true) {
            *self.readiness.tasks().entry(self.name).or_default() += 1;
        }
    }
}

impl Drop for ReadyGuard {
    fn drop(&mut self) {
        self.pending();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_whose_guard_is_gone_is_not_ready() {
        let readiness = Readiness::default();
        let (mut state, mut pods) = (readiness.task("state"), readiness.task("pods"));
        state.ready();
        assert_eq!(readiness.pending(), ["pods"]);
        pods.ready();
        assert!(readiness.pending().is_empty());
        drop(pods);
        assert_eq!(readiness.pending(), ["pods"], "although it was ready before");
        readiness.task("dns").done();
        assert_eq!(readiness.pending(), ["pods"]);
    }
}
