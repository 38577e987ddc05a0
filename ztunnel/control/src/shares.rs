//! How many of something each has, which none may have many of.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

/// Counts by key.
#[derive(Debug)]
pub(crate) struct Shares<K>(Arc<Mutex<HashMap<K, usize>>>);

/// One of a key's, until it is dropped.
#[derive(Debug)]
pub(crate) struct Share<K: Eq + Hash>(Arc<Mutex<HashMap<K, usize>>>, K);

impl<K> Default for Shares<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K> Clone for Shares<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K: Clone + Eq + Hash> Shares<K> {
    /// One more, unless `key` has `most`.
    pub(crate) fn take(&self, key: K, most: usize) -> Option<Share<K>> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(key.clone()).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        drop(counts);
        Some(Share(Arc::clone(&self.0), key))
    }
}

impl<K: Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_has_more_than_its_share_and_what_is_dropped_is_free() {
        let shares = Shares::default();
        let held: Vec<_> = (0..2).map(|_| shares.take("a", 2).unwrap()).collect();
        assert!(shares.take("a", 2).is_none());
        let of_another = shares.take("b", 2);
        assert!(of_another.is_some());
        drop(held);
        assert!(shares.take("a", 2).is_some());
        drop(of_another);
        assert!(shares.0.lock().unwrap().is_empty(), "nothing is kept of whoever is gone");
    }
}
