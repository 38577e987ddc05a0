//! The half of a stream that is about one kind of resource: at most one response of it is on its way.

use std::{fmt, future::poll_fn, sync::Arc, task::Poll, time::Duration};

use futures_util::future::BoxFuture;
use tokio::{
    sync::{AcquireError, OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::subscription::Subscription;
use crate::snapshot::{Difference, ResourceType, Snapshot};

/// A response with more resources than this is large, and waits for its turn.
const LARGE: usize = 500;

/// The half of a stream that is about one kind.
pub(super) struct Channel {
    pub of: ResourceType,
    pub subscription: Option<Subscription>,
    pub subscribed: Option<Instant>,
    /// The number of the snapshot that the tunnel was told, if nothing was asked for since.
    pub told: Option<u64>,
    /// Whether there was a response at all. The first is sent in any case.
    pub answered: bool,
    on_its_way: Option<OnItsWay>,
}

struct OnItsWay {
    since: Instant,
    state: State,
}

enum State {
    /// Others are told large things. Requests are read meanwhile.
    WaitsForTurn(Box<Response>, BoxFuture<'static, Result<OwnedSemaphorePermit, AcquireError>>),
    Unacknowledged {
        nonce: String,
        _turn: Option<OwnedSemaphorePermit>,
    },
}

/// What is to be sent, before anything is copied for it.
#[derive(Debug)]
pub(super) struct Response {
    pub difference: Difference,
    pub snapshot: Arc<Snapshot>,
}

/// Why a response took too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Overdue {
    /// It was never its turn.
    Turn,
    /// The tunnel does not acknowledge it.
    Acknowledgement,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("of", &self.of).field("told", &self.told).finish_non_exhaustive()
    }
}

impl Channel {
    pub(super) fn new(of: ResourceType) -> Self {
        Self { of, subscription: None, subscribed: None, told: None, answered: false, on_its_way: None }
    }

    /// Whether a response is on its way.
    pub(super) fn is_busy(&self) -> bool {
        self.on_its_way.is_some()
    }

    /// Whether the tunnel has, or does not want, what `snapshot` has.
    pub(super) fn is_settled(&self, snapshot: &Snapshot) -> bool {
        self.subscription.is_none() || (self.told == Some(snapshot.number) && !self.is_busy())
    }

    /// What to send at once: `response`, unless it is large and waits for its turn from now on.
    pub(super) fn queue(&mut self, response: Response, turns: &Arc<Semaphore>) -> Option<Response> {
        if response.difference.changed.len() <= LARGE {
            return Some(response);
        }
        let turn = Box::pin(Arc::clone(turns).acquire_owned());
        let state = State::WaitsForTurn(Box::new(response), turn);
        self.on_its_way = Some(OnItsWay { since: Instant::now(), state });
        None
    }

    /// A response was sent.
    pub(super) fn sent(&mut self, nonce: String, turn: Option<OwnedSemaphorePermit>) {
        let state = State::Unacknowledged { nonce, _turn: turn };
        self.on_its_way = Some(OnItsWay { since: Instant::now(), state });
    }

    /// A request of the tunnel has this nonce. `true`: it acknowledges what is on its way.
    pub(super) fn acknowledge(&mut self, answered: &str) -> bool {
        let is_it = self
            .on_its_way
            .as_ref()
            .is_some_and(|on| matches!(&on.state, State::Unacknowledged { nonce, .. } if nonce == answered));
        if is_it {
            self.on_its_way = None;
        }
        is_it
    }

    /// When what is on its way takes too long, if an answer may take `limit`.
    pub(super) fn deadline(&self, limit: Duration) -> Option<Instant> {
        self.on_its_way.as_ref().map(|on| on.since + limit)
    }

    /// What takes too long.
    pub(super) fn overdue(&self, limit: Duration) -> Option<Overdue> {
        let on = self.on_its_way.as_ref().filter(|on| on.since.elapsed() >= limit)?;
        Some(match on.state {
            State::WaitsForTurn(..) => Overdue::Turn,
            State::Unacknowledged { .. } => Overdue::Acknowledgement,
        })
    }
}

/// A response of one of the channels whose turn it is. May be given up while it waits.
pub(super) async fn next_turn(
    channels: [&mut Channel; 2],
) -> (ResourceType, Response, Option<OwnedSemaphorePermit>) {
    let mut channels = channels;
    poll_fn(|context| {
        for channel in &mut channels {
            let Some(OnItsWay { state: State::WaitsForTurn(_, turn), .. }) = &mut channel.on_its_way else {
                continue;
            };
            let Poll::Ready(turn) = turn.as_mut().poll(context) else { continue };
            if let Some(OnItsWay { state: State::WaitsForTurn(response, _), .. }) = channel.on_its_way.take()
            {
                return Poll::Ready((channel.of, *response, turn.ok()));
            }
        }
        Poll::Pending
    })
    .await
}
