//! What was read from sockets and waits in h2 until the peer's connection takes it.
//!
//! The window of a stream says what its peer allows, not what the peer's TCP takes. So what waits is
//! counted where it is kept: from the read until h2 has handed it to TLS, or has dropped it.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    task::{Context, Poll, Waker},
};

use bytes::{Buf, Bytes};

use super::tunnel::Tunnel;

/// What a stream may always queue, however little memory is left. One read.
const LEAST: usize = 16 << 10;
/// What the streams of a tunnel may queue together before each has only the least.
const TUNNEL: usize = 4 << 20;

/// What one stream has queued.
#[derive(Debug)]
struct Queued {
    tunnel: Rc<Tunnel>,
    bytes: Cell<usize>,
    /// Waits until less is queued.
    waiting: RefCell<Option<Waker>>,
}

/// The sending side of one stream, as its memory sees it.
#[derive(Clone, Debug)]
pub(crate) struct SendQueue(Rc<Queued>);

impl SendQueue {
    pub(super) fn new(tunnel: &Rc<Tunnel>) -> Self {
        let tunnel = Rc::clone(tunnel);
        Self(Rc::new(Queued { tunnel, bytes: Cell::new(0), waiting: RefCell::default() }))
    }

    /// How many bytes may be queued now.
    pub(crate) fn room(&self) -> usize {
        let tunnel = &self.0.tunnel;
        if tunnel.queued() < TUNNEL && tunnel.has_memory() {
            return usize::MAX; // h2 has a limit for each stream
        }
        LEAST.saturating_sub(self.0.bytes.get())
    }

    /// Ready when something may be queued. Without room, something of this very stream is queued, and
    /// wakes the task when it goes.
    pub(crate) fn poll_room(&self, cx: &Context<'_>) -> Poll<usize> {
        match self.room() {
            0 => {
                *self.0.waiting.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            }
            room => Poll::Ready(room),
        }
    }

    /// `data`, counted as `memory` bytes for as long as it is kept.
    pub(crate) fn data(&self, data: Bytes, memory: usize) -> SendData {
        self.0.bytes.set(self.0.bytes.get() + memory);
        self.0.tunnel.queue(|queued| queued + memory);
        SendData { data, counted: Some((Rc::clone(&self.0), memory)) }
    }
}

/// Data for h2, counted until it is dropped.
#[derive(Debug, Default)]
pub struct SendData {
    data: Bytes,
    counted: Option<(Rc<Queued>, usize)>,
}

/// Not counted.
impl From<Bytes> for SendData {
    fn from(data: Bytes) -> Self {
        Self { data, counted: None }
    }
}

impl Buf for SendData {
    fn remaining(&self) -> usize {
        self.data.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.data
    }

    fn advance(&mut self, count: usize) {
        self.data.advance(count);
    }
}

impl Drop for SendData {
    fn drop(&mut self) {
        if let Some((queued, memory)) = self.counted.take() {
            queued.bytes.set(queued.bytes.get() - memory);
            queued.tunnel.queue(|queued| queued - memory);
            if let Some(waiting) = queued.waiting.borrow_mut().take() {
                waiting.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::task::noop_waker_ref;

    use super::*;
    use crate::memory::{MemoryBudget, MemoryMetrics, TunnelMemory};

    fn data(queue: &SendQueue, bytes: usize) -> SendData {
        queue.data(vec![7; bytes].into(), bytes)
    }

    fn tunnel(limit: usize) -> (TunnelMemory, Arc<MemoryBudget>, MemoryMetrics) {
        let metrics = MemoryMetrics::default();
        let process = MemoryBudget::new(1 << 30, metrics.clone());
        let pod = process.of_pod(limit);
        (TunnelMemory::new(&pod, 1 << 20), pod, metrics)
    }

    #[tokio::test]
    async fn a_stream_queues_little_once_its_tunnel_or_the_pod_has_much() {
        for (limit, spent) in [(1 << 30, TUNNEL), (1 << 20, 1 << 20)] {
            let (memory, _pod, metrics) = tunnel(limit);
            let (full, other) = (memory.stream().send_queue(), memory.stream().send_queue());
            assert_eq!(full.room(), usize::MAX);
            let much = data(&full, spent);
            assert_eq!(usize::try_from(metrics.held.get()), Ok(spent));
            assert_eq!((full.room(), other.room()), (0, LEAST), "{limit}");
            let least = data(&other, LEAST);
            let cx = Context::from_waker(noop_waker_ref());
            assert_eq!(other.poll_room(&cx), Poll::Pending);
            drop(least);
            assert_eq!(other.poll_room(&cx), Poll::Ready(LEAST));
            drop(much);
            assert_eq!((full.room(), metrics.held.get()), (usize::MAX, 0));
        }
    }

    #[tokio::test]
    async fn who_waits_for_room_is_woken_by_its_own_data() {
        let (memory, ..) = tunnel(1 << 20);
        let queue = memory.stream().send_queue();
        let data = data(&queue, 1 << 20);
        let mut room = Box::pin(std::future::poll_fn(|cx| queue.poll_room(cx)));
        assert_eq!(futures_util::poll!(&mut room), Poll::Pending);
        drop(data);
        tokio::time::timeout(std::time::Duration::from_secs(5), room).await.expect("woken");
    }

    #[tokio::test]
    async fn what_is_queued_leaves_less_for_windows_and_outlives_its_tunnel() {
        let (memory, pod, metrics) = tunnel(1 << 20);
        let queue = memory.stream().send_queue();
        let data = data(&queue, 1 << 20);
        assert_eq!(pod.room(), 0);
        assert_eq!(TunnelMemory::new(&pod, 1 << 20).initial_window(), 64 << 10);
        drop((memory, queue));
        assert_eq!(metrics.held.get(), 1 << 20);
        drop(data);
        assert_eq!((metrics.held.get(), pod.room()), (0, 1 << 20));
    }
}
