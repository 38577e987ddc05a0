//! The windows of one tunnel's streams.
//!
//! HTTP/2 has one initial window for all streams of a connection, and a change of it changes the
//! window of each open stream (RFC 9113 §6.9.2). So the tunnel has one size of window, which
//! doubles while some stream needs more, and halves as the streams become more.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use slab::Slab;
use tokio::time::{Instant, sleep_until};

use super::{MemoryBudget, SendQueue, difference};

/// The window of the first streams.
const INITIAL: u32 = 256 << 10;
/// No window is smaller, however little memory is left: about the default of HTTP/2.
const SMALLEST: u32 = 64 << 10;
/// For all windows of a tunnel together, while they are larger than the smallest.
const TUNNEL: usize = 16 << 20;
/// A stream that takes a whole window in less time may need a larger one. Within the round trips
/// that occur between sites, so that one window per round trip is no limit.
const QUICK: Duration = Duration::from_millis(100);

/// h2 remembers each stream that was reset for [`RESET_REMEMBERED`], at most [`RESETS`] of them. Data
/// that was on its way to one that it has forgotten counts as the peer's error, and 1,024 of these
/// end the tunnel for all. So a tunnel leaves before that: it takes no new streams.
pub(crate) const RESETS: usize = 4096;
pub(crate) const RESET_REMEMBERED: Duration = Duration::from_secs(10);
/// Within [`RESET_REMEMBERED`]. Twice as many may be remembered, since that time is counted from the
/// first one; and some are left for the streams that are open then.
const RESETS_UNTIL_LEAVING: usize = RESETS / 2 - 512;

/// What the driver of a tunnel has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TunnelChange {
    /// Tell the peer of this window, and call [`TunnelMemory::announced`].
    Window(u32),
    /// Take no new streams.
    Leave,
}

/// One tunnel, as its streams and its driver see it.
#[derive(Clone, Debug)]
pub(crate) struct TunnelMemory(Rc<Tunnel>);

#[derive(Debug)]
pub(super) struct Tunnel {
    budget: Arc<MemoryBudget>,
    /// As configured.
    largest: u32,
    /// What the window of each stream should be.
    window: Cell<u32>,
    /// What the peer was told.
    announced: Cell<u32>,
    /// How much each open stream holds.
    streams: RefCell<Slab<usize>>,
    /// Whether somebody relies on it without a stream.
    relied_on: Cell<bool>,
    /// How much streams hold beyond the window: it was larger when they received it.
    beyond: Cell<usize>,
    /// What is promised in the budget.
    promised: Cell<usize>,
    /// What its streams have queued to be sent.
    queued: Cell<usize>,
    /// What of that the budget knows: in steps, so that messages of ordinary streams do not touch what
    /// all workers share.
    queued_shown: Cell<usize>,
    /// When the last stream ended.
    unused_since: Cell<Instant>,
    /// Streams that were reset since then.
    resets: Cell<(usize, Instant)>,
    leaving: Cell<Leaving>,
    /// The last change has to wait until the peer acknowledged the one before.
    waits: Cell<bool>,
    driver: RefCell<Option<Waker>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    No,
    /// The driver does not know yet.
    Soon,
    Yes,
}

impl TunnelMemory {
    pub(crate) fn new(budget: &Arc<MemoryBudget>, largest: u32) -> Self {
        let window = fitting(INITIAL.min(largest), 1, budget.room());
        Self(Rc::new(Tunnel {
            budget: Arc::clone(budget),
            largest,
            window: Cell::new(window),
            announced: Cell::new(window),
            streams: RefCell::default(),
            relied_on: Cell::default(),
            beyond: Cell::new(0),
            promised: Cell::new(0),
            queued: Cell::new(0),
            queued_shown: Cell::new(0),
            unused_since: Cell::new(Instant::now()),
            resets: Cell::new((0, Instant::now())),
            leaving: Cell::new(Leaving::No),
            waits: Cell::new(false),
            driver: RefCell::default(),
        }))
    }

    /// For the first SETTINGS.
    pub(crate) fn initial_window(&self) -> u32 {
        self.0.announced.get()
    }

    /// The number of open streams.
    pub(crate) fn streams(&self) -> usize {
        self.0.streams.borrow().len()
    }

