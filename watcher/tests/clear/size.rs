//! How long the rig runs, and with which seed.

#![expect(clippy::disallowed_methods, reason = "options of the test")]

use testbed::program::TestSize;

/// What must have happened before the rig ends.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Pods that started.
    pub starts: usize,
    /// Watchers and tunnels that were killed or replaced.
    pub kills: usize,
    /// Nodes that lost everything that is pinned, with pods running.
    pub boots: usize,
    /// Of all random choices.
    pub seed: u64,
}

impl Size {
    /// As the environment says.
    pub fn get() -> Self {
        let size = TestSize::get();
        Self {
            starts: number("ADIT_CLEAR_STARTS").unwrap_or_else(|| size.pick(25, 1000)),
            kills: number("ADIT_CLEAR_KILLS").unwrap_or_else(|| size.pick(10, 100)),
            boots: number("ADIT_CLEAR_BOOTS").unwrap_or_else(|| size.pick(0, 20)),
            seed: number("ADIT_CLEAR_SEED").map_or_else(rand::random, |seed| seed as u64),
        }
    }
}

fn number(name: &str) -> Option<usize> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}: expected a number")))
}
