//! What becomes of a pod's traffic.

use serde::{Deserialize, Serialize};

/// What becomes of a pod's traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A tunnel carries it.
    Open,
    /// It is refused until a tunnel serves the pod.
    Closed,
    /// It passes in clear until a tunnel serves the pod.
    Bypassed,
    /// The pod cannot be enrolled.
    Refused,
    /// The pod's labels leave it alone.
    Plain,
}

impl State {
    pub const ALL: [Self; 5] = [Self::Open, Self::Closed, Self::Bypassed, Self::Refused, Self::Plain];

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
