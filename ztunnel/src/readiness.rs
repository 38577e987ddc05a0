//! Whether this process does what it is there for, and if not, what is pending.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What has to be done before this process counts as ready, by name.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, usize>>>);

impl Readiness {
    /// Not ready, until the guard says so or is dropped. Tasks may share a name: then all of them count.
    pub fn task(&self, name: &'static str) -> ReadyGuard {
        let mut guard = ReadyGuard { readiness: self.clone(), name, pending: false };
        guard.pending();
        guard
    }

    /// What is still to be done, in order. Nothing: ready.
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

    pub fn pending(&mut self) {
        if !std::mem::replace(&mut self.pending, true) {
            *self.readiness.tasks().entry(self.name).or_default() += 1;
        }
    }
}

impl Drop for ReadyGuard {
    fn drop(&mut self) {
        self.ready();
    }
}
