//! One tunnel, from its first request to the end.
//!
//! A snapshot is delivered as a whole: its policies, and when the tunnel has acknowledged them, its
//! workloads, so that no workload names a policy that the tunnel has not heard of; when it has
//! acknowledged these, which policies are gone, so that none names one that it has forgotten. Then
//! comes the newest snapshot there is. At most one response of each kind waits for its acknowledgement, so
//! that a slow tunnel costs no memory, and one that does not answer is disconnected. Requests are read at
//! all times.

use std::{collections::BTreeSet, fmt, sync::Arc};

use tokio::{
    sync::{
        OwnedSemaphorePermit, Semaphore,
        mpsc::{self, error::TrySendError},
    },
    time::Instant,
};
use tonic::Status;
use tracing::{debug, warn};
use ztunnel_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

use super::{
    DiscoveryService, StreamLimits,
    beginning::Beginnings,
    channel::{Channel, Overdue, Response, next_turn},
    requests::Requests,
    subscription::{Subscription, TooMuch},
    wire::EncodedResponse,
};
use crate::{
    metrics::Metrics,
    snapshot::{Difference, ResourceType, Snapshot},
    source::Snapshots,
};

/// Of a tunnel's error message, in the log.
const LONGEST_ERROR: usize = 1000;

/// How a stream ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// The tunnel closed it, or is gone.
    Closed,
    /// The connection broke.
    Broken(Box<Status>),
    /// The tunnel did not acknowledge a response in time.
    Unacknowledged { of: ResourceType },
    /// Too many others begin, or are told large things.
    Busy,
    /// The tunnel subscribes to more than one may.
    TooMuch(TooMuch),
    /// This process shuts down.
    Stopped,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("it closed the stream"),
            Self::Broken(status) => write!(f, "the stream broke: {}", status.message()),
            Self::Unacknowledged { of } => {
                write!(f, "it did not acknowledge a response about {} in time", of.url())
            }
            Self::Busy => f.write_str("too many tunnels begin, or are told much, at this time"),
            Self::TooMuch(error) => error.fmt(f),
            Self::Stopped => f.write_str("this control plane shuts down"),
        }
    }
}

impl Ended {
    /// What the tunnel is told, if it can be told.
    pub(super) fn status(&self) -> Option<Status> {
        match self {
            Self::Closed | Self::Broken(_) => None,
            Self::Unacknowledged { .. } => Some(Status::deadline_exceeded(self.to_string())),
            Self::TooMuch(_) => Some(Status::resource_exhausted(self.to_string())),
            Self::Busy | Self::Stopped => Some(Status::unavailable(self.to_string())),
        }
    }
}

/// One tunnel.
pub(super) struct Stream {
    node: String,
    responses: mpsc::Sender<Result<EncodedResponse, Status>>,
    snapshots: Snapshots,
    limits: StreamLimits,
    metrics: Arc<Metrics>,
    large: Arc<Semaphore>,
    beginnings: Beginnings,
    policies: Channel,
    addresses: Channel,
    /// Policies that are gone, which the tunnel has not been told.
    gone: BTreeSet<String>,
    /// The snapshot that is being delivered.
    current: Option<Arc<Snapshot>>,
    nonces: u64,
}

impl Stream {
    pub(super) fn new(
        service: &DiscoveryService,
        node: String,
        responses: mpsc::Sender<Result<EncodedResponse, Status>>,
    ) -> Self {
        Self {
            node,
            responses,
            snapshots: service.snapshots.clone(),
            limits: service.limits,
            metrics: Arc::clone(&service.metrics),
            large: Arc::clone(&service.large),
            beginnings: service.beginnings.clone(),
            policies: Channel::new(ResourceType::Authorization),
            addresses: Channel::new(ResourceType::Address),
            gone: BTreeSet::new(),
            current: None,
            nonces: 0,
        }
    }

