//! Tunnels shared by the connections of one worker.
//!
//! Only connections with the same [`TunnelKey`] share a tunnel. Full tunnels, and tunnels whose
//! server is leaving (GOAWAY), are skipped. Requests that find no tunnel share one handshake. No
//! lock is held across an await: a worker is one thread.

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
use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{LocalBoxFuture, Shared},
};
use h2::{Reason, client::SendRequest};
use http::{Request, Response, StatusCode};
use tokio::{
    task::spawn_local,
    time::{Instant, sleep_until, timeout},
};

use super::client::{ConnectError, PeerTunnel};
use crate::{
    config,
    identity::{CertificateChain, Identity, until},
    memory::TunnelMemory,
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
}

/// The tunnels with one key.
#[derive(Default)]
struct Group {
    members: RefCell<Vec<Rc<Member>>>,
    opening: RefCell<Option<Opening>>,
}

/// The handshake in progress. It runs in its own task, so that a client that gives up does not
/// affect the others.
type Opening = Shared<LocalBoxFuture<'static, Result<(), Arc<ConnectError>>>>;

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("members", &self.members).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Member {
    requests: SendRequest<Bytes>,
    streams: Cell<u32>,
    unused_since: Cell<Instant>,
    /// Whether the server has ever answered. Until then it may still refuse our certificate.
    proven: Cell<bool>,
    chain: CertificateChain,
    memory: TunnelMemory,
    metrics: PoolMetrics,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

/// One stream's place in a tunnel. Keep it as long as the stream.
#[derive(Debug)]
pub(crate) struct StreamLease(Rc<Member>);

impl StreamLease {
    fn new(member: &Rc<Member>) -> Self {
        member.streams.set(member.streams.get() + 1);
        member.metrics.streams.inc();
        Self(Rc::clone(member))
    }

    /// The certificates of the peer.
    pub(crate) fn chain(&self) -> &CertificateChain {
        &self.0.chain
    }
}

impl Drop for StreamLease {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.metrics.streams.dec();
        self.0.unused_since.set(Instant::now());
    }
}

impl TunnelPool {
    pub(crate) fn new(limits: config::PoolConfig, metrics: PoolMetrics) -> Self {
        Self(Rc::new(Inner { limits, metrics, groups: RefCell::default() }))
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
        let mut attempt = 1;
        loop {
            let lease = self.lease(key, &dial).await?;
            let limit = self.0.limits.answer_limit;
            let Ok(sent) = timeout(limit, send(&lease, request.clone())).await else {
                return Err(Arc::new(ConnectError::NoAnswer { peer, limit }));
            };
            let error = match sent {
                Ok((response, stream)) if response.status() == StatusCode::OK => {
                    return Ok((response, stream, lease));
                }
                Ok((response, _)) => return Err(Arc::new(ConnectError::Status(response.status()))),
                Err(error) => error,
            };
            if attempt == ATTEMPTS || !may_be_repeated(&error, &lease) {
                return Err(Arc::new(ConnectError::Stream { peer, source: error.into() }));
            }
            attempt += 1;
            self.0.remove(key, &lease.0);
        }
    }

    /// Releases all tunnels from `netns`, so that it can be deleted. Open streams finish.
    pub(crate) fn forget(&self, netns: NetnsId) {
        self.0.groups.borrow_mut().retain(|key, _| key.netns != netns);
    }

    /// The number of tunnels for `key`.
    #[cfg(test)]
    pub(crate) fn tunnels(&self, key: &TunnelKey) -> usize {
        self.0.groups.borrow().get(key).map_or(0, |group| group.members.borrow().len())
    }

    async fn lease<F>(&self, key: &TunnelKey, dial: &impl Fn() -> F) -> Result<StreamLease, Arc<ConnectError>>
    where
        F: Future<Output = Result<PeerTunnel, ConnectError>> + 'static,
    {
        loop {
            let group = Rc::clone(self.0.groups.borrow_mut().entry(key.clone()).or_default());
            if let Some(lease) = self.0.room(&group) {
                return Ok(lease);
            }
            let opening = group
                .opening
                .borrow_mut()
                .get_or_insert_with(|| self.0.start_opening(key.clone(), &group, dial()))
                .clone();
            if let Err(error) = opening.await {
                self.0.prune(key);
                return Err(error);
            }
        }
    }
}

