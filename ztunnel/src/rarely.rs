//! Log lines about what may happen very often.

mod per_peer;

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

pub(crate) use per_peer::PerPeer;

/// Says when the next line is due.
#[derive(Debug)]
pub(crate) struct Rarely {
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    left_out: u64,
}

impl Rarely {
    /// At most one line in each `interval`.
    pub(crate) const fn every(interval: Duration) -> Self {
        Self { interval, state: Mutex::new(State { last: None, left_out: 0 }) }
    }

    /// If a line is due now: how many were left out since the last one.
    pub(crate) fn due(&self) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some_and(|last| last.elapsed() < self.interval) {
            state.left_out += 1;
            return None;
        }
        state.last = Some(Instant::now());
        Some(std::mem::take(&mut state.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_out_is_counted() {
        let rarely = Rarely::every(Duration::from_hours(1));
        assert_eq!(rarely.due(), Some(0));
        assert_eq!([rarely.due(), rarely.due()], [None, None]);
        rarely.state.lock().unwrap().last = None;
        assert_eq!(rarely.due(), Some(2));
    }
}
