//! Calls the control plane, and applies what it tells, until the process ends.
//!
//! While the control plane is away what was told last holds. Attempts are paused as Istio's tunnel pauses them; the log
//! gets a line when it goes, one every few minutes, and one when it is back.

use std::{
    collections::BTreeMap,
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
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};

use super::{ADDRESS, AUTHORIZATION, Sender, delta::Subscription, demand::Demand};
use crate::{
    backoff::Backoff,
    config::Xds,
    control_plane::{ControlPlane, ControlPlaneError},
    mesh::{Store, local_file::Defaults},
    metrics::xds::{Termination, XdsMetrics},
    readiness::ReadyGuard,
};

/// A response with the whole of a large mesh is one message.
const LARGEST_MESSAGE: usize = 200 << 20;
/// How often the log says that the control plane is still away.
const REMIND_EVERY: Duration = Duration::from_mins(5);

/// The one who keeps [`Store`] as the control plane tells.
#[derive(Debug)]
pub struct Client {
    control_plane: ControlPlane,
    node: Node,
    /// Addresses are asked for by name, where it is given.
    demand: Option<Demand>,
    /// Out on a thread of its own while a response is worked on.
    state: Option<State>,
    metrics: XdsMetrics,
    ready: ReadyGuard,
}

#[derive(Debug)]
struct State {
    sender: Sender,
    subscriptions: [Subscription; 2],
    store: Arc<Store>,
    demand: Option<Demand>,
}

/// How a stream ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Unusable(#[from] ControlPlaneError),
    #[error("cannot call the control plane at {address}")]
    NotBegun { address: String, source: Box<Status> },
    #[error("the control plane broke the stream")]
    Broken(#[source] Box<Status>),
    #[error("the control plane closed the stream")]
    Closed,
}

impl Client {
    pub fn new(
        config: &Xds,
        defaults: Defaults,
        store: Arc<Store>,
        demand: Option<Demand>,
        metrics: XdsMetrics,
        ready: ReadyGuard,
    ) -> Self {
        let metadata = config.metadata.iter().map(|(key, value)| (key.clone(), proto_value(value)));
        let node = Node { id: config.node_id.clone(), metadata: Some(Struct { fields: metadata.collect() }) };
        let state = State {
            sender: Sender::new(defaults),
            subscriptions: [ADDRESS, AUTHORIZATION].map(Subscription::new),
            store,
            demand: demand.clone(),
        };
        let control_plane = ControlPlane::new(config.service.clone());
        Self { control_plane, node, demand, state: Some(state), metrics, ready }
    }

    /// Until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut backoff = Backoff::new();
        let mut warned: Option<Instant> = None;
        loop {
            let mut took = false;
            let Some(ended) = stop.run_until_cancelled(self.stream(&mut took)).await else { return };
            self.metrics.terminated(ended.kind());
            if took {
                backoff.reset();
                warned = None;
            }
            let pause = backoff.delay();
            let error = chain(&ended);
            if matches!(ended, Ended::Closed) {
                debug!(
                    address = self.control_plane.address(),
                    "the control plane closed the stream, calling again"
                );
            } else if warned.is_none_or(|at| at.elapsed() >= REMIND_EVERY) {
                warned = Some(Instant::now());
                warn!(
                    address = self.control_plane.address(),
                    error, "no control plane: what it told last holds, and it is called again and again"
                );
            } else {
                debug!(error, retry_ms = pause.as_millis(), "still no control plane");
            }
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// One stream from its first request to its end. `took`: whether a response was taken.
    async fn stream(&mut self, took: &mut bool) -> Ended {
        let (requests, mut responses) = match self.call().await {
            Ok(streams) => streams,
            Err(ended) => return ended,
        };
        loop {
            let message = tokio::select! {
                message = responses.message() => message,
                request = self.wanted() => {
                    let _ = requests.send(request);
                    continue;
                }
            };
            let response = match message {
                Ok(Some(response)) => response,
                Ok(None) => return Ended::Closed,
                Err(status) => return Ended::Broken(Box::new(status)),
            };
            if !std::mem::replace(took, true) {
                info!(address = self.control_plane.address(), "connected to the control plane");
            }
            if let Some(reply) = self.respond(response).await {
                // Its receiver is the call, which would have ended.
                let _ = requests.send(reply);
            }
        }
    }

    /// What connections need to know besides, once they do.
    async fn wanted(&self) -> DeltaDiscoveryRequest {
        let (Some(demand), Some(state)) = (&self.demand, &self.state) else {
            return std::future::pending().await;
        };
        state.addresses().change(&demand.unsent().await)
    }

    async fn call(
        &self,
    ) -> Result<(mpsc::UnboundedSender<DeltaDiscoveryRequest>, Streaming<DeltaDiscoveryResponse>), Ended>
    {
        let mut refused = Status::unavailable("no name to call it by");
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
            match service.delta_aggregated_resources(call).await {
                Ok(responses) => return Ok((requests, responses.into_inner())),
                // It may bear another name.
                Err(status) if status.code() == Code::Unavailable => refused = status,
                Err(status) => {
                    refused = status;
                    break;
                }
            }
        }
        Err(Ended::NotBegun { address: self.control_plane.address().to_owned(), source: Box::new(refused) })
    }

