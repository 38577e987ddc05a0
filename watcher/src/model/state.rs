//! The state of a pod's traffic.

use serde::{Deserialize, Serialize};

/// The state of a pod's traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A tunnel carries it.
    Open,
    /// It is refused until a tunnel serves the pod.
    Closed,
    /// It passes in plaintext until a tunnel serves the pod.
    Bypassed,
    /// The pod cannot be enrolled.
    Refused,
    /// No label enrols the pod.
    Plain,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Open, Self::Closed, Self::Bypassed, Self::Refused, Self::Plain];

    /// As in `watcher status` and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Closed => "closed",
            Self::Bypassed => "bypassed",
            Self::Refused => "refused",
            Self::Plain => "plain",
        }
    }
}
