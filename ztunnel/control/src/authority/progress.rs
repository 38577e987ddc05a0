//! How far a rotation is, for whoever asks. Pure.

use std::fmt::{self, Write as _};

use aws_lc_rs::digest::{SHA256, digest};
use k8s_openapi::jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use serde::Serialize;

use super::{AuthorityError, checked, secret::RootSecret};

/// How far a rotation is.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Namespace and name of the Secret.
    pub secret: String,
    /// The step.
    pub step: Step,
    /// What signs.
    pub signing: RootInfo,
    /// What will sign.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<RootInfo>,
    /// From when. `None`: no control plane has seen the next root yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_signs_from: Option<Timestamp>,
    /// What signed before and is trusted yet.
    pub previous: Vec<RootInfo>,
    /// Until when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous_trusted_until: Option<Timestamp>,
}

/// A step of a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// No rotation goes on.
    Idle,
    /// The next root is trusted, and does not sign yet.
    Trust,
    /// The next root signs, and the one before is trusted yet.
    Retire,
}

/// A root.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct RootInfo {
    /// Its name.
    pub subject: String,
    /// Of the whole certificate, in hexadecimal digits.
    pub sha256: String,
    /// When it ends.
    pub not_after: Timestamp,
}

impl RootInfo {
    fn of(der: &CertificateDer<'_>) -> Result<Self, AuthorityError> {
        let certificate = checked(der)?;
        let mut sha256 = String::new();
        for byte in digest(&SHA256, der).as_ref() {
            let _ = write!(sha256, "{byte:02x}");
        }
        let not_after = Timestamp::from_second(certificate.validity.not_after.timestamp());
        Ok(Self {
            subject: certificate.subject.to_string(),
            sha256,
            not_after: not_after.unwrap_or(Timestamp::MAX),
        })
    }
}

impl Progress {
    /// Of what the Secret holds.
    ///
    /// # Errors
    /// A root has ended.
    pub fn of(secret: &str, read: &RootSecret) -> Result<Self, AuthorityError> {
        let step = match (&read.next, read.previous.is_empty()) {
            (Some(_), _) => Step::Trust,
            (None, false) => Step::Retire,
            (None, true) => Step::Idle,
        };
        Ok(Self {
            secret: secret.to_owned(),
            step,
            signing: RootInfo::of(&read.authority.trusted()[0])?,
            next: read.next.as_ref().map(|(root, _)| RootInfo::of(root)).transpose()?,
            next_signs_from: read.next.as_ref().and_then(|(_, from)| *from),
            previous: read.previous.iter().map(RootInfo::of).collect::<Result<_, _>>()?,
            previous_trusted_until: read.previous_until,
        })
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |time: &Timestamp| Timestamp::from_second(time.as_second()).unwrap_or(*time);
        let root = |f: &mut fmt::Formatter<'_>, role: &str, root: &RootInfo| {
            writeln!(f, "{role:<9} {}, until {}, SHA-256 {}", root.subject, root.not_after, root.sha256)
        };
        writeln!(f, "Secret    {}", self.secret)?;
        root(f, "signs", &self.signing)?;
        self.next.iter().try_for_each(|next| root(f, "next", next))?;
        self.previous.iter().try_for_each(|previous| root(f, "previous", previous))?;
        let (next, until) = (self.next_signs_from.as_ref(), self.previous_trusted_until.as_ref());
        match (self.step, next.map(whole), until.map(whole)) {
            (Step::Idle, ..) => f.write_str("no rotation goes on"),
            (Step::Trust, Some(from), _) => write!(
                f,
                "step 1 of 2: tunnels learn the next root as they renew their certificates; it signs from {from}"
            ),
            (Step::Trust, None, _) => f.write_str("step 1 of 2: no control plane has seen the next root yet"),
            (Step::Retire, _, Some(until)) => write!(
                f,
                "step 2 of 2: tunnels renew their certificates; the root before is trusted until {until}"
            ),
            (Step::Retire, _, None) => f.write_str("step 2 of 2: tunnels renew their certificates"),
        }
    }
}
