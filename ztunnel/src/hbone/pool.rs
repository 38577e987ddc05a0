//! Tunnels shared by the connections of one worker.
//!
//! Only connections with the same [`TunnelKey`] share a tunnel. No lock is held across an await: a
//! worker is one thread.
//!
//! * this file: from a request to its answer
//! * `group`: the tunnels with one key, and their handshakes
//! * `member`: one tunnel of it, and a stream's place in it

mod group;
mod member;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::Future,
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::Arc,
    time::SystemTime,
};

use adit_netns::NetnsId;
use h2::Reason;
use http::{Request, Response, StatusCode};
use tokio::time::{Instant, sleep_until, timeout};

use self::group::Group;
pub(crate) use self::member::StreamLease;
use self::member::{Member, SendError};
use super::client::{ConnectError, PeerTunnel};
use crate::{
    config,
    identity::{Identity, until},
    metrics::PoolMetrics,
    stream::HboneStream,
};

/// The properties that two connections must share to use one tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TunnelKey {
    pub source: Identity,
    pub expected: Vec<Identity>,
    pub peer: SocketAddr,
    /// The tunnel's socket is in the netns of one pod and uses that pod's address.
    pub netns: NetnsId,
}

/// Maximum number of attempts for a request whose tunnel broke before the answer.
const ATTEMPTS: usize = 4;

#[derive(Clone, Debug)]
pub(crate) struct TunnelPool(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    limits: config::PoolConfig,
    metrics: PoolMetrics,
    groups: RefCell<HashMap<TunnelKey, Rc<Group>>>,
    /// How many handshakes have begun.
    begun: Cell<u64>,
}

impl TunnelPool {
    pub(crate) fn new(limits: config::PoolConfig, metrics: PoolMetrics) -> Self {
        Self(Rc::new(Inner { limits, metrics, groups: RefCell::default(), begun: Cell::new(0) }))
    }

    /// Sends a CONNECT through a tunnel of `key`. If none has room, `dial` opens one.
    pub(crate) async fn open<F>(
        &self,
        key: &TunnelKey,
        request: &Request<()>,
        dial: impl Fn() -> F,
    ) -> Result<(Response<()>, HboneStream, StreamLease), Arc<ConnectError>>
    where
        F: Future<Output = Result<PeerTunnel, ConnectError>> + 'static,
    {
        let peer = key.peer;
        let mut attempts = 0;
        loop {
            let lease = self.lease(key, &dial).await?;
            let limit = self.0.limits.answer_limit;
            let Ok(sent) = timeout(limit, lease.send(request.clone())).await else {
                return Err(Arc::new(ConnectError::NoAnswer { peer, limit }));
            };
            let error = match sent {
                Ok((response, stream)) if response.status() == StatusCode::OK => {
                    return Ok((response, stream, lease));
                }
                Ok((response, _)) => return Err(Arc::new(ConnectError::Status(response.status()))),
                Err(error) => error,
            };
            // What was not sent costs no attempt: the tunnel was about to end, and is not used
            // again. Else a server that turns every new tunnel away would be dialled for ever.
            if !matches!(error, SendError::NotSent(_)) || !lease.is_proven() {
                attempts += 1;
            }
            if attempts == ATTEMPTS || !may_be_repeated(&error, &lease) {
                return Err(Arc::new(ConnectError::Stream { peer, source: error.into() }));
            }
            self.0.remove(key, lease.member());
        }
    }

    /// Makes sure that there is a tunnel of `key`, which then stays for as long as an unused one does.
    pub(crate) async fn reach<F>(
        &self,
        key: &TunnelKey,
        dial: impl Fn() -> F,
    ) -> Result<StreamLease, Arc<ConnectError>>
    where
        F: Future<Output = Result<PeerTunnel, ConnectError>> + 'static,
    {
        self.lease(key, &dial).await
    }

    /// Releases all tunnels from `netns`, so that it can be deleted. Open streams finish.
    pub(crate) fn forget(&self, netns: NetnsId) {
        self.0.groups.borrow_mut().retain(|key, _| key.netns != netns);
    }

