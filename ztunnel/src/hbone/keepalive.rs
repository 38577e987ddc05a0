//! Detects a dead peer. A peer is alive if any data arrived recently, or if it answers a ping.
//!
//! All data counts, not only the answer to the ping: on a slow link the ping waits behind data that
//! is in flight. A busy tunnel sends no pings, and neither does one without streams that nobody relies
//! on: that it is dead is found when it is used again.

use std::{cell::Cell, future::poll_fn, rc::Rc, time::Duration};

use h2::{Ping, PingPong};
use tokio::{
    io::AsyncRead,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::io::InspectReader;

use crate::memory::TunnelMemory;

/// A ping is sent after `SILENCE` without data. The peer counts as dead after `PATIENCE` without an
/// answer: at most 10 s in total.
const SILENCE: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(4);

/// The time of the last read.
#[derive(Clone, Debug)]
pub(super) struct LastActivity(Rc<Cell<Instant>>);

/// `io`, and the time of the last read from it.
pub(super) fn observed<T: AsyncRead>(io: T) -> (InspectReader<T, impl FnMut(&[u8])>, LastActivity) {
    let last = LastActivity(Rc::new(Cell::new(Instant::now())));
    let activity = last.clone();
    let io = InspectReader::new(io, move |data: &[u8]| {
        if !data.is_empty() {
            activity.0.set(Instant::now());
        }
    });
    (io, last)
}

impl LastActivity {
    fn since(&self, earlier: Instant) -> bool {
        self.0.get() > earlier
    }

    /// Resolves when the peer is dead and a stream of `tunnel` is open, or somebody relies on it. After
    /// a silence, the first stream is a reason to ask at once.
    pub(super) async fn until_dead(self, pings: Option<PingPong>, tunnel: TunnelMemory) {
        let Some(mut pings) = pings else { return std::future::pending().await };
        loop {
            tunnel.used().await;
            let before = self.0.get();
            sleep_until(before + SILENCE).await;
            if self.since(before) || (tunnel.streams() == 0 && !tunnel.was_relied_on()) {
                continue;
            }
            tunnel.was_relied_on();
            if pings.send_ping(Ping::opaque()).is_err() {
                return;
            }
            loop {
                let pinged = Instant::now();
                match timeout(PATIENCE, poll_fn(|cx| pings.poll_pong(cx))).await {
                    Ok(Ok(_)) => break,
                    // The answer is late, but other data arrived.
                    Err(_) if self.since(pinged) => {}
                    Ok(Err(_)) | Err(_) => return,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::duplex, task::LocalSet};

    use super::*;
    use crate::memory::{MemoryBudget, MemoryMetrics};

    /// How long a tunnel with the other end `far`, in which a stream is opened after `unused`, stays
    /// open; `None`: at least a minute.
    async fn life(unused: Duration, far: impl AsyncFnOnce(tokio::io::DuplexStream)) -> Option<Duration> {
        let (near, other) = duplex(1 << 16);
        let living = async {
            let (io, activity) = observed(near);
            let (_requests, mut connection) = h2::client::handshake(io).await.expect("handshake");
            let pings = connection.ping_pong();
            let begun = Instant::now();
            let budget = MemoryBudget::new(1 << 30, MemoryMetrics::default());
            let tunnel = TunnelMemory::new(&budget, 1 << 20);
            let dead = async {
                activity.until_dead(pings, tunnel.clone()).await;
                Some(begun.elapsed())
            };
            let used = async {
                sleep_until(begun + unused).await;
                let _stream = tunnel.stream();
                std::future::pending::<()>().await;
            };
            tokio::select! {
                life = dead => life,
                () = used => unreachable!(),
                _ = &mut connection => panic!("the connection ended by itself"),
                () = sleep_until(begun + Duration::from_mins(1)) => None,
            }
        };
        LocalSet::new()
            .run_until(async {
                tokio::select! {
                    life = living => life,
                    () = async { far(other).await; std::future::pending().await } => unreachable!(),
                }
            })
            .await
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_silent_is_given_up_within_ten_seconds_and_who_answers_is_not() {
        let silent = life(Duration::ZERO, async |_other| std::future::pending().await).await;
        assert!(silent.is_some_and(|life| life <= Duration::from_secs(10)), "{silent:?}");
        let answers = life(Duration::ZERO, async |other| {
            let mut server = h2::server::handshake(other).await.expect("handshake");
            while server.accept().await.is_some() {}
        });
        assert_eq!(answers.await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_without_streams_is_asked_nothing_until_it_is_used_again() {
        let unused = life(Duration::from_mins(2), async |_other| std::future::pending().await).await;
        assert_eq!(unused, None);
        let (used, limit) = (Duration::from_secs(50), Duration::from_secs(5));
        let silent = life(used, async |_other| std::future::pending().await).await;
        assert!(silent.is_some_and(|life| life > used && life <= used + limit), "{silent:?}");
    }

    /// As on a slow link, where the answer waits behind what was sent before.
    #[tokio::test(start_paused = true)]
    async fn who_is_heard_of_lives_without_an_answer() {
        // WINDOW_UPDATE of the connection, one byte (RFC 9113 §6.9), after empty SETTINGS.
        const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        const UPDATE: [u8; 13] = [0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let busy = life(Duration::ZERO, async |mut other| {
            use tokio::io::AsyncWriteExt as _;
            other.write_all(&SETTINGS).await.expect("write");
            loop {
                other.write_all(&UPDATE).await.expect("write");
                tokio::time::sleep(Duration::from_secs(3)).await;
            }
        });
        assert_eq!(busy.await, None);
    }
}
