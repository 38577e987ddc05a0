//! How often each rule decided, for each pod.

use crate::{plain_data, trace::Rule};

/// How many rules there is room for: a power of two, so that programs can mask a rule's number.
pub const MAX_RULES: usize = 32;

const _: () = {
    let mut at = 0;
    while at < Rule::ALL.len() {
        assert!((Rule::ALL[at] as usize) < MAX_RULES, "a rule has no counter");
        at += 1;
    }
};

/// Counts by the number of a [`Rule`]. Value of `verdicts`, one per processor, keyed by netns cookie
/// (`u64`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Verdicts {
    /// One count for each number, which only grows.
    pub by_rule: [u64; MAX_RULES],
}

/// The key for what belongs to no netns that has counts of its own.
pub const ELSEWHERE: u64 = 0;

/// The key for what was counted of netns that have no counts of their own any more. No netns has this
/// cookie.
pub const GONE: u64 = u64::MAX;

impl Verdicts {
    /// Nothing was decided yet.
    pub const NONE: Self = Self { by_rule: [0; MAX_RULES] };

    /// How often `rule` decided.
    #[must_use]
    pub const fn of(&self, rule: Rule) -> u64 {
        self.by_rule[rule as usize]
    }

    /// Adds the counts of `other`.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.by_rule.iter_mut().zip(other.by_rule) {
            *count = count.wrapping_add(more);
        }
    }

    /// The rules that decided at least once, with their counts.
    pub fn used(&self) -> impl Iterator<Item = (Rule, u64)> + '_ {
        Rule::ALL.iter().map(|rule| (*rule, self.of(*rule))).filter(|(_, count)| *count > 0)
    }
}

plain_data!(Verdicts);