    /// The number of tunnels for `key`.
    #[cfg(test)]
    pub(crate) fn tunnels(&self, key: &TunnelKey) -> usize {
        self.0.groups.borrow().get(key).map_or(0, |group| group.tunnels())
    }

    /// A place in a tunnel. Waits for a handshake if there is none. A handshake that fails fails
    /// those who were there when it began; who came later has the next one.
    async fn lease<F>(&self, key: &TunnelKey, dial: &impl Fn() -> F) -> Result<StreamLease, Arc<ConnectError>>
    where
        F: Future<Output = Result<PeerTunnel, ConnectError>> + 'static,
    {
        let came = self.0.begun.get();
        loop {
            let group = Rc::clone(self.0.groups.borrow_mut().entry(key.clone()).or_default());
            if let Some(lease) = group.place(&self.0.limits) {
                if group.wants_another(&self.0.limits) {
                    group.begin(self.0.opens(key), dial());
                }
                return Ok(lease);
            }
            let handshake =
                group.handshake(&self.0.limits).unwrap_or_else(|| group.begin(self.0.opens(key), dial()));
            match handshake.wait().await {
                Ok(()) => {}
                Err(error) if handshake.number() >= came => {
                    self.0.prune(key);
                    return Err(error);
                }
                Err(_) => self.0.prune(key),
            }
        }
    }
}

impl Inner {
    /// What a handshake needs to know, and its number.
    fn opens(self: &Rc<Self>, key: &TunnelKey) -> group::Opens {
        let number = self.begun.get();
        self.begun.set(number + 1);
        group::Opens { number, key: key.clone(), pool: Rc::downgrade(self), metrics: self.metrics.clone() }
    }

    fn remove(&self, key: &TunnelKey, member: &Rc<Member>) {
        if let Some(group) = self.groups.borrow().get(key) {
            group.remove(member);
        }
        self.prune(key);
    }

    /// Removes a key that has no tunnels.
    fn prune(&self, key: &TunnelKey) {
        let mut groups = self.groups.borrow_mut();
        if groups.get(key).is_some_and(|group| group.is_empty()) {
            groups.remove(key);
        }
    }
}

/// Drives one tunnel to its end. Removes it from the pool when it was unused for too long.
async fn drive(
    pool: Weak<Inner>,
    key: TunnelKey,
    member: Weak<Member>,
    mut driver: impl Future<Output = Result<(), h2::Error>> + Unpin,
    end: Option<SystemTime>,
) {
    let unused = async {
        loop {
            // Gone: removed from the pool, or about to end.
            let (Some(pool), Some(member)) = (pool.upgrade(), member.upgrade()) else { return };
            let due = member.unused_since() + pool.limits.idle;
            if due <= Instant::now() {
                return pool.remove(&key, &member);
            }
            drop((pool, member)); // while asleep we must not be what keeps the tunnel
            sleep_until(due).await;
        }
    };
    let expired = async {
        match end {
            Some(end) => until(end).await,
            None => std::future::pending().await,
        }
        if let (Some(pool), Some(member)) = (pool.upgrade(), member.upgrade()) {
            pool.remove(&key, &member);
        }
    };
    let ended = tokio::select! {
        ended = &mut driver => ended,
        () = expired => driver.await,
        // With no handle left, the driver closes the connection after the last stream.
        () = unused => driver.await,
    };
    if let Err(error) = ended {
        tracing::debug!(peer = %key.peer, %error, "tunnel ended");
    }
    if let (Some(pool), Some(member)) = (pool.upgrade(), member.upgrade()) {
        pool.remove(&key, &member);
    }
}

/// Whether the request may be sent again: the server left before it (RFC 9113 §6.8), or refused the
/// stream unprocessed (§8.7). If the tunnel broke, the server may have connected to the application
/// already, but no byte of this client was sent, so a retry is safe then too.
fn may_be_repeated(error: &SendError, lease: &StreamLease) -> bool {
    let proven = lease.is_proven();
    match error {
        SendError::NotSent(error) => proven || error.is_go_away(),
        SendError::NotAnswered(error) => {
            error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM) || (proven && error.is_io())
        }
    }
}

#[cfg(test)]
mod tests;
