//! Follows the Secret of the root: what is signed, and whom tunnels trust, change with it. A Secret
//! that is deleted, or that cannot be used, changes nothing: the last good one stays in use.
//!
//! Every replica does the same, by what the Secret holds. Of two that change it at the same time one
//! fails, and sees what the other wrote.

use std::{sync::Arc, time::Duration};

use error_reporter::Report;
use futures_util::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::{api::core::v1::Secret, jiff::Timestamp};
use kube::{
    Client,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event},
    },
};
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    Authority, CurrentAuthority,
    place::{RootError, RootPlace},
    revoked::{self, Revoked},
    rotation,
    secret::{self, RootSecret},
};
use crate::metrics::Metrics;

/// How long one watch lasts. A connection that died silently is noticed soon after that.
const WATCH_SECS: u32 = 120;
/// The ConfigMap is written so often, in case somebody changed it.
const PUBLISH_AGAIN: Duration = Duration::from_mins(1);
/// After the API server refused something.
const RETRY: Duration = Duration::from_secs(5);

/// Follows the Secret. [`run`](Self::run) does all the work.
#[derive(Debug)]
pub struct RootKeeper {
    place: RootPlace,
    overlap: Duration,
    metrics: Arc<Metrics>,
    publish: watch::Sender<Arc<Authority>>,
    /// What the API server has. `None`: nothing.
    seen: Option<Secret>,
    /// The last that could be used.
    good: Secret,
    /// Whose certificates may be in use, besides those that the Secret says to be previous ones.
    own: Vec<CertificateDer<'static>>,
    revoked: Revoked,
    /// Of certificates, at most.
    life: Duration,
    /// Whether the log says that what signs may not sign a list.
    cannot_revoke: bool,
    /// What the log says of the Secret.
    complaint: Option<String>,
}

impl RootKeeper {
    /// Begins with what [`RootPlace::open`] returned. `life`: of certificates, at most.
    #[must_use]
    pub fn new(
        place: RootPlace,
        (secret, read): (Secret, RootSecret),
        life: Duration,
        metrics: Arc<Metrics>,
    ) -> (Self, CurrentAuthority) {
        let (own, revoked) = (own_roots(&read), read.revoked);
        let (publish, current) = watch::channel(Arc::new(read.authority));
        let overlap = rotation::overlap(life);
        let seen = Some(secret.clone());
        let keeper = Self {
            place,
            overlap,
            metrics,
            publish,
            seen,
            good: secret,
            own,
            revoked,
            life,
            cannot_revoke: false,
            complaint: None,
        };
        keeper.show(true);
        (keeper, current)
    }

    /// Follows it until `stop`.
    pub async fn run(mut self, client: Client, stop: CancellationToken) {
        let config = watcher::Config::default()
            .fields(&format!("metadata.name={}", self.place.secret))
            .timeout(WATCH_SECS);
        let mut events = watcher::watcher(self.place.secrets(&client), config).default_backoff().boxed();
        let mut listing = None;
        // Said once, however long the API server is away.
        let mut failing = false;
        let work = async {
            loop {
                let pause = match self.react(&client).await {
                    Ok(pause) => {
                        failing = false;
                        pause
                    }
                    Err(error) => {
                        if !std::mem::replace(&mut failing, true) {
                            warn!(
                                error = %Report::new(&error),
                                "the root stays in use, and cannot be kept; trying again"
                            );
                        }
                        RETRY
                    }
                };
                tokio::select! {
                    event = events.try_next() => match event {
                        Ok(Some(Event::Init)) => listing = None,
                        Ok(Some(Event::InitApply(secret))) => listing = Some(secret),
                        Ok(Some(Event::InitDone)) => self.seen = listing.take(),
                        Ok(Some(Event::Apply(secret))) => self.seen = Some(secret),
                        Ok(Some(Event::Delete(_))) => self.seen = None,
                        Ok(None) => return,
                        Err(error) => {
                            self.metrics.watch_failed("secrets");
                            if !std::mem::replace(&mut failing, true) {
                                warn!(secret = self.place.name(), %error, "cannot watch the root; trying again");
                            }
                        }
                    },
                    () = tokio::time::sleep(pause) => {}
                }
            }
        };
        let _ = stop.run_until_cancelled(work).await;
    }

