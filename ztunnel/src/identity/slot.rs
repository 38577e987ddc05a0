//! The certificate of one identity: what is known of it, and when it is fetched next.
//!
//! Certificates begin and end by the wall clock, which may jump. Retries go by the monotonic clock.
//! A renewal is due when either clock says so: the wall clock goes on while the node is suspended,
//! and the monotonic one does not go back.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rand::RngExt;
use tokio::{sync::watch, time::Instant};

use super::{Credentials, Identity, IdentityError};
use crate::backoff::Backoff;

/// Delays between failed fetches: doubled from the first to the longest, each varied by up to a
/// fifth either way.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(150);
const RETRY_JITTER: f64 = 0.2;
/// Part of the lifetime after which a certificate is renewed. It varies, or all nodes that were
/// started together would renew together for ever.
const RENEW_AFTER: std::ops::RangeInclusive<f64> = 0.45..=0.55;
/// The wall clock is looked at so often.
const TICK: Duration = Duration::from_secs(30);
/// The certificate service learns of a new pod at its own pace, and refuses until then: for so long
/// that is no failure, and it is asked again after delays from the first to the longest.
const BECOMES_KNOWN: Duration = Duration::from_secs(5);
const FIRST_REPEAT: Duration = Duration::from_millis(20);
const LONGEST_REPEAT: Duration = Duration::from_millis(500);
/// A connection that finds no certificate has it fetched at once, unless the last attempt failed
/// less than this time ago, which varies by half either way.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// What is known of a certificate.
#[derive(Clone, Debug, Default)]
pub(super) enum CertificateState {
    /// A fetch is due or under way, and who asks waits for it.
    #[default]
    Pending,
    Valid(Arc<Credentials>),
    /// The last fetch failed and no valid certificate is held; the next one is due later.
    Failed(IdentityError),
}

impl CertificateState {
    /// What to tell who asks. `None`: to wait.
    pub(super) fn answer(&self) -> Option<Result<Arc<Credentials>, IdentityError>> {
        match self {
            Self::Pending => None,
            Self::Valid(credentials) => Some(Ok(Arc::clone(credentials))),
            Self::Failed(error) => Some(Err(error.clone())),
        }
    }
}

/// The order in which due fetches start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// A connection waits.
    RealTime,
    /// A workload may connect soon.
    Warmup,
    /// A valid certificate is due for renewal.
    Background,
}

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub monotonic: Instant,
    pub wall: SystemTime,
}

#[derive(Debug)]
enum NextFetch {
    UnderWay,
    At(Instant),
    Renewal { monotonic: Instant, wall: SystemTime },
}

/// The pod that the certificate is for is new.
#[derive(Debug)]
struct Newcomer {
    /// Until when refusals are borne.
    until: Instant,
    repeats: Backoff,
    /// Whether the control plane, and so the certificate service, knows of it.
    is_told: bool,
}

#[derive(Debug)]
pub(super) struct CertificateSlot {
    state: watch::Sender<CertificateState>,
    /// Error of the last renewal, while the certificate is still valid.
    pub renewal_error: Option<IdentityError>,
    next: NextFetch,
    /// From when on a connection may have the next fetch made at once.
    ask_again: Instant,
    pub urgency: Urgency,
    backoff: Backoff,
    newcomer: Option<Newcomer>,
}

impl CertificateSlot {
    /// Due at once.
    pub(super) fn new(urgency: Urgency, now: Now) -> Self {
        Self {
            state: watch::Sender::default(),
            renewal_error: None,
            next: NextFetch::At(now.monotonic),
            ask_again: now.monotonic,
            urgency,
            backoff: Backoff::between(FIRST_RETRY, LONGEST_RETRY).with_jitter(RETRY_JITTER),
            newcomer: None,
        }
    }

    /// A new pod has come that needs it. A certificate that is held serves it, too.
    pub(super) fn expect_newcomer(&mut self, now: Now) {
        self.newcomer = Some(Newcomer {
            until: now.monotonic + BECOMES_KNOWN,
            repeats: Backoff::between(FIRST_REPEAT, LONGEST_REPEAT).with_jitter(RETRY_JITTER),
            is_told: false,
        });
        if let CertificateState::Failed(_) = self.state() {
            self.state.send_replace(CertificateState::Pending);
            self.hasten(now);
        }
    }

    /// The control plane has told of the pod: if its certificate was refused, it may not be now.
    /// Whether a fetch is due for that.
    pub(super) fn is_told(&mut self, now: Now) -> bool {
        let Some(newcomer) = self.newcomer.as_mut().filter(|newcomer| !newcomer.is_told) else {
            return false;
        };
        newcomer.is_told = true;
        newcomer.until = now.monotonic + BECOMES_KNOWN;
        newcomer.repeats.reset();
        let is_held = matches!(*self.state.borrow(), CertificateState::Valid(_));
        if !is_held {
            self.hasten(now);
        }
        !is_held
    }

