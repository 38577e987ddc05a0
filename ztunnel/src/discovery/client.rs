//! The xDS client: keeps a stream to the control plane open and applies its responses to the
//! [`Store`].
//!
//! While the control plane is unreachable the last known state stays in force; if it is so from the
//! start, that is what a predecessor has [kept](LastState). Retries back off as in Istio's tunnel.
//! The log gets a line when the control plane becomes unreachable, one every 5 minutes, and one when
//! it is back.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::stream;
use prost::Message as _;
use prost_types::{Struct, Value, value::Kind};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status, Streaming};
use tracing::{debug, info, warn};
use ztunnel_api::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};

use super::{demand::Demand, last_state::LastState, state::DiscoveryState};
use crate::{
    backoff::Backoff,
    config::XdsConfig,
    control_plane::{ControlPlane, ControlPlaneError},
    error_chain::error_chain,
    mesh::{Knowledge, Store, local_file::ResourceDefaults},
    metrics::{
        Metrics,
        xds::{Termination, XdsMetrics},
    },
    readiness::ReadyGuard,
};

/// Bytes. A response with all resources of a large mesh is one message.
const LARGEST_MESSAGE: usize = 200 << 20;
/// How long a call may take to begin: a control plane that answers pings and nothing else is left
/// for its other name, or for another replica. The headers often come with the first response,
/// which takes long in a large mesh: so the limit doubles with every call that does not begin.
const BEGIN: Duration = Duration::from_secs(30);
const LONGEST_BEGIN: Duration = Duration::from_mins(5);
/// Part by which delays between calls vary, either way: all tunnels of a mesh see the end of a
/// control plane at the same time.
const JITTER: f64 = 0.5;
/// A stream that lasted so long has shown that the control plane works; the next delay is the
/// shortest. One that a response ends early has not.
const HEALTHY: Duration = Duration::from_mins(1);
/// How often the log repeats that the control plane is unreachable.
const REMIND_EVERY: Duration = Duration::from_mins(5);
/// How long the control plane may take to tell everything before the last state is used.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a stream on which nothing comes confirms the state that is kept.
const CONFIRM_EVERY: Duration = Duration::from_mins(1);

