//! One valid certificate per local identity: fetched once for all that wait, renewed at half of its
//! lifetime.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Credentials, Identity, IdentityError, authority::Authority, ca_client::CaClient,
    development_ca::DevelopmentCa, trust::TlsParameters,
};
use crate::{
    backoff::Backoff,
    config::{CaConfig, Config},
    error_chain::error_chain,
};

/// Concurrent fetches. The control plane may serve many nodes that start at the same time.
const MAX_FETCHES: usize = 8;
/// Delays between failed fetches: doubled from the first to the longest, each varied by up to a
/// fifth either way.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(150);
const RETRY_JITTER: f64 = 0.2;

/// The certificates of the workloads that this process serves. [`run`](Self::run) does all
/// fetching: nothing is fetched before it runs or after it ended.
pub struct Certificates {
    authority: Box<dyn Authority>,
    slots: Mutex<HashMap<Identity, CertificateSlot>>,
    /// Notified when a slot may be due.
    wanted: Notify,
    stopped: CancellationToken,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").field("known", &self.list()).finish_non_exhaustive()
    }
}

/// State of one identity's certificate.
#[derive(Clone, Debug, Default)]
enum CertificateState {
    /// The first fetch has not ended yet.
    #[default]
    Pending,
    Valid(Arc<Credentials>),
    /// The last fetch failed and no certificate is held; `run` retries.
    Failed(IdentityError),
}

/// The order in which due fetches start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    /// A connection waits.
    RealTime,
    /// A workload may connect soon.
    Warmup,
    /// A valid certificate is due for renewal.
    Background,
}

struct CertificateSlot {
    state: watch::Sender<CertificateState>,
    /// Error of the last renewal, while the certificate is still valid.
    renewal_error: Option<IdentityError>,
    /// When the certificate in `state` expires.
    expires: Instant,
    /// When to fetch next. `None` during a fetch.
    due: Option<Instant>,
    urgency: Urgency,
    /// Delays between failed fetches.
    backoff: Backoff,
}

impl CertificateSlot {
    fn new(urgency: Urgency) -> Self {
        let now = Instant::now();
        Self {
            state: watch::Sender::default(),
            renewal_error: None,
            expires: now,
            due: Some(now),
            urgency,
            backoff: Backoff::between(FIRST_RETRY, LONGEST_RETRY).with_jitter(RETRY_JITTER),
        }
    }

    /// Records the result of a fetch and when the next one is due.
    fn record_result(&mut self, fetched: Result<Credentials, IdentityError>) {
        let now = Instant::now();
        match fetched {
            Ok(credentials) => {
                let clock = SystemTime::now();
                // A certificate that is past half of its lifetime on arrival must not cause a tight
                // loop.
                let half_life = credentials.half_life_from(clock).max(FIRST_RETRY);
                self.due = Some(now + half_life);
                self.expires = now + credentials.expires_in(clock);
                self.backoff.reset();
                self.renewal_error = None;
                self.state.send_replace(CertificateState::Valid(Arc::new(credentials)));
            }
            Err(error) => {
                self.due = Some(now + self.backoff.delay());
                if matches!(*self.state.borrow(), CertificateState::Valid(_)) && now < self.expires {
                    self.renewal_error = Some(error);
                } else {
                    self.state.send_replace(CertificateState::Failed(error));
                }
            }
        }
        self.urgency = Urgency::Background;
    }
}

/// One identity with its certificate, for the admin server and metrics.
#[derive(Clone, Debug)]
pub struct CertificateInfo {
    /// The identity.
    pub identity: Identity,
    /// Its certificate, if one was fetched.
    pub credentials: Option<Arc<Credentials>>,
    /// The last error, if the certificate is missing or its renewal failed.
    pub error: Option<String>,
}

impl Certificates {
    /// With the authority of the configuration. Creates or loads the root of the development CA.
    ///
    /// # Errors
    /// The root of the development CA cannot be read, written or used.
    pub fn new(config: &Config) -> Result<Arc<Self>, IdentityError> {
        let tls = TlsParameters::new(config.tls);
        let authority: Box<dyn Authority> = match &config.ca {
            CaConfig::Service { service, impersonate } => {
                Box::new(CaClient::new(service.clone(), *impersonate, config.secret_ttl, tls))
            }
            CaConfig::Development { folder } => {
                Box::new(DevelopmentCa::open(folder, config.secret_ttl, tls)?)
            }
        };
        Ok(Self::with_authority(authority))
    }

    fn with_authority(authority: Box<dyn Authority>) -> Arc<Self> {
        Arc::new(Self {
            authority,
            slots: Mutex::default(),
            wanted: Notify::new(),
            stopped: CancellationToken::new(),
        })
    }

