//! A hash table that is cheap to copy: copies share unchanged parts.
//!
//! Every push of the control plane makes a new snapshot, and most pushes change a few pods of a
//! large mesh. The entries are spread over [`SHARDS`] by their hash. A change copies only the shard
//! that contains it.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    sync::Arc,
};

use hashbrown::HashTable;

/// With 100,000 entries each shard has about 400. Copying a shard, and copying the list of shards,
/// takes microseconds.
const SHARDS: usize = 256;

/// A value that contains its own key. Several entries may have the same key.
pub(super) trait Keyed: Clone {
    type Key<'a>: Hash
    where
        Self: 'a;

    fn key(&self) -> Self::Key<'_>;
    fn has(&self, key: &Self::Key<'_>) -> bool;
}

#[derive(Clone, Debug)]
pub(super) struct Table<T> {
    shards: Vec<Arc<HashTable<T>>>,
    hasher: RandomState,
    len: usize,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        // All shards are the same empty one until an entry is added.
        let empty = Arc::new(HashTable::new());
        Self { shards: vec![empty; SHARDS], hasher: RandomState::new(), len: 0 }
    }
}

impl<T: Keyed> Table<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// One entry with that key.
    pub(super) fn get(&self, key: &T::Key<'_>) -> Option<&T> {
        let hash = self.hasher.hash_one(key);
        self.shards[shard(hash)].find(hash, |entry| entry.has(key))
    }

    /// All entries with that key, in no order.
    pub(super) fn all<'a>(&'a self, key: T::Key<'_>) -> impl Iterator<Item = &'a T> {
        let hash = self.hasher.hash_one(&key);
        self.shards[shard(hash)].iter_hash(hash).filter(move |entry| entry.has(&key))
    }

    /// All entries, unordered.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    /// Adds an entry; others with the same key stay.
    pub(super) fn add(&mut self, entry: T) {
        let hasher = &self.hasher;
        let hash = hasher.hash_one(entry.key());
        let shard = Arc::make_mut(&mut self.shards[shard(hash)]);
        shard.insert_unique(hash, entry, |entry| hasher.hash_one(entry.key()));
        self.len += 1;
    }

    /// Removes the entry with that key for which `is` returns true.
    pub(super) fn take(&mut self, key: &T::Key<'_>, is: impl Fn(&T) -> bool) -> Option<T> {
        let hash = self.hasher.hash_one(key);
        let shard = &mut self.shards[shard(hash)];
        let meant = |entry: &T| entry.has(key) && is(entry);
        // Do not copy a shard for an entry that it does not contain.
        shard.find(hash, meant)?;
        let (taken, _) = Arc::make_mut(shard).find_entry(hash, meant).ok()?.remove();
        self.len -= 1;
        Some(taken)
    }

    /// The entry with that key, made by `new` if there is none. The caller must not change its key.
    pub(super) fn get_or_add(&mut self, key: &T::Key<'_>, new: impl FnOnce() -> T) -> &mut T {
        let hasher = &self.hasher;
        let hash = hasher.hash_one(key);
        let shard = Arc::make_mut(&mut self.shards[shard(hash)]);
        let len = &mut self.len;
        let entry = shard.entry(hash, |entry| entry.has(key), |entry| hasher.hash_one(entry.key()));
        let added = || {
            *len += 1;
            new()
        };
        entry.or_insert_with(added).into_mut()
    }
}

/// Uses the middle bits: the inner table uses the lowest and the highest.
fn shard(hash: u64) -> usize {
    (hash >> 32) as usize % SHARDS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, PartialEq)]
    struct Entry(&'static str, u32);

    impl Keyed for Entry {
        type Key<'a> = &'a str;

        fn key(&self) -> &str {
            self.0
        }

        fn has(&self, key: &&str) -> bool {
            self.0 == *key
        }
    }

    #[test]
    fn what_is_put_in_is_found_until_it_is_taken_out_and_copies_keep_theirs() {
        let mut table = Table::default();
        for number in 0..1000 {
            table.add(Entry("one", number));
        }
        table.add(Entry("two", 0));
        let copy = table.clone();
        assert_eq!((table.all("one").count(), table.all("two").count(), table.len()), (1000, 1, 1001));
        assert_eq!(table.take(&"one", |entry| entry.1 == 500), Some(Entry("one", 500)));
        assert_eq!(table.take(&"one", |entry| entry.1 == 500), None);
        table.get_or_add(&"two", || panic!("it is there")).1 = 7;
        assert_eq!(table.get_or_add(&"three", || Entry("three", 3)).1, 3);
        assert_eq!((table.len(), table.iter().count()), (1001, 1001));
        assert_eq!((table.get(&"two"), copy.get(&"two")), (Some(&Entry("two", 7)), Some(&Entry("two", 0))));
        assert_eq!((copy.len(), copy.all("one").count(), copy.get(&"three")), (1001, 1000, None));
    }

    #[test]
    fn a_change_copies_one_shard() {
        let mut table = Table::default();
        let names: Vec<&'static str> = (0..1000).map(|n| &*n.to_string().leak()).collect();
        for name in &names {
            table.add(Entry(name, 0));
        }
        let copy = table.clone();
        table.get_or_add(&names[17], || panic!("it is there")).1 = 1;
        let pairs = table.shards.iter().zip(&copy.shards);
        assert_eq!(pairs.filter(|(a, b)| !Arc::ptr_eq(a, b)).count(), 1);
    }
}
