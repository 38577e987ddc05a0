//! From single connections at known times to the times by which pods have changed, by isotonic
//! regression.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

/// Connections: when each was made, counted from the request, and whether it was of the new kind.
#[derive(Debug, Default)]
pub struct Samples(Vec<(Duration, bool)>);

impl Samples {
    /// Adds a connection that was made `after_micros` after the request.
    pub fn add(&mut self, after_micros: u128, is_new: bool) {
        self.0.push((Duration::from_micros(after_micros.try_into().unwrap_or(u64::MAX)), is_new));
    }

    /// From when on at least `share` of the connections are of the new kind; `None` if never. A pod
    /// that has changed stays changed, so the share can only grow: this fits the likeliest monotone
    /// curve (isotonic regression, by pooling neighbours that are out of order).
    pub fn reached(&mut self, share: f64) -> Option<Duration> {
        self.0.sort_unstable();
        // Since when, how many, how many of them new.
        let mut pools: Vec<(Duration, f64, f64)> = Vec::new();
        for (after, is_new) in &self.0 {
            let mut pool = (*after, 1.0, f64::from(u8::from(*is_new)));
            while let Some(before) = pools.pop_if(|before| before.2 / before.1 >= pool.2 / pool.1) {
                pool = (before.0, before.1 + pool.1, before.2 + pool.2);
            }
            pools.push(pool);
        }
        pools.into_iter().find(|(_, count, new)| new / count >= share).map(|(since, ..)| since)
    }
}

/// `count` times within `within`, one in each of as many equal parts of it, in no order.
pub(super) fn spread(count: usize, within: Duration) -> Vec<Duration> {
    let random = || RandomState::new().hash_one(0);
    let count = u64::try_from(count).expect("a number of pods");
    let mut order: Vec<(u64, u64)> = (0..count).map(|number| (random(), number)).collect();
    order.sort_unstable();
    let within = u64::try_from(within.as_micros()).expect("less than an age");
    let in_part = |number: u64| (number * within + random() % within) / count;
    order.into_iter().map(|(_, number)| Duration::from_micros(in_part(number))).collect()
}