    /// Runs until either side ends it.
    pub(super) async fn run(mut self, mut requests: Requests) -> Ended {
        let beginning = tokio::select! {
            beginning = self.beginnings.take(&self.node, self.limits.acknowledge) => beginning,
            () = self.responses.closed() => return Ended::Closed,
        };
        if beginning.is_none() {
            return Ended::Busy;
        }
        // It ends after some time in any case.
        let mut beginning = beginning.map(|beginning| (beginning, Instant::now() + self.limits.acknowledge));
        loop {
            if let Err(ended) = self.deliver() {
                return ended;
            }
            let has_begun = self.has_begun();
            beginning = beginning.filter(|(_, until)| !has_begun && *until > Instant::now());
            let begins_until = beginning.as_ref().map(|(_, until)| *until);
            let deadline = self.next_deadline().into_iter().chain(begins_until).min();
            tokio::select! {
                request = requests.next() => match request {
                    Ok(Some(request)) => {
                        if let Err(error) = self.on_request(request) {
                            return Ended::TooMuch(error);
                        }
                    }
                    Ok(None) => return Ended::Closed,
                    Err(status) => return Ended::Broken(Box::new(status)),
                },
                changed = self.snapshots.changed() => if changed.is_err() {
                    return Ended::Stopped;
                },
                (of, response, turn) = next_turn([&mut self.policies, &mut self.addresses]) => {
                    if let Err(ended) = self.send_now(of, response, turn) {
                        return ended;
                    }
                }
                () = wait_until(deadline) => if let Some(ended) = self.overdue() {
                    return ended;
                },
            }
        }
    }

    fn on_request(&mut self, mut request: DeltaDiscoveryRequest) -> Result<(), TooMuch> {
        let Some(of) = ResourceType::from_url(&request.type_url) else {
            let type_url: String = request.type_url.chars().take(200).collect();
            debug!(node = self.node, type_url, "a type that is not served");
            return Ok(());
        };
        let channel = self.channel(of);
        if let Some(subscription) = &mut channel.subscription {
            if subscription.change(&mut request)? {
                channel.told = None;
            }
        } else {
            let first = Subscription::first(of, self.node.clone(), &mut request)?;
            let channel = self.channel(of);
            (channel.subscription, channel.subscribed) = (Some(first), Some(Instant::now()));
        }
        let channel = self.channel(of);
        if channel.acknowledge(&request.response_nonce)
            && let Some(error) = request.error_detail
        {
            let error: String = error.message.chars().take(LONGEST_ERROR).collect();
            self.metrics.nacked(of);
            warn!(node = self.node, of = of.url(), error, "a tunnel refused resources");
        }
        Ok(())
    }

    /// Whether the tunnel has taken everything that it was told first.
    fn has_begun(&self) -> bool {
        self.addresses.answered && self.channels().iter().all(|channel| !channel.is_busy())
    }

    fn channel(&mut self, of: ResourceType) -> &mut Channel {
        match of {
            ResourceType::Authorization => &mut self.policies,
            ResourceType::Address => &mut self.addresses,
        }
    }

    /// Sends what can be sent now.
    fn deliver(&mut self) -> Result<(), Ended> {
        loop {
            let newest = self.snapshots.borrow_and_update().clone();
            let Some(newest) = newest else { return Ok(()) };
            let snapshot = Arc::clone(self.current.get_or_insert_with(|| Arc::clone(&newest)));
            self.send(ResourceType::Authorization, &snapshot)?;
            if !self.policies.is_settled(&snapshot) || self.awaits_policies() {
                return Ok(());
            }
            self.send(ResourceType::Address, &snapshot)?;
            // Addresses need no acknowledgement for the next policies to be sent.
            let told = self.addresses.subscription.is_none() || self.addresses.told == Some(snapshot.number);
            if !told {
                return Ok(());
            }
            if !self.gone.is_empty() {
                if self.addresses.is_busy() {
                    return Ok(());
                }
                let removed = std::mem::take(&mut self.gone).into_iter().collect();
                let difference = Difference { changed: Vec::new(), removed };
                self.respond(
                    ResourceType::Authorization,
                    Response { difference, snapshot: Arc::clone(&snapshot) },
                )?;
            }
            if snapshot.number == newest.number {
                return Ok(());
            }
            self.current = Some(newest);
        }
    }

