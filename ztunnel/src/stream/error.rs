//! Why copying ends early.

use std::{io, time::Duration};

use h2::Reason;

use crate::reason::FailureReason;

/// Why copying stopped before both sides ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("application connection broke")]
    Socket(#[source] io::Error),
    #[error("peer reset the stream: {0}")]
    Reset(Reason),
    #[error("tunnel broke")]
    Tunnel(#[source] h2::Error),
    #[error("half-closed and silent for {0:?} (stream.half_closed_limit)")]
    HalfClosed(Duration),
    #[error("silent for {0:?} (stream.idle_limit)")]
    Idle(Duration),
    #[error("cut")]
    Cut,
}

impl StreamError {
    /// For logs and metrics.
    pub(crate) fn reason(&self) -> FailureReason {
        match self {
            Self::HalfClosed(_) => FailureReason::HalfClosedLimit,
            Self::Idle(_) => FailureReason::IdleLimit,
            // What was cut says by itself why.
            Self::Socket(_) | Self::Reset(_) | Self::Tunnel(_) | Self::Cut => FailureReason::Broken,
        }
    }
}