impl Inner {
    fn room(&self, group: &Group) -> Option<StreamLease> {
        let members = group.members.borrow();
        let free = |member: &&Rc<Member>| {
            let peers_limit = member.requests.current_max_send_streams();
            (member.streams.get() as usize) < peers_limit.min(self.limits.max_streams as usize)
        };
        members.iter().find(free).map(StreamLease::new)
    }

    fn start_opening(
        self: &Rc<Self>,
        key: TunnelKey,
        group: &Rc<Group>,
        dialling: impl Future<Output = Result<PeerTunnel, ConnectError>> + 'static,
    ) -> Opening {
        let (pool, group) = (Rc::clone(self), Rc::clone(group));
        #[expect(clippy::disallowed_methods, reason = "who waits for the tunnel holds the handle")]
        let task = spawn_local(async move {
            let dialled = dialling.await;
            // Before the waiters wake up, so that the next request starts a new handshake.
            group.opening.borrow_mut().take();
            let PeerTunnel { requests, driver, chain, memory, end, .. } = dialled?;
            pool.metrics.connections.inc();
            let member = Rc::new(Member {
                metrics: pool.metrics.clone(),
                requests,
                streams: Cell::new(0),
                unused_since: Cell::new(Instant::now()),
                proven: Cell::new(false),
                chain,
                memory,
            });
            let watched = Rc::downgrade(&member);
            group.members.borrow_mut().push(member);
            #[expect(
                clippy::disallowed_methods,
                reason = "it ends with its connection, and takes the tunnel from the pool then"
            )]
            spawn_local(drive(Rc::downgrade(&pool), key, watched, driver, end));
            Ok(())
        });
        task.map(|ended| ended.unwrap_or(Err(ConnectError::Abandoned)).map_err(Arc::new))
            .boxed_local()
            .shared()
    }

    fn remove(&self, key: &TunnelKey, member: &Rc<Member>) {
        if let Some(group) = self.groups.borrow().get(key) {
            group.members.borrow_mut().retain(|other| !Rc::ptr_eq(other, member));
        }
        self.prune(key);
    }

    /// Removes a key that has no tunnels.
    fn prune(&self, key: &TunnelKey) {
        let mut groups = self.groups.borrow_mut();
        let Some(group) = groups.get(key) else { return };
        if group.members.borrow().is_empty() && group.opening.borrow().is_none() {
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
            let since = if member.streams.get() == 0 { member.unused_since.get() } else { Instant::now() };
            let until = since + pool.limits.idle;
            if until <= Instant::now() {
                return pool.remove(&key, &member);
            }
            drop((pool, member)); // while asleep we must not be what keeps the tunnel
            sleep_until(until).await;
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

enum SendError {
    /// The tunnel did not accept the request.
    NotSent(h2::Error),
    NotAnswered(h2::Error),
}

impl From<SendError> for h2::Error {
    fn from(error: SendError) -> Self {
        let (SendError::NotSent(error) | SendError::NotAnswered(error)) = error;
        error
    }
}

async fn send(lease: &StreamLease, request: Request<()>) -> Result<(Response<()>, HboneStream), SendError> {
    let mut requests = lease.0.requests.clone().ready().await.map_err(SendError::NotSent)?;
    let (response, send) = requests.send_request(request, false).map_err(SendError::NotSent)?;
    let memory = lease.0.memory.stream();
    let (head, recv) = response.await.map_err(SendError::NotAnswered)?.into_parts();
    lease.0.proven.set(true);
    Ok((Response::from_parts(head, ()), HboneStream::new(send, recv, memory)))
}

/// Whether the request may be sent again: the server left before it (RFC 9113 §6.8), or refused the
/// stream unprocessed (§8.7). If the tunnel broke, the server may have connected to the application
/// already, but no byte of this client was sent, so a retry is safe then too.
fn may_be_repeated(error: &SendError, lease: &StreamLease) -> bool {
    let proven = lease.0.proven.get();
    match error {
        SendError::NotSent(error) => proven || error.is_go_away(),
        SendError::NotAnswered(error) => {
            error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM) || (proven && error.is_io())
        }
    }
}

#[cfg(test)]
mod tests;
