//! Shares equal values of many resources: 100,000 workloads have a few hundred namespaces and
//! service accounts.

use std::{
    borrow::Borrow,
    collections::HashSet,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

/// Holds each distinct value once, such as a namespace's name.
#[derive(Debug)]
pub(super) struct Interner<T: ?Sized>(Mutex<Interned<T>>);

#[derive(Debug)]
struct Interned<T: ?Sized> {
    all: HashSet<Arc<T>>,
    /// At this size the next addition removes the values that nothing uses any more.
    sweep_at: usize,
}

impl<T: ?Sized> Default for Interner<T> {
    fn default() -> Self {
        Self(Mutex::new(Interned { all: HashSet::new(), sweep_at: MIN_SWEEP }))
    }
}

/// Below this size sweeping is not worth it.
const MIN_SWEEP: usize = 1024;

impl<T: ?Sized + Hash + Eq> Interner<T> {
    /// The shared copy of `one`.
    pub(super) fn intern(&self, one: impl Borrow<T> + Into<Arc<T>>) -> Arc<T> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.all.get(one.borrow()) {
            return Arc::clone(known);
        }
        if known.all.len() >= known.sweep_at {
            known.all.retain(|one| Arc::strong_count(one) > 1);
            // Doubled, so that each addition pays for a constant share of the sweeps.
            known.sweep_at = MIN_SWEEP.max(known.all.len() * 2);
        }
        let one = one.into();
        known.all.insert(Arc::clone(&one));
        one
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_ones_are_one_and_what_nobody_uses_is_forgotten() {
        let interner = Interner::<str>::default();
        let kept = interner.intern("kept".to_owned());
        assert!(Arc::ptr_eq(&kept, &interner.intern("kept".to_owned())));
        for number in 0..5 * MIN_SWEEP {
            interner.intern(number.to_string());
        }
        assert!(interner.0.lock().unwrap().all.len() <= MIN_SWEEP);
        assert!(Arc::ptr_eq(&kept, &interner.intern("kept".to_owned())));
    }
}
