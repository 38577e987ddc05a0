//! How long the rig runs, with which seed, and with which builds.

#![expect(clippy::disallowed_methods, reason = "options of the test")]

use std::{env, path::PathBuf};

use testbed::program::{TestSize, binary};

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

/// The programs that watchers and tunnels start from in turn: this build, and the other one that
/// `ADIT_CLEAR_OTHER_WATCHER` and `ADIT_CLEAR_OTHER_TUNNEL` name. So every start is an upgrade, or a
/// rollback.
#[derive(Clone, Debug)]
pub struct Builds {
    pub watchers: Vec<PathBuf>,
    pub tunnels: Vec<PathBuf>,
}

impl Builds {
    /// As the environment says.
    pub fn get() -> Self {
        let of = |name: &str, other: &str| {
            [Some(binary(name)), env::var_os(other).map(PathBuf::from)].into_iter().flatten().collect()
        };
        Self {
            watchers: of("watcher", "ADIT_CLEAR_OTHER_WATCHER"),
            tunnels: of("ztunnel", "ADIT_CLEAR_OTHER_TUNNEL"),
        }
    }

    /// The next one of `builds`, of which so many were started.
    pub fn next(builds: &[PathBuf], started: &mut usize) -> PathBuf {
        let next = builds[*started % builds.len()].clone();
        *started += 1;
        next
    }
}

fn number(name: &str) -> Option<usize> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}: expected a number")))
}