    /// A stream was opened.
    pub(crate) fn stream(&self) -> StreamMemory {
        let tunnel = Rc::clone(&self.0);
        let key = tunnel.streams.borrow_mut().insert(0);
        let (streams, room) = (self.streams(), tunnel.budget.room() + tunnel.promised.get());
        if streams == 1 {
            tunnel.wake_driver();
        }
        let window = fitting(tunnel.window.get(), streams, room);
        if window == tunnel.window.get() {
            tunnel.update_promise();
        } else {
            tunnel.resize(window);
        }
        StreamMemory { tunnel, key, taken: 0, since: Instant::now() }
    }

    /// For what is kept between its streams and its connection.
    pub(crate) fn buffers(&self) -> TunnelBuffers {
        TunnelBuffers { tunnel: Rc::clone(&self.0), kept: 0 }
    }

    /// Whether it takes no new streams.
    pub(crate) fn is_leaving(&self) -> bool {
        self.0.leaving.get() != Leaving::No
    }

    /// Somebody relies on the tunnel, and opens no stream in it.
    pub(crate) fn rely(&self) {
        if !self.0.relied_on.replace(true) {
            self.0.wake_driver();
        }
    }

    /// Whether that was so since this was asked last.
    pub(crate) fn was_relied_on(&self) -> bool {
        self.0.relied_on.take()
    }

    /// Resolves when a stream is open, or somebody relies on the tunnel without one.
    pub(crate) async fn used(&self) {
        poll_fn(|cx| {
            if self.streams() > 0 || self.0.relied_on.get() {
                return Poll::Ready(());
            }
            self.0.driven_by(cx);
            Poll::Pending
        })
        .await;
    }

    /// Resolves when no stream was open for as long as `limit`.
    pub(crate) async fn unused_for(&self, limit: Duration) {
        loop {
            let since = if self.streams() == 0 { self.0.unused_since.get() } else { Instant::now() };
            if since.elapsed() >= limit {
                return;
            }
            sleep_until(since + limit).await;
        }
    }

    /// Resolves with what the driver has to do.
    pub(crate) async fn changed(&self) -> TunnelChange {
        poll_fn(|cx| {
            let tunnel = &self.0;
            if tunnel.leaving.get() == Leaving::Soon {
                tunnel.leaving.set(Leaving::Yes);
                return Poll::Ready(TunnelChange::Leave);
            }
            if tunnel.window == tunnel.announced || tunnel.waits.take() {
                tunnel.driven_by(cx);
                return Poll::Pending;
            }
            Poll::Ready(TunnelChange::Window(tunnel.window.get()))
        })
        .await
    }

    /// `done`: whether the peer is told of `window`. If not, since it has not acknowledged the last
    /// change, its acknowledgement wakes the driver, which asks again.
    pub(crate) fn announced(&self, window: u32, done: bool) {
        if done {
            self.0.announced.set(window);
        }
        self.0.waits.set(!done);
    }
}

/// In such steps a budget learns of what is queued.
const QUEUE_STEP: usize = 64 << 10;

/// The largest window up to `window` with which `streams` fit into `room` and into a tunnel.
fn fitting(mut window: u32, streams: usize, room: usize) -> u32 {
    while window > SMALLEST && streams.saturating_mul(window as usize) > room.min(TUNNEL) {
        window = (window / 2).max(SMALLEST);
    }
    window
}

impl Tunnel {
    fn grow(&self) {
        let window = self.window.get().saturating_mul(2).min(self.largest);
        let streams = self.streams.borrow().len();
        let room = self.budget.room() + self.promised.get();
        if window > self.window.get() && fitting(window, streams, room) == window {
            self.resize(window);
        }
    }

    fn resize(&self, window: u32) {
        self.window.set(window);
        let beyond = |(_, held): (usize, &usize)| held.saturating_sub(window as usize);
        self.beyond.set(self.streams.borrow().iter().map(beyond).sum());
        self.update_promise();
        self.wake_driver();
    }