    /// Whether workloads wait for a subscription to policies, which comes right after theirs.
    fn awaits_policies(&self) -> bool {
        let since = self.addresses.subscribed.filter(|_| self.policies.subscription.is_none());
        since.is_some_and(|since| since.elapsed() < self.limits.policies_first)
    }

    fn send(&mut self, of: ResourceType, snapshot: &Arc<Snapshot>) -> Result<(), Ended> {
        let channel = self.channel(of);
        if channel.told == Some(snapshot.number) || channel.is_busy() {
            return Ok(());
        }
        let Some(subscription) = &mut channel.subscription else { return Ok(()) };
        let difference = subscription.next(snapshot);
        let is_answered = channel.answered;
        channel.told = Some(snapshot.number);
        let Some(mut difference) = difference else { return Ok(()) };
        if of == ResourceType::Authorization {
            for policy in &difference.changed {
                self.gone.remove(policy.name());
            }
            self.gone.extend(std::mem::take(&mut difference.removed));
            if is_answered && difference.changed.is_empty() {
                return Ok(());
            }
        }
        self.respond(of, Response { difference, snapshot: Arc::clone(snapshot) })
    }

    fn respond(&mut self, of: ResourceType, response: Response) -> Result<(), Ended> {
        let large = Arc::clone(&self.large);
        match self.channel(of).queue(response, &large) {
            Some(response) => self.send_now(of, response, None),
            None => Ok(()),
        }
    }

    fn send_now(
        &mut self,
        of: ResourceType,
        Response { difference, snapshot }: Response,
        turn: Option<OwnedSemaphorePermit>,
    ) -> Result<(), Ended> {
        let first = !std::mem::replace(&mut self.channel(of).answered, true);
        // For a tunnel an address is of the pod that it heard of last.
        let mut changed = difference.changed;
        changed.sort_by_key(|resource| resource.claim());
        self.nonces += 1;
        let nonce = self.nonces.to_string();
        let rest = DeltaDiscoveryResponse {
            system_version_info: snapshot.number.to_string(),
            resources: Vec::new(),
            type_url: of.url().to_owned(),
            nonce: nonce.clone(),
            removed_resources: difference.removed,
        };
        let response = EncodedResponse::new(changed, rest);
        self.channel(of).sent(nonce, turn);
        self.metrics.pushed(of, (!first).then_some(snapshot.changed));
        // There is a place for one response of each kind, unless it acknowledges what it has not read.
        self.responses.try_send(Ok(response)).map_err(|error| match error {
            TrySendError::Full(_) => Ended::Unacknowledged { of },
            TrySendError::Closed(_) => Ended::Closed,
        })
    }

    fn channels(&self) -> [&Channel; 2] {
        [&self.policies, &self.addresses]
    }

    fn overdue(&self) -> Option<Ended> {
        self.channels().into_iter().find_map(|channel| {
            Some(match channel.overdue(self.limits.acknowledge)? {
                Overdue::Turn => Ended::Busy,
                Overdue::Acknowledgement => Ended::Unacknowledged { of: channel.of },
            })
        })
    }

    fn next_deadline(&self) -> Option<Instant> {
        let limit = self.limits.acknowledge;
        let answers = self.channels().into_iter().filter_map(|channel| channel.deadline(limit));
        let policies = self.addresses.subscribed.filter(|_| self.awaits_policies());
        answers.chain(policies.map(|since| since + self.limits.policies_first)).min()
    }
}

async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
