//! Counters by labels, where the number of label sets is limited.
//!
//! Labels come from names that others choose: a peer describes itself, a Job has a new name each
//! time. Beyond the limit everything counts in one set whose names are `overflow`. A set that
//! nothing used for an hour goes, unless a connection still holds it. If it comes back it starts at
//! zero, which `rate()` and `increase()` take for what it is: the reset of a counter.

use std::{
    fmt,
    hash::{BuildHasher, Hash, RandomState},
    ops::Deref,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hashbrown::HashTable;

/// How long a set is kept after its last use.
const UNUSED: Duration = Duration::from_hours(1);

/// The value of labels beyond the limit.
pub(super) const OVERFLOW: &str = "overflow";

/// Labels that can be folded into one set.
pub(crate) trait Labels: Clone + Eq + Hash {
    /// The same with [`OVERFLOW`] in place of every name that others choose.
    fn overflow(&self) -> Self;
}

/// One set, and what is counted in it.
#[derive(Debug)]
pub(crate) struct LabelSet<L, V> {
    pub(super) labels: L,
    values: V,
    /// Seconds from the start of the process to its last use.
    used: AtomicU64,
}

impl<L, V> Deref for LabelSet<L, V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.values
    }
}

type Table<L, V> = HashTable<Arc<LabelSet<L, V>>>;

/// The sets by their labels. Those without names do not count against the limit.
struct Sets<L, V> {
    named: Table<L, V>,
    overflow: Table<L, V>,
}

/// All sets of a family.
pub(crate) struct LabelSets<L, V> {
    most: usize,
    sets: RwLock<Sets<L, V>>,
    hasher: RandomState,
    began: Instant,
}

impl<L, V> fmt::Debug for LabelSets<L, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LabelSets").field("most", &self.most).finish_non_exhaustive()
    }
}

impl<L: Labels, V: Default> LabelSets<L, V> {
    /// At most `most`, and those of [`Labels::overflow`].
    pub(super) fn new(most: usize) -> Self {
        let sets = Sets { named: Table::new(), overflow: Table::new() };
        Self { most, sets: RwLock::new(sets), hasher: RandomState::new(), began: Instant::now() }
    }

    /// The set of `labels`. Costs a connection one hash of its labels and a read lock.
    pub(crate) fn get(&self, labels: L) -> Arc<LabelSet<L, V>> {
        self.get_at(labels, Instant::now())
    }

    /// Those that are in use, or were within the last hour.
    pub(super) fn all(&self) -> Vec<Arc<LabelSet<L, V>>> {
        let mut sets = self.sets.write().unwrap_or_else(PoisonError::into_inner);
        self.remove_unused(&mut sets.named, Instant::now());
        // Copied out, so that workers do not wait while the text is written.
        sets.named.iter().chain(&sets.overflow).cloned().collect()
    }

    fn get_at(&self, labels: L, now: Instant) -> Arc<LabelSet<L, V>> {
        let seconds = now.duration_since(self.began).as_secs();
        let hash = self.hasher.hash_one(&labels);
        let find = |table: &Table<L, V>, hash, labels: &L| {
            let found = Arc::clone(table.find(hash, |set| set.labels == *labels)?);
            found.used.store(seconds, Ordering::Relaxed);
            Some(found)
        };
        if let Some(known) =
            find(&self.sets.read().unwrap_or_else(PoisonError::into_inner).named, hash, &labels)
        {
            return known;
        }
        let mut sets = self.sets.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = find(&sets.named, hash, &labels) {
            return known;
        }
        if sets.named.len() >= self.most {
            self.remove_unused(&mut sets.named, now);
        }
        let (table, hash, labels) = if sets.named.len() < self.most {
            (&mut sets.named, hash, labels)
        } else {
            let labels = labels.overflow();
            let hash = self.hasher.hash_one(&labels);
            if let Some(known) = find(&sets.overflow, hash, &labels) {
                return known;
            }
            (&mut sets.overflow, hash, labels)
        };
        let new = Arc::new(LabelSet { labels, values: V::default(), used: AtomicU64::new(seconds) });
        table.insert_unique(hash, Arc::clone(&new), |set| self.hasher.hash_one(&set.labels));
        new
    }

    fn remove_unused(&self, sets: &mut Table<L, V>, now: Instant) {
        let seconds = now.duration_since(self.began).as_secs();
        // With the lock held nobody else can take a handle on a set that is here alone.
        sets.retain(|set| {
            let age = seconds.saturating_sub(set.used.load(Ordering::Relaxed));
            Arc::strong_count(set) > 1 || age < UNUSED.as_secs()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;

    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    struct Name(String);

    impl Labels for Name {
        fn overflow(&self) -> Self {
            Self(OVERFLOW.to_owned())
        }
    }

    fn names(sets: &LabelSets<Name, Counter>) -> Vec<String> {
        let mut names: Vec<_> = sets.all().iter().map(|set| set.labels.0.clone()).collect();
        names.sort();
        names
    }

    fn name(name: &str) -> Name {
        Name(name.to_owned())
    }

    #[test]
    fn beyond_the_limit_all_count_in_one_set() {
        let sets = LabelSets::<Name, Counter>::new(3);
        for n in 0..1000 {
            sets.get(name(&n.to_string())).inc();
        }
        assert_eq!(names(&sets), ["0", "1", "2", OVERFLOW]);
        assert_eq!(sets.get(name("7")).get(), 997);
        assert_eq!(sets.get(name("1")).get(), 1, "what is known counts on");
    }

    #[test]
    fn a_set_goes_an_hour_after_its_last_use_and_makes_room() {
        let sets = LabelSets::<Name, Counter>::new(2);
        let at = |minutes| sets.began + Duration::from_mins(minutes);
        let held = sets.get_at(name("held"), at(0));
        sets.get_at(name("gone"), at(0)).inc();
        assert_eq!(sets.get_at(name("new"), at(59)).labels.0, OVERFLOW);
        assert_eq!(sets.get_at(name("new"), at(61)).labels.0, "new");
        drop(held);
        assert_eq!(sets.get_at(name("gone"), at(62)).get(), 0, "it starts again");
    }

    #[test]
    fn a_set_that_a_connection_holds_stays() {
        let sets = LabelSets::<Name, Counter>::new(1);
        let held = sets.get(name("held"));
        let later = sets.began + Duration::from_hours(5);
        assert_eq!(sets.get_at(name("other"), later).labels.0, OVERFLOW);
        held.inc();
        assert_eq!(sets.get_at(name("held"), later).get(), 1);
    }
}