    fn driven_by(&self, cx: &Context<'_>) {
        match &mut *self.driver.borrow_mut() {
            Some(driver) => driver.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }

    fn wake_driver(&self) {
        if let Some(driver) = &*self.driver.borrow() {
            driver.wake_by_ref();
        }
    }

    fn update_promise(&self) {
        let windows = self.streams.borrow().len().saturating_mul(self.window.get() as usize);
        let promised = windows.saturating_add(self.beyond.get());
        let before = self.promised.replace(promised);
        if promised != before {
            self.budget.promise(difference(promised, before));
        }
    }

    pub(super) fn queued(&self) -> usize {
        self.queued.get()
    }

    /// Whether pod and process hold less than they may.
    pub(super) fn has_memory(&self) -> bool {
        self.budget.has_memory()
    }

    pub(super) fn queue(&self, change: impl FnOnce(usize) -> usize) {
        let queued = change(self.queued.get());
        self.queued.set(queued);
        let shown = queued - queued % QUEUE_STEP;
        let before = self.queued_shown.replace(shown);
        if shown != before {
            self.budget.queue(before, shown);
        }
    }

    fn hold(&self, key: usize, change: impl FnOnce(usize) -> usize) {
        let window = self.window.get() as usize;
        let (before, after) = {
            let mut streams = self.streams.borrow_mut();
            let held = &mut streams[key];
            let before = std::mem::replace(held, change(*held));
            (before, *held)
        };
        self.budget.hold(difference(after, before));
        let beyond = self.beyond.get() + after.saturating_sub(window) - before.saturating_sub(window);
        if self.beyond.replace(beyond) != beyond {
            self.update_promise();
        }
    }
}

/// The part of its connection's buffers. Dropped with the connection.
#[derive(Debug)]
pub(crate) struct TunnelBuffers {
    tunnel: Rc<Tunnel>,
    kept: usize,
}

impl TunnelBuffers {
    /// They keep so many bytes now.
    pub(crate) fn keep(&mut self, bytes: usize) {
        let before = std::mem::replace(&mut self.kept, bytes);
        if before != bytes {
            self.tunnel.queue(|queued| queued - before + bytes);
        }
    }

    /// Whether pod and process hold less than they may.
    pub(crate) fn has_room(&self) -> bool {
        self.tunnel.has_memory()
    }
}

impl Drop for TunnelBuffers {
    fn drop(&mut self) {
        self.keep(0);
    }
}

/// One stream's part. Dropped with the stream.
#[derive(Debug)]
pub(crate) struct StreamMemory {
    tunnel: Rc<Tunnel>,
    key: usize,
    /// Bytes that the socket took since `since`.
    taken: usize,
    since: Instant,
}

impl StreamMemory {
    /// For what the stream sends.
    pub(crate) fn send_queue(&self) -> SendQueue {
        SendQueue::new(&self.tunnel)
    }

    /// `bytes` have arrived that the socket does not take now.
    pub(crate) fn hold(&self, bytes: usize) {
        self.tunnel.hold(self.key, |held| held + bytes);
    }

    /// The socket took `bytes` of what was held.
    pub(crate) fn release(&self, bytes: usize) {
        self.tunnel.hold(self.key, |held| held.saturating_sub(bytes));
    }

    /// The stream was reset.
    pub(crate) fn reset(&self) {
        let (now, tunnel) = (Instant::now(), &self.tunnel);
        let (count, since) = tunnel.resets.get();
        let (count, since) = if now - since < RESET_REMEMBERED { (count + 1, since) } else { (1, now) };
        tunnel.resets.set((count, since));
        if count >= RESETS_UNTIL_LEAVING && tunnel.leaving.get() == Leaving::No {
            tunnel.leaving.set(Leaving::Soon);
            tunnel.wake_driver();
        }
    }