    /// Applies a response; what to answer.
    async fn respond(&mut self, response: DeltaDiscoveryResponse) -> Option<DeltaDiscoveryRequest> {
        self.metrics.received(&response.type_url, response.encoded_len());
        let mut state = self.state.take()?;
        // A whole mesh takes seconds, and this runtime has others to serve.
        let worked = tokio::task::spawn_blocking(move || {
            let reply = state.take(response);
            (state, reply)
        });
        let (state, reply) = match worked.await {
            Ok(done) => done,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        if state.is_complete() {
            self.ready.ready();
        }
        self.state = Some(state);
        reply
    }
}

impl State {
    fn addresses(&self) -> &Subscription {
        let [addresses, _] = &self.subscriptions;
        addresses
    }

    /// The requests that begin a stream.
    fn first(&self, node: &Node) -> [DeltaDiscoveryRequest; 2] {
        let [addresses, policies] = &self.subscriptions;
        let only = self.demand.as_ref().map(Demand::all);
        [addresses.first(node.clone(), only), policies.first(node.clone(), None)]
    }

    /// Whether all that is told without being asked for by name has been told.
    fn is_complete(&self) -> bool {
        let [addresses, policies] = &self.subscriptions;
        policies.answered && (self.demand.is_some() || addresses.answered)
    }

    fn take(&mut self, response: DeltaDiscoveryResponse) -> Option<DeltaDiscoveryRequest> {
        let of_type = |subscription: &&mut Subscription| subscription.type_url() == response.type_url;
        let Some(subscription) = self.subscriptions.iter_mut().find(of_type) else {
            warn!(type_url = response.type_url, "the control plane sent what nobody asked for");
            return None;
        };
        let answers =
            self.demand.as_ref().filter(|_| response.type_url == ADDRESS).map(|_| Answers::of(&response));
        let taken = subscription.take(&self.sender, response);
        if !taken.refused.is_empty() {
            warn!(
                type_url = subscription.type_url(),
                resources = taken.refused.join("; "),
                "resources of the control plane are refused, what was held of them stays in force"
            );
        }
        debug!(
            type_url = subscription.type_url(),
            changes = taken.changes.len(),
            held = subscription.held(),
            "told by the control plane"
        );
        if !taken.changes.is_empty() {
            self.store.apply(taken.changes);
        }
        if let (Some(demand), Some(Answers { there, gone })) = (&self.demand, &answers) {
            demand.answered(there.iter().map(String::as_str), gone.iter().map(String::as_str));
        }
        Some(taken.reply)
    }
}

/// The names that a response is about: of each resource its own and its aliases, refused or not.
struct Answers {
    there: Vec<String>,
    gone: Vec<String>,
}

impl Answers {
    fn of(response: &DeltaDiscoveryResponse) -> Self {
        let names = |resource: &Resource| {
            std::iter::once(resource.name.clone()).chain(resource.aliases.iter().cloned()).collect::<Vec<_>>()
        };
        let there = response.resources.iter().flat_map(names).collect();
        Self { there, gone: response.removed_resources.clone() }
    }
}

impl Ended {
    fn kind(&self) -> Termination {
        match self {
            Self::Unusable(_) | Self::NotBegun { .. } => Termination::ConnectionError,
            Self::Broken(status) if matches!(status.code(), Code::Unavailable | Code::Cancelled) => {
                Termination::Reconnect
            }
            Self::Broken(_) => Termination::Error,
            Self::Closed => Termination::Complete,
        }
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

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
