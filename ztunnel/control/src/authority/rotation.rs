//! From one root to the next, without a moment in which two tunnels do not trust each other. Pure.
//!
//! 1. *Trust*: the next root is trusted, and does not sign. A tunnel learns of it when it renews a
//!    certificate.
//! 2. When every certificate from before has ended, the next root signs.
//! 3. *Retire*: the one before is trusted until every certificate that leads to it has ended.
//!
//! Everything is in the Secret, with the times, so that a process that ends forgets nothing, and all
//! go by the same. The same happens to a root that somebody puts in the place of another: then only
//! the third step is left.

use std::time::Duration;

use k8s_openapi::{api::core::v1::Secret, jiff::Timestamp};
use rustls::pki_types::CertificateDer;

use super::{
    revoked::Revoked,
    secret::{self, RootSecret},
};

/// How long an overlap lasts, where certificates last for `life`: longer, as clocks differ.
#[must_use]
pub fn overlap(life: Duration) -> Duration {
    life + life / 8
}

/// A change that is due.
#[derive(Debug)]
pub(super) struct Change {
    /// The Secret as it is to be.
    pub secret: Secret,
    /// What for.
    pub what: &'static str,
}

/// What is due now of `secret`, which was read as `read`. `lost`: roots of before that it does not
/// name any more.
pub(super) fn due(
    secret: &Secret,
    read: &RootSecret,
    lost: &[CertificateDer<'static>],
    now: Timestamp,
    overlap: Duration,
) -> Option<Change> {
    let later = ends(now, overlap);
    let change = |what, secret| Some(Change { secret, what });
    let retire = |roots: &[CertificateDer<'static>], secret| {
        let all = [&read.previous, roots].concat();
        secret::with_previous(secret, &all, Some(later))
    };
    if !lost.is_empty() {
        return change("the root before is trusted for a while yet", retire(lost, secret.clone()));
    }
    match &read.next {
        Some((_, None)) => {
            return change("the next root is trusted", secret::signing_from(secret.clone(), later));
        }
        Some((next, Some(from))) if *from <= now => {
            let own = read.authority.trusted().iter().filter(|root| *root != next);
            let own: Vec<_> = own.filter(|root| !read.previous.contains(root)).cloned().collect();
            return change("the next root signs", retire(&own, secret::switched(secret.clone())));
        }
        Some(_) | None => {}
    }
    let (ended, listed): (Revoked, Revoked) =
        read.revoked.clone().into_iter().partition(|(_, since)| ends(*since, overlap) <= now);
    if !ended.is_empty() {
        return change("revoked certificates have ended", secret::with_revoked(secret.clone(), &listed));
    }
    match read.previous_until {
        _ if read.previous.is_empty() => None,
        None => change("the root before is trusted for a while yet", retire(&[], secret.clone())),
        Some(until) if until <= now => {
            let secret = secret::with_previous(secret.clone(), &[], None);
            change("the root before is not trusted any more", secret)
        }
        Some(_) => None,
    }
}

/// When something will be due.
pub(super) fn next_time(read: &RootSecret, overlap: Duration) -> Option<Timestamp> {
    let signs = read.next.as_ref().and_then(|(_, from)| *from);
    let retired = read.previous_until.filter(|_| !read.previous.is_empty());
    let listed = read.revoked.values().map(|since| ends(*since, overlap));
    signs.into_iter().chain(retired).chain(listed).min()
}

/// When what was signed before `since` has ended.
fn ends(since: Timestamp, overlap: Duration) -> Timestamp {
    since.checked_add(overlap).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests;