/// Updates a [`Store`] from the control plane. [`run`](Self::run) does all the work.
#[derive(Debug)]
pub struct DiscoveryClient {
    control_plane: ControlPlane,
    node: Node,
    /// With on-demand discovery, the names to subscribe to.
    demand: Option<Demand>,
    /// `None` while a blocking thread applies a response.
    state: Option<DiscoveryState>,
    metrics: XdsMetrics,
    ready: ReadyGuard,
    /// How long the next call may take to begin.
    begin: Duration,
    /// When to use the last state, unless it was used or the control plane has told everything.
    recall_at: Option<tokio::time::Instant>,
    has_last_state: bool,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error(transparent)]
    Unusable(#[from] ControlPlaneError),
    #[error("cannot open a stream to the control plane at {address}")]
    NotBegun { address: String, source: Box<Status> },
    #[error("the control plane at {address} did not begin to answer within {within:?}")]
    NoAnswer { address: String, within: Duration },
    #[error("control plane stream failed")]
    Broken(#[source] Box<Status>),
    #[error("control plane closed the stream")]
    Closed,
}

impl DiscoveryClient {
    /// Connects to nothing yet. When all subscribed resources were received once, or taken from
    /// `last_state`, `store` is known and `ready` ready.
    pub fn new(
        config: &XdsConfig,
        defaults: ResourceDefaults,
        store: Arc<Store>,
        demand: Option<Demand>,
        last_state: Option<Arc<LastState>>,
        metrics: &Metrics,
        ready: ReadyGuard,
    ) -> Self {
        let has_last_state = last_state.is_some();
        let metadata = config.metadata.iter().map(|(key, value)| (key.clone(), proto_value(value)));
        let node = Node { id: config.node_id.clone(), metadata: Some(Struct { fields: metadata.collect() }) };
        let state = DiscoveryState::new(defaults, store, demand.clone(), last_state);
        let control_plane = ControlPlane::new(config.service.clone());
        let (state, metrics) = (Some(state), metrics.xds.clone());
        let (begin, recall_at) = (BEGIN, None);
        Self { control_plane, node, demand, state, metrics, ready, begin, recall_at, has_last_state }
    }

    /// Runs until `stop`, and opens a new stream whenever one ends.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut backoff = Backoff::new().with_jitter(JITTER);
        let mut warned: Option<Instant> = None;
        self.recall_at = self.has_last_state.then(|| tokio::time::Instant::now() + PATIENCE);
        loop {
            let (mut received, began) = (false, tokio::time::Instant::now());
            let Some(ended) = stop.run_until_cancelled(self.stream(&mut received)).await else { return };
            self.metrics.terminated(ended.kind());
            if received {
                warned = None;
            }
            if began.elapsed() >= HEALTHY && received {
                backoff.reset();
            }
            let pause = backoff.delay();
            let error = error_chain(&ended);
            if matches!(ended, StreamEnd::Closed) {
                debug!(
                    address = self.control_plane.address(),
                    "control plane closed the stream; reconnecting"
                );
            } else if warned.is_none_or(|at| at.elapsed() >= REMIND_EVERY) {
                warned = Some(Instant::now());
                warn!(
                    address = self.control_plane.address(),
                    error, "control plane unreachable; keeping last known state, retrying"
                );
            } else {
                debug!(error, retry_ms = pause.as_millis(), "control plane still unreachable");
            }
            if stop.run_until_cancelled(self.recall()).await.is_none() {
                return;
            }
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// Runs one stream from its first request to its end. Sets `received` at the first response.
    async fn stream(&mut self, received: &mut bool) -> StreamEnd {
        if let Some(state) = &mut self.state {
            state.prepare();
        }
        let (requests, mut responses) = match self.call().await {
            Ok(streams) => streams,
            Err(ended) => return ended,
        };
        let mut confirm = tokio::time::interval(CONFIRM_EVERY);
        loop {
            let message = tokio::select! {
                message = responses.message() => message,
                () = until(self.recall_at) => {
                    self.recall().await;
                    continue;
                }
                _ = confirm.tick() => {
                    self.state.iter().for_each(DiscoveryState::still_told);
                    continue;
                }
                request = self.demanded() => {
                    let _ = requests.send(request);
                    continue;
                }
            };
            let response = match message {
                Ok(Some(response)) => response,
                Ok(None) => return StreamEnd::Closed,
                Err(status) => return StreamEnd::Broken(Box::new(status)),
            };
            if !std::mem::replace(received, true) {
                info!(address = self.control_plane.address(), "connected to the control plane");
            }
            if let Some(reply) = self.respond(response).await {
                // The receiver is the call itself: if it is gone, `message` above reports why.
                let _ = requests.send(reply);
            }
        }
    }

    /// The next request of on-demand discovery. Waits until a connection needs a new name.
    async fn demanded(&self) -> DeltaDiscoveryRequest {
        let (Some(demand), Some(state)) = (&self.demand, &self.state) else {
            return std::future::pending().await;
        };
        state.addresses().update_request(&demand.unsent().await)
    }

    async fn call(
        &mut self,
    ) -> Result<(mpsc::UnboundedSender<DeltaDiscoveryRequest>, Streaming<DeltaDiscoveryResponse>), StreamEnd>
    {
        let (address, within) = (|client: &Self| client.control_plane.address().to_owned(), self.begin);
        let mut refused = None;
        for channel in self.control_plane.channels()? {
            let (requests, receiver) = mpsc::unbounded_channel();
            for request in self.state.iter().flat_map(|state| state.first(&self.node)) {
                let _ = requests.send(request);
            }
            let sent =
                stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
            let mut call = Request::new(sent);
            self.control_plane.authenticate(&mut call)?;
            let mut service = AggregatedDiscoveryServiceClient::new(channel)
                .max_decoding_message_size(LARGEST_MESSAGE)
                .max_encoding_message_size(LARGEST_MESSAGE);
            let mut begun = pin!(tokio::time::timeout(within, service.delta_aggregated_resources(call)));
            let begun = tokio::select! {
                begun = &mut begun => begun,
                () = until(self.recall_at) => {
                    self.recall().await;
                    begun.await
                }
            };
            match begun {
                Ok(Ok(responses)) => {
                    self.begin = BEGIN;
                    return Ok((requests, responses.into_inner()));
                }
                // Its certificate may have another name: try the next channel.
                Ok(Err(status)) if status.code() == Code::Unavailable => refused = Some(status),
                Ok(Err(status)) => {
                    refused = Some(status);
                    break;
                }
                Err(_) => self.begin = LONGEST_BEGIN.min(within * 2),
            }
        }
        Err(match refused {
            Some(status) => StreamEnd::NotBegun { address: address(self), source: Box::new(status) },
            None => StreamEnd::NoAnswer { address: address(self), within },
        })
    }

    /// Goes on with the last state, once, if the control plane has not told everything yet.
    async fn recall(&mut self) {
        if self.recall_at.take().is_none() {
            return;
        }
        let Some(is_recalled) = self.off_thread(DiscoveryState::recall).await else { return };
        if is_recalled {
            self.knows(Knowledge::Recalled);
        }
    }

    /// Runs `work`, which takes seconds in a large mesh: this runtime also serves readiness and ZDS.
    async fn off_thread<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut DiscoveryState) -> T + Send + 'static,
    ) -> Option<T> {
        let mut state = self.state.take()?;
        let worked = tokio::task::spawn_blocking(move || {
            let done = work(&mut state);
            (state, done)
        });
        let (state, done) = match worked.await {
            Ok(done) => done,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        self.state = Some(state);
        Some(done)
    }

    /// Connections may be judged by what there is.
    fn knows(&mut self, knowledge: Knowledge) {
        if let Some(state) = &self.state {
            state.store.now_knows(knowledge);
        }
        self.ready.ready();
    }

    /// Applies a response and returns the ACK or NACK.
    async fn respond(&mut self, response: DeltaDiscoveryResponse) -> Option<DeltaDiscoveryRequest> {
        self.metrics.received(&response.type_url, response.encoded_len());
        let reply = self.off_thread(|state| state.apply(response)).await?;
        let state = self.state.as_ref()?;
        for subscription in &state.subscriptions {
            self.metrics.refused(subscription.type_url(), subscription.refused());
        }
        if state.is_complete() {
            self.recall_at = None;
            self.knows(Knowledge::Told);
        }
        reply
    }
}

impl StreamEnd {
    fn kind(&self) -> Termination {
        match self {
            Self::Unusable(_) | Self::NotBegun { .. } | Self::NoAnswer { .. } => Termination::ConnectionError,
            Self::Broken(status) if matches!(status.code(), Code::Unavailable | Code::Cancelled) => {
                Termination::Reconnect
            }
            Self::Broken(_) => Termination::Error,
            Self::Closed => Termination::Complete,
        }
    }
}

async fn until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn proto_value(value: &serde_json::Value) -> Value {
    let kind = match value {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(value) => Kind::BoolValue(*value),
        serde_json::Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        serde_json::Value::String(text) => Kind::StringValue(text.clone()),
        serde_json::Value::Array(values) => {
            Kind::ListValue(prost_types::ListValue { values: values.iter().map(proto_value).collect() })
        }
        serde_json::Value::Object(map) => {
            let fields: BTreeMap<_, _> =
                map.iter().map(|(key, value)| (key.clone(), proto_value(value))).collect();
            Kind::StructValue(Struct { fields })
        }
    };
    Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests;