    /// The certificate of `identity`: at once if it is valid, else when the fetch ends.
    ///
    /// # Errors
    /// The error of the last fetch. `run` retries after a delay; calling this again does not
    /// shorten it.
    pub async fn get(&self, identity: &Identity) -> Result<Arc<Credentials>, IdentityError> {
        let mut state = {
            let mut slots = self.slots();
            let slot = match slots.get_mut(identity) {
                Some(slot) => slot,
                None => {
                    slots.entry(identity.clone()).or_insert_with(|| CertificateSlot::new(Urgency::RealTime))
                }
            };
            if matches!(*slot.state.borrow(), CertificateState::Valid(_)) && Instant::now() < slot.expires {
                return ready(&slot.state.borrow()).unwrap_or(Err(IdentityError::Stopped));
            }
            if matches!(*slot.state.borrow(), CertificateState::Valid(_)) {
                let source = slot.renewal_error.clone().map(Arc::new);
                return Err(IdentityError::Expired { identity: identity.clone(), source });
            }
            slot.urgency = Urgency::RealTime;
            slot.state.subscribe()
        };
        self.wanted.notify_one();
        tokio::select! {
            biased;
            result = state.wait_for(|state| ready(state).is_some()) => match result {
                Ok(state) => ready(&state).unwrap_or(Err(IdentityError::Stopped)),
                Err(_) => Err(IdentityError::Removed { identity: identity.clone() }),
            },
            () = self.stopped.cancelled() => Err(IdentityError::Stopped),
        }
    }

    /// Fetches the certificate of a workload that may connect soon.
    pub fn prefetch(&self, identity: &Identity) {
        let mut slots = self.slots();
        if !slots.contains_key(identity) {
            slots.insert(identity.clone(), CertificateSlot::new(Urgency::Warmup));
            self.wanted.notify_one();
        }
    }

    /// Removes all other identities.
    pub fn retain(&self, wanted: &HashSet<Identity>) {
        self.slots().retain(|identity, _| wanted.contains(identity));
    }

    /// All identities, sorted.
    pub fn list(&self) -> Vec<CertificateInfo> {
        let known = |(identity, slot): (&Identity, &CertificateSlot)| {
            let (credentials, failed) = match &*slot.state.borrow() {
                CertificateState::Pending => (None, None),
                CertificateState::Valid(credentials) => (Some(Arc::clone(credentials)), None),
                CertificateState::Failed(error) => (None, Some(error.to_string())),
            };
            let error = failed.or_else(|| slot.renewal_error.as_ref().map(ToString::to_string));
            CertificateInfo { identity: identity.clone(), credentials, error }
        };
        let mut all: Vec<_> = self.slots().iter().map(known).collect();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    /// Fetches and renews until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let _stopped = self.stopped.clone().drop_guard();
        let mut under_way = JoinSet::new();
        loop {
            let next = self.start_due(&mut under_way);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(ended) = under_way.join_next() => match ended {
                    Ok((identity, fetched)) => self.record_result(&identity, fetched),
                    Err(error) => warn!(%error, "certificate fetch panicked or was cancelled"),
                },
                () = self.wanted.notified() => {}
                () = sleep_until(next) => {}
            }
        }
    }

    /// Starts due fetches, the most urgent first, and returns when the next one is due. `None`
    /// while the number of fetches is at its limit.
    fn start_due(
        &self,
        fetches: &mut JoinSet<(Identity, Result<Credentials, IdentityError>)>,
    ) -> Option<Instant> {
        let mut slots = self.slots();
        let now = Instant::now();
        let mut waiting: Vec<_> = slots.iter_mut().filter(|(_, slot)| slot.due.is_some()).collect();
        waiting.sort_by_key(|(_, slot)| (slot.due > Some(now), slot.urgency, slot.due));
        for (identity, slot) in waiting {
            if slot.due > Some(now) {
                return slot_minimum(&slots);
            }
            if fetches.len() >= MAX_FETCHES {
                return None;
            }
            slot.due = None;
            debug!(%identity, urgency = ?slot.urgency, "fetching a certificate");
            let (identity, issuing) = (identity.clone(), self.authority.issue(identity));
            fetches.spawn(async move { (identity, issuing.await) });
        }
        None
    }

    fn record_result(&self, identity: &Identity, fetched: Result<Credentials, IdentityError>) {
        match &fetched {
            Ok(credentials) => info!(%identity, not_after = ?credentials.not_after, "certificate fetched"),
            Err(error) => {
                warn!(%identity, error = %error_chain(error), "certificate fetch failed, retrying");
            }
        }
        // Without a slot the identity was removed during the fetch.
        if let Some(slot) = self.slots().get_mut(identity) {
            slot.record_result(fetched);
        }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Identity, CertificateSlot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ready(state: &CertificateState) -> Option<Result<Arc<Credentials>, IdentityError>> {
    match state {
        CertificateState::Pending => None,
        CertificateState::Valid(credentials) => Some(Ok(Arc::clone(credentials))),
        CertificateState::Failed(error) => Some(Err(error.clone())),
    }
}

fn slot_minimum(slots: &HashMap<Identity, CertificateSlot>) -> Option<Instant> {
    slots.values().filter_map(|slot| slot.due).min()
}

async fn sleep_until(next: Option<Instant>) {
    match next {
        Some(next) => tokio::time::sleep_until(next).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
