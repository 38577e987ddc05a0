//! The tunnels with one key, and the handshakes that open more of them.

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{LocalBoxFuture, Shared},
};
use tokio::{task::spawn_local, time::Instant};

use super::{
    Inner, TunnelKey, drive,
    member::{Member, StreamLease},
};
use crate::{
    config::PoolConfig,
    hbone::client::{ConnectError, PeerTunnel},
    metrics::PoolMetrics,
};

/// Streams are spread over so many tunnels before one is full: a tunnel is one TCP connection, which
/// a lost packet stops, and one worker at its far end.
const SPREAD: u32 = 4;
/// A tunnel with fewer streams is not joined by another, unless it is full.
const FEW_STREAMS: u32 = 8;
/// Handshakes at once. Each may serve as many requests as a tunnel has streams.
const HANDSHAKES: usize = 16;
/// After a tunnel that nobody waited for could not be opened, the next try has to wait so long.
const PAUSE: Duration = Duration::from_secs(1);

/// The tunnels with one key.
#[derive(Debug, Default)]
pub(super) struct Group {
    members: RefCell<Vec<Rc<Member>>>,
    handshakes: RefCell<Vec<Rc<Handshake>>>,
    failed: Cell<Option<Instant>>,
}

/// A handshake in progress. It runs in its own task, so that a client that gives up does not affect
/// the others.
pub(super) struct Handshake {
    number: u64,
    waiting: Cell<u32>,
    done: Shared<LocalBoxFuture<'static, Result<(), Arc<ConnectError>>>>,
}

impl std::fmt::Debug for Handshake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handshake").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Handshake {
    /// Handshakes are numbered in the order in which they begin.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) async fn wait(&self) -> Result<(), Arc<ConnectError>> {
        self.done.clone().await
    }
}

/// What a new handshake needs of the pool.
pub(super) struct Opens {
    pub number: u64,
    pub key: TunnelKey,
    pub pool: Weak<Inner>,
    pub metrics: PoolMetrics,
}

impl Group {
    pub(super) fn is_empty(&self) -> bool {
        self.members.borrow().is_empty() && self.handshakes.borrow().is_empty()
    }

    #[cfg(test)]
    pub(super) fn tunnels(&self) -> usize {
        self.members.borrow().len()
    }

    pub(super) fn remove(&self, member: &Rc<Member>) {
        self.members.borrow_mut().retain(|other| !Rc::ptr_eq(other, member));
    }

    /// A place in the first tunnel that has few streams, so that little traffic needs few tunnels;
    /// else in the one with the fewest. Tunnels that are leaving are dropped; their streams finish.
    pub(super) fn place(&self, limits: &PoolConfig) -> Option<StreamLease> {
        let share = share(limits);
        loop {
            let members = self.members.borrow();
            let free = members.iter().filter(|member| member.has_place(limits));
            let few = free.clone().find(|member| member.streams() < share);
            let member = Rc::clone(few.or_else(|| free.min_by_key(|member| member.streams()))?);
            drop(members);
            if member.takes_streams() {
                return Some(StreamLease::new(&member));
            }
            self.remove(&member);
        }
    }

    /// Whether a further tunnel should be opened although there is room.
    pub(super) fn wants_another(&self, limits: &PoolConfig) -> bool {
        let members = self.members.borrow();
        let share = share(limits);
        members.len() < SPREAD as usize
            && members.iter().all(|member| member.streams() >= share)
            && self.handshakes.borrow().is_empty()
            && self.failed.get().is_none_or(|failed| failed.elapsed() >= PAUSE)
    }

    /// The handshake to wait for. `None`: begin one.
    pub(super) fn handshake(&self, limits: &PoolConfig) -> Option<Rc<Handshake>> {
        let handshakes = self.handshakes.borrow();
        let least = handshakes.iter().min_by_key(|handshake| handshake.waiting.get())?;
        let enough = least.waiting.get() < limits.max_streams || handshakes.len() >= HANDSHAKES;
        enough.then(|| {
            least.waiting.set(least.waiting.get().saturating_add(1));
            Rc::clone(least)
        })
    }

    /// Begins a handshake, with one request that waits for it.
    pub(super) fn begin(
        self: &Rc<Self>,
        opens: Opens,
        dialling: impl Future<Output = Result<PeerTunnel, ConnectError>> + 'static,
    ) -> Rc<Handshake> {
        let (group, number) = (Rc::clone(self), opens.number);
        #[expect(clippy::disallowed_methods, reason = "who waits for the tunnel holds the handle")]
        let task = spawn_local(async move {
            let dialled = dialling.await;
            // Before the waiters wake up, so that the next request begins a new handshake.
            group.handshakes.borrow_mut().retain(|handshake| handshake.number != number);
            group.failed.set(dialled.is_err().then(Instant::now));
            let PeerTunnel { requests, driver, chain, memory, end, .. } = dialled?;
            let member = Rc::new(Member::new(requests, chain, memory, opens.metrics));
            let watched = Rc::downgrade(&member);
            group.members.borrow_mut().push(member);
            #[expect(
                clippy::disallowed_methods,
                reason = "it ends with its connection, and takes the tunnel from the pool then"
            )]
            spawn_local(drive(opens.pool, opens.key, watched, driver, end));
            Ok(())
        });
        let done = task.map(|ended| ended.unwrap_or(Err(ConnectError::Abandoned)).map_err(Arc::new));
        let done = done.boxed_local().shared();
        let handshake = Rc::new(Handshake { number, waiting: Cell::new(1), done });
        self.handshakes.borrow_mut().push(Rc::clone(&handshake));
        handshake
    }
}

/// The streams of a tunnel above which another one is used, if there may be one.
fn share(limits: &PoolConfig) -> u32 {
    limits.max_streams.div_ceil(SPREAD).max(FEW_STREAMS)
}
