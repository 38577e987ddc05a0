//! What is said of a policy in its status, where and as Istio's control plane says it. Pure. Of
//! `PeerAuthentication` that says nothing; here it gets the same condition.

use serde_json::{Value, json};

/// The condition that is ours. Others are left as they are.
const CONDITION: &str = "ZtunnelAccepted";

/// A kind of policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyKind {
    /// Istio's `AuthorizationPolicy`.
    #[default]
    Authorization,
    /// Our `AccessPolicy`.
    Access,
    /// Istio's `PeerAuthentication`.
    Peer,
}

impl PolicyKind {
    /// As its objects name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Authorization => "AuthorizationPolicy",
            Self::Access => "AccessPolicy",
            Self::Peer => "PeerAuthentication",
        }
    }

    /// The group of the API.
    #[must_use]
    pub fn group(self) -> &'static str {
        match self {
            Self::Authorization | Self::Peer => "security.istio.io",
            Self::Access => "adit.dev",
        }
    }

    /// The version of the API, where an object does not say it.
    #[must_use]
    pub fn version(self) -> &'static str {
        match self {
            Self::Authorization | Self::Peer => "v1",
            Self::Access => "v1alpha1",
        }
    }
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyObject {
    /// Its kind.
    pub kind: PolicyKind,
    /// The version of the API that it was read in.
    pub version: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What is said of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Of which.
    pub object: PolicyObject,
    /// Of which version of its spec.
    pub generation: i64,
    /// Whether it has an effect on tunnels.
    pub is_attached: bool,
    /// In one word.
    pub reason: &'static str,
    /// What of it they cannot do, if there is something.
    pub message: String,
}

/// A report that a policy's status does not have, and the conditions that it is to have.
#[derive(Clone, Debug, PartialEq)]
pub struct Unreported {
    /// The report.
    pub report: Report,
    /// Conditions of others.
    kept: Vec<Value>,
    /// When the status of ours was last another, if it is the same now.
    since: Option<String>,
}

impl Unreported {
    /// `None`: `conditions`, which are the policy's, say it already.
    #[must_use]
    pub fn new(report: Report, conditions: &[Value]) -> Option<Self> {
        let is_ours = |condition: &&Value| condition["type"] == CONDITION;
        let ours = conditions.iter().find(is_ours);
        let same = |key: &str, value: &str| ours.is_some_and(|ours| ours[key] == value);
        // Istio's resource has it as a text or as a number.
        let generation = ours.map(|ours| &ours["observedGeneration"]).is_some_and(|observed| {
            let text = observed.as_str().and_then(|text| text.parse().ok());
            observed.as_i64().or(text) == Some(report.generation)
        });
        let status_stays = same("status", report.status());
        if status_stays && generation && same("reason", report.reason) && same("message", &report.message) {
            return None;
        }
        let kept = conditions.iter().filter(|condition| !is_ours(condition)).cloned().collect();
        let since = ours.filter(|_| status_stays).and_then(|ours| ours["lastTransitionTime"].as_str());
        Some(Self { report, kept, since: since.map(str::to_owned) })
    }

    /// The conditions that the status is to have. `now`: RFC 3339.
    #[must_use]
    pub fn conditions(&self, now: String) -> Vec<Value> {
        let report = &self.report;
        let ours = json!({
            "type": CONDITION, "status": report.status(), "reason": report.reason, "message": report.message,
            "observedGeneration": report.generation,
            "lastTransitionTime": self.since.clone().unwrap_or(now),
        });
        self.kept.iter().cloned().chain([ours]).collect()
    }
}

impl Report {
    fn status(&self) -> &'static str {
        if self.is_attached { "True" } else { "False" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(generation: i64, message: &str) -> Report {
        let [version, namespace, name] = ["v1alpha1", "demo", "p"].map(str::to_owned);
        let object = PolicyObject { kind: PolicyKind::Access, version, namespace, name };
        Report { object, generation, is_attached: true, reason: "Accepted", message: message.to_owned() }
    }

    #[test]
    fn a_status_is_written_once_and_conditions_of_others_stay() {
        let other = json!({"type": "WaypointAccepted", "status": "True"});
        let first = Unreported::new(report(1, "a"), std::slice::from_ref(&other)).unwrap();
        let written = first.conditions("2026-01-01T00:00:00Z".to_owned());
        assert_eq!((written.len(), &written[0]), (2, &other));
        assert_eq!(Unreported::new(report(1, "a"), &written), None);

        // The status itself is the same, so it has been since then.
        for changed in [report(2, "a"), report(1, "b")] {
            let again = Unreported::new(changed, &written).unwrap().conditions("later".to_owned());
            assert_eq!(again.len(), 2);
            assert_eq!(again[1]["lastTransitionTime"], "2026-01-01T00:00:00Z");
        }
        let refused = Report { is_attached: false, ..report(1, "a") };
        let again = Unreported::new(refused, &written).unwrap().conditions("later".to_owned());
        assert_eq!(
            (&again[1]["status"], &again[1]["lastTransitionTime"]),
            (&json!("False"), &json!("later"))
        );

        // As Istio's resource shows a number of 64 bits.
        let mut texts = written;
        texts[1]["observedGeneration"] = json!("1");
        assert_eq!(Unreported::new(report(1, "a"), &texts), None);
    }
}