    /// Does what is due, and returns when to look again.
    async fn react(&mut self, client: &Client) -> Result<Duration, RootError> {
        loop {
            let Some(secret) = self.seen.clone() else {
                if secret::is_made(&self.good) {
                    let restored = self.place.create(client, &secret::restored(&self.good)).await?;
                    if restored.is_some() {
                        warn!(secret = self.place.name(), "the Secret was deleted; it is written again");
                        self.seen = restored;
                        continue;
                    }
                }
                self.complain("it was deleted".to_owned());
                return Ok(PUBLISH_AGAIN);
            };
            let read = match RootSecret::read(&secret) {
                Ok(read) => read,
                Err(error) => {
                    self.complain(Report::new(&error).to_string());
                    return Ok(PUBLISH_AGAIN);
                }
            };
            let lost: Vec<_> =
                self.own.iter().filter(|root| !read.authority.trusted().contains(root)).cloned().collect();
            let now = Timestamp::now();
            let change = rotation::due(&secret, &read, &lost, now, self.overlap);
            let pause = rotation::next_time(&read, self.overlap).map_or(PUBLISH_AGAIN, |time| {
                now.duration_until(time).try_into().unwrap_or(Duration::ZERO).min(PUBLISH_AGAIN)
            });
            self.adopt(secret, read, &lost);
            let current = Arc::clone(&self.publish.borrow());
            self.place.publish(client, &current).await?;
            self.keep_revocations(client, &current).await?;
            let Some(change) = change else { return Ok(pause) };
            let Some(replaced) = self.place.replace(client, &change.secret).await? else {
                // Another replica was first: the watch says what it wrote.
                return Ok(RETRY);
            };
            info!(secret = self.place.name(), change.what, "the root's Secret changed");
            self.seen = Some(replaced);
        }
    }

    /// Has the list of revoked certificates say what it should.
    async fn keep_revocations(&mut self, client: &Client, authority: &Authority) -> Result<(), RootError> {
        let Some(map) = &self.place.crl_config_map else { return Ok(()) };
        let published = self.place.revocations(client, map).await?;
        match revoked::lists(authority, &self.revoked, &published, self.life) {
            Ok(Some(lists)) => {
                self.place.publish_revocations(client, map, lists).await?;
                info!(revoked = self.revoked.len(), "the list of revoked certificates is written");
            }
            Err(error) if !self.cannot_revoke => {
                self.cannot_revoke = true;
                warn!(error = %Report::new(&error), "there is no list of revoked certificates");
            }
            Ok(None) | Err(_) => {}
        }
        Ok(())
    }

    /// What the Secret holds is used from now on.
    fn adopt(&mut self, secret: Secret, read: RootSecret, lost: &[CertificateDer<'static>]) {
        if self.complaint.take().is_some() {
            info!(secret = self.place.name(), "the root's Secret can be used again");
        }
        if secret.metadata.resource_version != self.good.metadata.resource_version {
            if lost.is_empty() {
                // Kept while it is not in the Secret.
                self.own = own_roots(&read);
            }
            self.revoked = read.revoked;
            self.publish.send_replace(Arc::new(read.authority.trusting(lost)));
            self.good = secret;
        }
        self.show(true);
    }

    fn complain(&mut self, complaint: String) {
        if self.complaint.as_ref() != Some(&complaint) {
            warn!(
                secret = self.place.name(),
                complaint, "the root's Secret cannot be used; the last good one is"
            );
            self.complaint = Some(complaint);
        }
        self.show(false);
    }

    fn show(&self, usable: bool) {
        let current = self.publish.borrow();
        let ends = current.not_after().unix_timestamp();
        self.metrics.root(usable, current.trusted().len(), ends);
        self.metrics.revoked(self.revoked.len());
    }
}

/// Of what is signed now.
fn own_roots(read: &RootSecret) -> Vec<CertificateDer<'static>> {
    let is_next = |root: &CertificateDer<'_>| read.next.as_ref().is_some_and(|(next, _)| next == root);
    let own = read.authority.trusted().iter();
    own.filter(|root| !is_next(root) && !read.previous.contains(root)).cloned().collect()
}
