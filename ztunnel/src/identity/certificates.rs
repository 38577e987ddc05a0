//! One valid certificate per local identity: fetched once for all that wait, renewed at about half
//! of its lifetime.
//!
//! A certificate is held for an identity only while a pod with its service account is served, or
//! has connections: each such pod has an [`AccountLease`].

use std::{
    collections::{HashMap, HashSet},
    fmt,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{sync::Notify, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Credentials, Identity, IdentityError, MeshTrust,
    authority::Authority,
    ca_client::CaClient,
    clock::WallClock,
    development_ca::DevelopmentCa,
    slot::{CertificateSlot, CertificateState, Now, Urgency},
    trust::TlsParameters,
};
use crate::{
    config::{CaConfig, Config},
    error_chain::error_chain,
};

/// Concurrent fetches. The control plane may serve many nodes that start at the same time.
const MAX_FETCHES: usize = 8;

/// The certificates of the workloads that this process serves. [`run`](Self::run) does all
/// fetching: nothing is fetched before it runs or after it ended.
pub struct Certificates {
    authority: Box<dyn Authority>,
    /// What those who show them accept.
    trust: Arc<MeshTrust>,
    clock: WallClock,
    held: Mutex<Held>,
    /// Notified when a slot may be due.
    wanted: Notify,
    stopped: CancellationToken,
}

#[derive(Default)]
struct Held {
    slots: HashMap<Identity, CertificateSlot>,
    /// How many leases there are of each account.
    accounts: HashMap<Account, usize>,
}

/// Namespace and service account: an identity without its trust domain.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Account {
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl Account {
    fn of(identity: &Identity) -> Self {
        let Identity { namespace, service_account, .. } = identity;
        Self { namespace: Arc::clone(namespace), service_account: Arc::clone(service_account) }
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").field("known", &self.list()).finish_non_exhaustive()
    }
}

/// As long as it lives, there are certificates for a service account, in whatever trust domain its
/// pods are.
#[derive(Debug)]
pub struct AccountLease {
    certificates: Arc<Certificates>,
    account: Account,
}

impl Drop for AccountLease {
    fn drop(&mut self) {
        let mut held = self.certificates.held();
        let Some(leases) = held.accounts.get_mut(&self.account) else { return };
        *leases -= 1;
        if *leases == 0 {
            held.accounts.remove(&self.account);
            held.slots.retain(|identity, _| Account::of(identity) != self.account);
        }
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
    pub fn new(config: &Config, trust: Arc<MeshTrust>) -> Result<Arc<Self>, IdentityError> {
        let tls = TlsParameters::new(config.tls).with_trust(Arc::clone(&trust));
        let authority: Box<dyn Authority> = match &config.ca {
            CaConfig::Service { service, impersonate } => {
                Box::new(CaClient::new(service.clone(), *impersonate, config.secret_ttl, tls))
            }
            CaConfig::Development { folder } => {
                Box::new(DevelopmentCa::open(folder, config.secret_ttl, tls)?)
            }
        };
        Ok(Self::with_authority(authority, WallClock::system(), trust))
    }

    fn with_authority(authority: Box<dyn Authority>, clock: WallClock, trust: Arc<MeshTrust>) -> Arc<Self> {
        Arc::new(Self {
            authority,
            trust,
            clock,
            held: Mutex::default(),
            wanted: Notify::new(),
            stopped: CancellationToken::new(),
        })
    }

    /// Of which trust domains peers are accepted.
    pub fn trust(&self) -> &Arc<MeshTrust> {
        &self.trust
    }

    /// Allows certificates for the pods of a service account, as long as the lease lives.
    pub fn lease(self: &Arc<Self>, namespace: Arc<str>, service_account: Arc<str>) -> AccountLease {
        let account = Account { namespace, service_account };
        *self.held().accounts.entry(account.clone()).or_default() += 1;
        AccountLease { certificates: Arc::clone(self), account }
    }

    /// The certificate of `identity`: at once if it is valid, else when the fetch ends.
    ///
    /// # Errors
    /// The error of the last fetch, or [`IdentityError::Removed`] without a lease of the account.
    /// `run` retries after a delay, which asking again shortens once some seconds have passed.
    pub async fn get(&self, identity: &Identity) -> Result<Arc<Credentials>, IdentityError> {
        let now = self.now();
        let asked = {
            let mut held = self.held();
            let Held { slots, accounts } = &mut *held;
            if !slots.contains_key(identity) && !accounts.contains_key(&Account::of(identity)) {
                return Err(IdentityError::Removed { identity: identity.clone() });
            }
            let new = || CertificateSlot::new(Urgency::RealTime, now);
            slots.entry(identity.clone()).or_insert_with(new).ask(identity, now)
        };
        let mut state = match asked {
            Ok(answer) => return answer,
            Err(state) => state,
        };
        self.wanted.notify_one();
        tokio::select! {
            biased;
            result = state.wait_for(|state| state.answer().is_some()) => match result {
                Ok(state) => state.answer().unwrap_or(Err(IdentityError::Stopped)),
                Err(_) => Err(IdentityError::Removed { identity: identity.clone() }),
            },
            () = self.stopped.cancelled() => Err(IdentityError::Stopped),
        }
    }

    /// Tells who the served pods are now: those that are `told`, and those that are new and of which
    /// only the node agent has told. Their certificates are fetched, so that the first connection does
    /// not wait. What an account was before, in another trust domain, is forgotten.
    pub fn serve(&self, told: &HashSet<Identity>, new: &HashSet<Identity>) {
        let now = self.now();
        let current: HashSet<Account> = told.union(new).map(Account::of).collect();
        let mut held = self.held();
        let Held { slots, accounts } = &mut *held;
        slots.retain(|known, _| {
            told.contains(known) || new.contains(known) || !current.contains(&Account::of(known))
        });
        let mut due = false;
        for identity in told.union(new).filter(|one| accounts.contains_key(&Account::of(one))) {
            let is_told = told.contains(identity);
            if let Some(slot) = slots.get_mut(identity) {
                due |= is_told && slot.is_told(now);
                continue;
            }
            let mut slot = CertificateSlot::new(Urgency::Warmup, now);
            if !is_told {
                slot.expect_newcomer(now);
            }
            slots.insert(identity.clone(), slot);
            due = true;
        }
        drop(held);
        if due {
            self.wanted.notify_one();
        }
    }

    /// A new pod of `identity` has come, of which the certificate service may not know yet. Its
    /// refusals are borne for some seconds.
    pub fn expect_newcomer(&self, identity: &Identity) {
        if let Some(slot) = self.held().slots.get_mut(identity) {
            slot.expect_newcomer(self.now());
        }
        self.wanted.notify_one();
    }

    /// Why there is no valid certificate of `identity` at this moment; `None`: there is one.
    pub fn lacks(&self, identity: &Identity) -> Option<String> {
        match self.held().slots.get(identity).map(CertificateSlot::state) {
            Some(CertificateState::Valid(_)) => None,
            Some(CertificateState::Failed(error)) => Some(error_chain(&error)),
            Some(CertificateState::Pending) | None => Some("it was not fetched yet".to_owned()),
        }
    }

    /// All identities, sorted.
    pub fn list(&self) -> Vec<CertificateInfo> {
        let known = |(identity, slot): (&Identity, &CertificateSlot)| {
            let (credentials, failed) = match slot.state() {
                CertificateState::Pending => (None, None),
                CertificateState::Valid(credentials) => (Some(credentials), None),
                CertificateState::Failed(error) => (None, Some(error.to_string())),
            };
            let error = failed.or_else(|| slot.renewal_error.as_ref().map(ToString::to_string));
            CertificateInfo { identity: identity.clone(), credentials, error }
        };
        let mut all: Vec<_> = self.held().slots.iter().map(known).collect();
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
                    Err(error) => warn!(%error, "certificate fetch was cancelled"),
                },
                () = self.wanted.notified() => {}
                () = sleep(next) => {}
            }
        }
    }

    /// Starts due fetches, the most urgent first, and returns when to look again. `None`: not
    /// before a fetch ends.
    fn start_due(
        &self,
        fetches: &mut JoinSet<(Identity, Result<Credentials, IdentityError>)>,
    ) -> Option<Duration> {
        let now = self.now();
        let mut held = self.held();
        let waiting = held.slots.iter_mut().filter_map(|(identity, slot)| {
            let due_in = slot.due_in(now)?;
            Some((due_in, identity, slot))
        });
        let mut waiting: Vec<_> = waiting.collect();
        waiting.sort_by_key(|(due_in, _, slot)| (!due_in.is_zero(), *due_in, slot.urgency));
        for (due_in, identity, slot) in waiting {
            if !due_in.is_zero() {
                return Some(due_in);
            }
            if fetches.len() >= MAX_FETCHES {
                return None;
            }
            slot.starts();
            debug!(%identity, urgency = ?slot.urgency, "fetching a certificate");
            let (identity, issuing) = (identity.clone(), self.authority.issue(identity));
            fetches.spawn(async move {
                // Who waits for it is told, and it is tried again.
                let issued = AssertUnwindSafe(issuing).catch_unwind().await;
                (identity, issued.unwrap_or(Err(IdentityError::Panicked)))
            });
        }
        None
    }

    fn record_result(&self, identity: &Identity, fetched: Result<Credentials, IdentityError>) {
        let (now, works) = (self.now(), fetched.is_ok());
        let mut held = self.held();
        let slot = held.slots.get(identity);
        match &fetched {
            Ok(credentials) => info!(%identity, not_after = ?credentials.not_after, "certificate fetched"),
            Err(error) if slot.is_some_and(|slot| slot.bears(error, now)) => {
                debug!(%identity, error = %error_chain(error), "no certificate for a new pod yet, asking again");
            }
            Err(error) => {
                warn!(%identity, error = %error_chain(error), "certificate fetch failed, retrying");
            }
        }
        // Without a slot the identity was removed during the fetch.
        let stale =
            held.slots.get_mut(identity).is_some_and(|slot| slot.record_result(identity, fetched, now));
        if works {
            held.slots.values_mut().for_each(|slot| slot.authority_is_back(now));
        }
        if stale {
            warn!(%identity, "a new certificate is already past half of its lifetime: \
                compare the clock of this node with that of the certificate service");
        }
    }

    fn now(&self) -> Now {
        Now { monotonic: Instant::now(), wall: self.clock.now() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn sleep(until_next: Option<Duration>) {
    match until_next {
        Some(pause) => tokio::time::sleep(pause).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
