//! One tunnel of the pool, and a stream's place in it.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    task::{Context, Poll, Waker},
};

use h2::client::SendRequest;
use http::{Request, Response};
use tokio::time::Instant;

use crate::{
    config::PoolConfig,
    identity::CertificateChain,
    memory::{SendData, TunnelMemory},
    metrics::PoolMetrics,
    stream::HboneStream,
};

#[derive(Debug)]
pub(super) struct Member {
    requests: RefCell<SendRequest<SendData>>,
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

impl Member {
    pub(super) fn new(
        requests: SendRequest<SendData>,
        chain: CertificateChain,
        memory: TunnelMemory,
        metrics: PoolMetrics,
    ) -> Self {
        metrics.connections.inc();
        Self {
            requests: RefCell::new(requests),
            streams: Cell::new(0),
            unused_since: Cell::new(Instant::now()),
            proven: Cell::new(false),
            chain,
            memory,
            metrics,
        }
    }

    pub(super) fn streams(&self) -> u32 {
        self.streams.get()
    }

    /// As many as the peer allows, at most as configured.
    pub(super) fn has_place(&self, limits: &PoolConfig) -> bool {
        let peers_limit = self.requests.borrow().current_max_send_streams();
        (self.streams.get() as usize) < peers_limit.min(limits.max_streams as usize)
    }

    /// Whether new streams may still be opened: the peer has said no GOAWAY, and neither has the
    /// tunnel reset too many streams.
    pub(super) fn takes_streams(&self) -> bool {
        let mut requests = self.requests.borrow_mut();
        let ready = requests.poll_ready(&mut Context::from_waker(Waker::noop()));
        !matches!(ready, Poll::Ready(Err(_))) && !self.memory.is_leaving()
    }

    /// When the last stream ended; now, if one is open.
    pub(super) fn unused_since(&self) -> Instant {
        if self.streams.get() == 0 { self.unused_since.get() } else { Instant::now() }
    }
}

/// One stream's place in a tunnel. Keep it as long as the stream.
#[derive(Debug)]
pub(crate) struct StreamLease(Rc<Member>);

impl StreamLease {
    pub(super) fn new(member: &Rc<Member>) -> Self {
        member.streams.set(member.streams.get() + 1);
        member.metrics.streams.inc();
        Self(Rc::clone(member))
    }

    /// The certificates of the peer.
    pub(crate) fn chain(&self) -> &CertificateChain {
        &self.0.chain
    }

    /// Has it asked whether the peer is there, although no stream is opened.
    pub(crate) fn rely(&self) {
        self.0.memory.rely();
    }

    pub(super) fn member(&self) -> &Rc<Member> {
        &self.0
    }

    pub(super) fn is_proven(&self) -> bool {
        self.0.proven.get()
    }

    pub(super) async fn send(&self, request: Request<()>) -> Result<(Response<()>, HboneStream), SendError> {
        let requests = self.0.requests.borrow().clone();
        let mut requests = requests.ready().await.map_err(SendError::NotSent)?;
        let (response, send) = requests.send_request(request, false).map_err(SendError::NotSent)?;
        let memory = self.0.memory.stream();
        let (head, recv) = response.await.map_err(SendError::NotAnswered)?.into_parts();
        self.0.proven.set(true);
        Ok((Response::from_parts(head, ()), HboneStream::new(send, recv, memory)))
    }
}

impl Drop for StreamLease {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.metrics.streams.dec();
        self.0.unused_since.set(Instant::now());
    }
}

#[derive(Debug)]
pub(super) enum SendError {
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