    /// The socket took `bytes`, held before or not. If it is quick, the window may grow.
    pub(crate) fn taken(&mut self, bytes: usize) {
        self.taken += bytes;
        if self.taken >= self.tunnel.window.get() as usize {
            let now = Instant::now();
            if now - self.since <= QUICK {
                self.tunnel.grow();
            }
            (self.taken, self.since) = (0, now);
        }
    }
}

impl Drop for StreamMemory {
    fn drop(&mut self) {
        self.tunnel.hold(self.key, |_| 0);
        self.tunnel.streams.borrow_mut().remove(self.key);
        self.tunnel.unused_since.set(Instant::now());
        self.tunnel.update_promise();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryMetrics;

    const LARGEST: u32 = 4 << 20;

    fn budget(limit: usize) -> (Arc<MemoryBudget>, MemoryMetrics) {
        let metrics = MemoryMetrics::default();
        (MemoryBudget::new(limit, metrics.clone()), metrics)
    }

    /// Takes whole windows at once, `times` times.
    fn quick(stream: &mut StreamMemory, times: usize) {
        for _ in 0..times {
            let window = stream.tunnel.window.get() as usize;
            stream.taken(window);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_doubles_while_its_socket_is_quick() {
        let tunnel = TunnelMemory::new(&budget(1 << 30).0, LARGEST);
        let mut stream = tunnel.stream();
        for _ in 0..20 {
            tokio::time::advance(2 * QUICK).await;
            quick(&mut stream, 1);
        }
        assert_eq!(tunnel.0.window.get(), INITIAL);
        quick(&mut stream, 2);
        assert_eq!(tunnel.0.window.get(), 4 * INITIAL);
        quick(&mut stream, 9);
        assert_eq!(tunnel.0.window.get(), LARGEST);
    }

    #[tokio::test(start_paused = true)]
    async fn windows_shrink_as_streams_become_more_and_never_have_more_than_their_tunnel() {
        let (budget, metrics) = budget(1 << 30);
        let tunnel = TunnelMemory::new(&budget, LARGEST);
        let mut streams = vec![tunnel.stream()];
        quick(&mut streams[0], 9);
        while streams.len() < 200 {
            streams.push(tunnel.stream());
            let all = streams.len() * tunnel.0.window.get() as usize;
            assert!(all <= TUNNEL, "{} streams", streams.len());
            assert_eq!(usize::try_from(metrics.promised.get()), Ok(all));
        }
        quick(&mut streams[0], 9);
        assert_eq!(tunnel.0.window.get(), SMALLEST, "no growth without room");
        streams.truncate(2);
        quick(&mut streams[0], 9);
        assert_eq!(tunnel.0.window.get(), LARGEST);
        drop(streams);
        assert_eq!((metrics.promised.get(), metrics.held.get()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_streams_of_a_pod_stay_within_its_budget_and_a_smallest_window_each() {
        let (process, metrics) = budget(1 << 30);
        let pod = process.of_pod(128 << 20);
        let tunnels: Vec<_> = (0..10).map(|_| TunnelMemory::new(&pod, LARGEST)).collect();
        let streams: Vec<_> = (0..1000).map(|number| tunnels[number % 10].stream()).collect();
        let all = usize::try_from(metrics.promised.get()).unwrap();
        assert!(all <= (128 << 20) + 1000 * SMALLEST as usize, "{all}");
        let other = TunnelMemory::new(&process.of_pod(128 << 20), LARGEST);
        let mut one = other.stream();
        quick(&mut one, 9);
        assert_eq!(other.0.window.get(), LARGEST, "another pod has its own budget");
        drop(streams);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_received_with_a_larger_window_stays_promised_until_the_socket_took_it() {
        let (budget, metrics) = budget(1 << 30);
        let tunnel = TunnelMemory::new(&budget, LARGEST);
        let mut stalled = tunnel.stream();
        quick(&mut stalled, 9);
        stalled.hold(LARGEST as usize);
        let more: Vec<_> = (0..99).map(|_| tunnel.stream()).collect();
        let windows = 100 * i64::from(tunnel.0.window.get());
        let beyond = i64::from(LARGEST - tunnel.0.window.get());
        assert_eq!(metrics.promised.get(), windows + beyond);
        stalled.release(LARGEST as usize);
        assert_eq!((metrics.promised.get(), metrics.held.get()), (windows, 0));
        drop(more);
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_leaves_before_h2_forgets_streams_that_were_reset() {
        let tunnel = TunnelMemory::new(&budget(1 << 30).0, LARGEST);
        // Many, but slowly.
        for _ in 0..10 * RESETS {
            tunnel.stream().reset();
            tokio::time::advance(RESET_REMEMBERED / 1000).await;
        }
        assert!(!tunnel.is_leaving());
        for _ in 0..RESETS_UNTIL_LEAVING {
            tunnel.stream().reset();
        }
        assert!(tunnel.is_leaving());
        assert_eq!(tunnel.changed().await, TunnelChange::Leave);
        assert_eq!(futures_util::poll!(Box::pin(tunnel.changed())), Poll::Pending, "once");
    }

    #[tokio::test]
    async fn a_change_that_cannot_be_announced_yet_is_asked_for_again() {
        let tunnel = TunnelMemory::new(&budget(1 << 30).0, LARGEST);
        let mut stream = tunnel.stream();
        quick(&mut stream, 1);
        let change = tunnel.changed().await;
        let TunnelChange::Window(window) = change else { panic!("{change:?}") };
        tunnel.announced(window, false);
        let mut again = Box::pin(tunnel.changed());
        assert_eq!(futures_util::poll!(&mut again), Poll::Pending);
        assert_eq!(again.await, change);
        tunnel.announced(window, true);
        assert_eq!(futures_util::poll!(Box::pin(tunnel.changed())), Poll::Pending);
    }
}