    /// Whether `error` is what may be expected for a new pod, and who waits goes on waiting.
    pub(super) fn bears(&self, error: &IdentityError, now: Now) -> bool {
        let is_new = self.newcomer.as_ref().is_some_and(|newcomer| now.monotonic < newcomer.until);
        is_new
            && matches!(error, IdentityError::Refused { .. })
            && matches!(*self.state.borrow(), CertificateState::Pending)
    }

    pub(super) fn state(&self) -> CertificateState {
        self.state.borrow().clone()
    }

    /// The answer for a connection, or the state whose change it has to wait for.
    pub(super) fn ask(
        &mut self,
        identity: &Identity,
        now: Now,
    ) -> Result<Result<Arc<Credentials>, IdentityError>, watch::Receiver<CertificateState>> {
        self.note_expiry(identity, now);
        let state = self.state();
        match state {
            CertificateState::Valid(_) => {}
            CertificateState::Failed(_) if now.monotonic < self.ask_again => self.urgency = Urgency::RealTime,
            CertificateState::Failed(_) | CertificateState::Pending => {
                self.urgency = Urgency::RealTime;
                // Who asks for a new pod's does not make the service know it sooner.
                if matches!(state, CertificateState::Failed(_)) || self.newcomer.is_none() {
                    self.hasten(now);
                }
                self.state.send_replace(CertificateState::Pending);
                return Err(self.state.subscribe());
            }
        }
        state.answer().ok_or_else(|| self.state.subscribe())
    }

    /// A certificate that has expired is held no longer.
    fn note_expiry(&mut self, identity: &Identity, now: Now) {
        let expired = match &*self.state.borrow() {
            CertificateState::Valid(credentials) => now.wall >= credentials.not_after,
            CertificateState::Pending | CertificateState::Failed(_) => false,
        };
        if expired {
            let source = self.renewal_error.take().map(Arc::new);
            let error = IdentityError::Expired { identity: identity.clone(), source };
            self.state.send_replace(CertificateState::Failed(error));
        }
    }

    /// How long until the next fetch is due, or until the wall clock has to be looked at again.
    /// `None` during a fetch.
    pub(super) fn due_in(&self, now: Now) -> Option<Duration> {
        match self.next {
            NextFetch::UnderWay => None,
            NextFetch::At(at) => Some(at.saturating_duration_since(now.monotonic)),
            NextFetch::Renewal { monotonic, wall } => {
                let by_wall = wall.duration_since(now.wall).unwrap_or_default();
                Some(by_wall.min(monotonic.saturating_duration_since(now.monotonic)).min(TICK))
            }
        }
    }

    pub(super) fn starts(&mut self) {
        self.next = NextFetch::UnderWay;
    }

    /// The certificate authority works: what failed is not put off for long. What has failed just
    /// now is, or an identity that is refused would be asked for whenever another one is not.
    pub(super) fn authority_is_back(&mut self, now: Now) {
        let failed =
            self.renewal_error.is_some() || matches!(*self.state.borrow(), CertificateState::Failed(_));
        if failed && let NextFetch::At(due) = &mut self.next {
            *due = now.monotonic.max(self.ask_again).min(*due);
        }
    }

    fn hasten(&mut self, now: Now) {
        if !matches!(self.next, NextFetch::UnderWay) {
            self.next = NextFetch::At(now.monotonic);
        }
    }

    /// Records the result of a fetch and when the next one is due. Whether a certificate arrived
    /// that should be renewed already.
    pub(super) fn record_result(
        &mut self,
        identity: &Identity,
        fetched: Result<Credentials, IdentityError>,
        now: Now,
    ) -> bool {
        if let Err(error) = &fetched
            && self.bears(error, now)
            && let Some(newcomer) = &mut self.newcomer
        {
            self.next = NextFetch::At(now.monotonic + newcomer.repeats.delay());
            return false;
        }
        self.newcomer = None;
        let ask_again = now.monotonic + ASK_AGAIN.mul_f64(rand::rng().random_range(0.5..=1.5));
        self.urgency = Urgency::Background;
        let credentials = match fetched {
            Ok(credentials) => credentials,
            Err(error) => {
                (self.next, self.ask_again) =
                    (NextFetch::At(now.monotonic + self.backoff.delay()), ask_again);
                self.note_expiry(identity, now);
                if matches!(*self.state.borrow(), CertificateState::Valid(_)) {
                    self.renewal_error = Some(error);
                } else {
                    self.state.send_replace(CertificateState::Failed(error));
                }
                return false;
            }
        };
        let renewal = credentials.after(rand::rng().random_range(RENEW_AFTER));
        let left = renewal.duration_since(now.wall).unwrap_or_default();
        let stale = left.is_zero();
        if stale {
            (self.next, self.ask_again) = (NextFetch::At(now.monotonic + self.backoff.delay()), ask_again);
        } else {
            self.backoff.reset();
            self.next = NextFetch::Renewal { monotonic: now.monotonic + left, wall: renewal };
        }
        self.renewal_error = None;
        self.state.send_replace(CertificateState::Valid(Arc::new(credentials)));
        self.note_expiry(identity, now);
        stale
    }
}
