//! Tells tunnels of workloads, services and policies: delta xDS.
//!
//! * [`wire`]: responses as bytes, and the gRPC service
//! * `requests`: requests as bytes
//! * `stream`: one tunnel, from its first request to the end
//! * `beginning`: how many tunnels begin at a time
//! * `channel`: the half of it that is about one kind
//! * `subscription`: what it wants of one kind, and what it has; pure

mod beginning;
mod channel;
mod requests;
mod stream;
mod subscription;
pub mod wire;

use std::{sync::Arc, time::Duration};

use futures_util::stream::BoxStream;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Status};
use tracing::{debug, info, warn};

use self::{
    beginning::Beginnings,
    requests::Requests,
    stream::{Ended, Stream},
    wire::EncodedResponse,
};
use crate::{callers::Callers, connection::Peer, metrics::Metrics, shares::Shares, source::Snapshots};

/// Limits of what one tunnel may take.
#[derive(Clone, Copy, Debug)]
pub struct StreamLimits {
    /// How long a tunnel may take to acknowledge a response. After that it is disconnected.
    pub acknowledge: Duration,
    /// How long workloads wait for a subscription to policies, which are told first.
    pub policies_first: Duration,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self { acknowledge: Duration::from_mins(1), policies_first: Duration::from_secs(1) }
    }
}

/// Large responses at a time, such as those of a roll-out.
const LARGE_AT_ONCE: usize = 16;
/// Streams of one node: a tunnel and its successor have one each, and some that broke are not noticed
/// yet.
const OF_NODE: usize = 8;
/// Responses that wait to be sent to a tunnel: one of each kind.
const WAITING: usize = 2;

/// The service.
#[derive(Clone, Debug)]
pub struct DiscoveryService {
    callers: Callers,
    snapshots: Snapshots,
    limits: StreamLimits,
    metrics: Arc<Metrics>,
    large: Arc<Semaphore>,
    beginnings: Beginnings,
    nodes: Shares<String>,
    streams: TaskTracker,
    stop: CancellationToken,
}

impl DiscoveryService {
    /// Tells what `snapshots` have, until `stop`.
    #[must_use]
    pub fn new(
        callers: Callers,
        snapshots: Snapshots,
        limits: StreamLimits,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Self {
        let (large, streams) = (Arc::new(Semaphore::new(LARGE_AT_ONCE)), TaskTracker::new());
        let (nodes, beginnings) = (Shares::default(), Beginnings::default());
        Self { callers, snapshots, limits, metrics, large, beginnings, nodes, streams, stop }
    }

    /// A tunnel calls.
    async fn stream(
        &self,
        request: Request<Requests>,
    ) -> Result<BoxStream<'static, Result<EncodedResponse, Status>>, Status> {
        let caller = match self.callers.review(request.metadata()).await {
            Ok(caller) => caller,
            Err(error) => {
                self.metrics.unauthenticated(error.reason());
                if error.is_notable() {
                    warn!(reason = error.reason(), %error, "discovery refused");
                } else {
                    debug!(reason = error.reason(), %error, "discovery refused");
                }
                return Err(Status::new(error.code(), error.to_string()));
            }
        };
        let peer = request.extensions().get::<Peer>().cloned();
        if let Some(peer) = &peer {
            peer.prove();
        }
        let Some(of_node) = self.nodes.take(caller.node.clone(), OF_NODE) else {
            let text = format!("{} has {OF_NODE} streams open already", caller.node);
            return Err(Status::resource_exhausted(text));
        };
        let (sender, receiver) = mpsc::channel(WAITING);
        let stream = Stream::new(self, caller.node.clone(), sender.clone());
        let (stop, metrics) = (self.stop.clone(), Arc::clone(&self.metrics));
        let requests = request.into_inner();
        // It ends with the tunnel's side of the stream, or with `stop`.
        self.streams.spawn(async move {
            let _of_node = of_node;
            let open = metrics.stream();
            info!(node = caller.node, account = %caller.account, "tunnel connected");
            let ended = stop.run_until_cancelled(stream.run(requests)).await.unwrap_or(Ended::Stopped);
            drop(open);
            info!(node = caller.node, %ended, "tunnel disconnected");
            if matches!(ended, Ended::Unacknowledged { .. }) {
                metrics.unacknowledged();
                // It may not read what it is sent, so that an error would wait with the rest.
                if let Some(peer) = &peer {
                    peer.cut.cancel();
                }
            }
            if let Some(status) = ended.status()
                && sender.try_send(Err(status)).is_err()
            {
                debug!(node = caller.node, "the tunnel is gone, or does not read");
            }
        });
        let responses = futures_util::stream::unfold(receiver, |mut receiver| async {
            Some((receiver.recv().await?, receiver))
        });
        Ok(Box::pin(responses))
    }
}
