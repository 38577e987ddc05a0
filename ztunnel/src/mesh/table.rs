//! A hash table that costs little to copy: copies share what has not changed since.
//!
//! A snapshot of a large mesh is made for every push of the control plane, and most pushes are about a few pods. The
//! entries are spread over [`SHARDS`] by their hash; a change copies the shard that it is in, and nothing else.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    sync::Arc,
};

use hashbrown::HashTable;

/// 100,000 entries are some 400 in each: both copying one shard and copying the list of them take microseconds.
const SHARDS: usize = 256;

/// What is found by a key that it holds itself. Several entries may have one key.
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
        // All of them one and the same, until something is put in.
        let empty = Arc::new(HashTable::new());
        Self { shards: vec![empty; SHARDS], hasher: RandomState::new(), len: 0 }
    }
}

impl<T: Keyed> Table<T> {
    pub fn len(&self) -> usize {
        self.len
    }

    /// One of those that have that key.
    pub fn get(&self, key: &T::Key<'_>) -> Option<&T> {
        let hash = self.hasher.hash_one(key);
        self.shards[shard(hash)].find(hash, |entry| entry.has(key))
    }

    /// All that have that key, in no order.
    pub fn all<'a>(&'a self, key: T::Key<'_>) -> impl Iterator<Item = &'a T> {
        let hash = self.hasher.hash_one(&key);
        self.shards[shard(hash)].iter_hash(hash).filter(move |entry| entry.has(&key))
    }

    /// In no order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    /// Beside those that have the same key.
    pub fn add(&mut self, entry: T) {
        let hasher = &self.hasher;
        let hash = hasher.hash_one(entry.key());
        let shard = Arc::make_mut(&mut self.shards[shard(hash)]);
        shard.insert_unique(hash, entry, |entry| hasher.hash_one(entry.key()));
        self.len += 1;
    }

    /// Takes out the one with that key that `is` meant.
    pub fn take(&mut self, key: &T::Key<'_>, is: impl Fn(&T) -> bool) -> Option<T> {
        let hash = self.hasher.hash_one(key);
        let shard = &mut self.shards[shard(hash)];
        let meant = |entry: &T| entry.has(key) && is(entry);
        // What is not there is no reason to copy a shard.
        shard.find(hash, meant)?;
        let (taken, _) = Arc::make_mut(shard).find_entry(hash, meant).ok()?.remove();
        self.len -= 1;
        Some(taken)
    }

    /// What has that key, to be changed in all but its key; made by `new` if there is none.
    pub fn get_or_add(&mut self, key: &T::Key<'_>, new: impl FnOnce() -> T) -> &mut T {
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

/// By the bits in the middle: the table within uses the lowest and the highest.
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
