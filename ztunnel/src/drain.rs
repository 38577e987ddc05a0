//! Shutdown of the process: after the signal it accepts no more connections, lets the open ones
//! finish until the deadline, and closes the rest. Each pod does the same when it is removed
//! (`worker`).

use std::{io, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Time after the deadline for the workers to close the remaining connections.
const SLACK: Duration = Duration::from_secs(1);

/// Cancels `stop` at the first SIGTERM or SIGINT. The handler is installed when this returns. `POST
/// /quitquitquit` cancels the same token.
///
/// # Errors
/// The handlers cannot be installed.
#[expect(clippy::disallowed_methods, reason = "the caller keeps the handle")]
pub fn on_signal(stop: &CancellationToken) -> io::Result<JoinHandle<()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = stop.clone();
    Ok(tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            () = stop.cancelled() => return,
        };
        info!(signal = name, "shutdown signal received");
        stop.cancel();
    }))
}

/// Waits until all connections have `finished`, which must happen by the deadline: then they are
/// closed.
pub async fn drained(finished: impl Future<Output = ()>, deadline: Duration) {
    info!(deadline_secs = deadline.as_secs(), "draining");
    if timeout(deadline + SLACK, finished).await.is_ok() {
        info!("drained");
    } else {
        warn!("connections still open after the drain deadline; exiting");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_with_the_last_connection_or_at_the_deadline() {
        let begin = tokio::time::Instant::now();
        drained(async {}, Duration::from_mins(1)).await;
        assert_eq!(begin.elapsed(), Duration::ZERO);
        drained(std::future::pending(), Duration::from_mins(1)).await;
        assert_eq!(begin.elapsed(), Duration::from_secs(61));
    }
}
