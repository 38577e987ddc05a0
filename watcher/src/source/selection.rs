//! Whether a pod is enrolled: by a label of its own or of its namespace, Istio's by default.

use std::{collections::BTreeMap, str::FromStr};

use crate::model::pod::Selection;
use crate::model::reason::{Reason, ReasonCode};

/// The label's value that leaves a pod alone although its namespace is enrolled.
const NONE: &str = "none";

/// The label that says who carries a pod's traffic, and the value that means us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mode {
    pub key: String,
    pub value: String,
}

impl Default for Mode {
    fn default() -> Self {
        Self { key: "istio.io/dataplane-mode".to_owned(), value: "ambient".to_owned() }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.key, self.value)
    }
}

/// A text that is no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected KEY=VALUE such as {}, with a value other than {NONE}", Mode::default())]
pub struct InvalidMode;

impl FromStr for Mode {
    type Err = InvalidMode;

    fn from_str(text: &str) -> Result<Self, InvalidMode> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() && !value.is_empty() && value != NONE => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err(InvalidMode),
        }
    }
}

/// What the labels of one object say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Asks {
    Enrol,
    LeaveAlone,
    /// Nothing that we know: no label, a typing error, or somebody else's mode.
    #[default]
    Nothing,
}

impl Mode {
    pub fn asks(&self, labels: &BTreeMap<String, String>) -> Asks {
        match labels.get(&self.key) {
            Some(value) if *value == self.value => Asks::Enrol,
            Some(value) if value == NONE => Asks::LeaveAlone,
            _ => Asks::Nothing,
        }
    }
}

/// What pod and namespace ask for together. The pod's `none` wins, so that one pod of an enrolled namespace
/// can stay out. `None`: it depends on the namespace, of which nothing is known yet.
pub fn together(pod: Asks, namespace: Option<Asks>) -> Option<Selection> {
    match (pod, namespace) {
        (Asks::Enrol, _) | (Asks::Nothing, Some(Asks::Enrol)) => Some(Selection::Enrolled),
        (Asks::LeaveAlone, _) | (Asks::Nothing, Some(_)) => Some(Selection::Plain),
        (Asks::Nothing, None) => None,
    }
}

/// What a pod's own labels ask for, where there are no namespaces.
pub fn by_labels(labels: &BTreeMap<String, String>) -> Selection {
    together(Mode::default().asks(labels), Some(Asks::Nothing)).unwrap_or_default()
}

/// `selection`, unless the pod must not be enrolled whatever its labels say. A pod that nobody wants to enrol
/// needs no reason for being left alone.
pub fn unless(selection: Selection, host_network: bool, sidecar: Option<&str>) -> Selection {
    match (selection, sidecar) {
        (Selection::Enrolled, _) if host_network => Selection::LeftAlone(Reason::new(
            ReasonCode::HostNetwork,
            "it has no network of its own: its traffic is the node's",
        )),
        (Selection::Enrolled, Some(sidecar)) => Selection::LeftAlone(Reason::new(
            ReasonCode::Sidecar,
            format!("{sidecar}, which carries its traffic"),
        )),
        (selection, _) => selection,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(key: &str, value: &str) -> BTreeMap<String, String> {
        [(key.to_owned(), value.to_owned())].into()
    }

    #[test]
    fn only_the_value_ambient_enrols() {
        for (key, value, selection) in [
            ("istio.io/dataplane-mode", "ambient", Selection::Enrolled),
            ("istio.io/dataplane-mode", "none", Selection::Plain),
            ("istio.io/dataplane-mode", "Ambient", Selection::Plain),
            ("dataplane-mode", "ambient", Selection::Plain),
        ] {
            assert_eq!(by_labels(&labels(key, value)), selection, "{key}: {value}");
        }
        assert_eq!(by_labels(&BTreeMap::new()), Selection::Plain);
    }

    #[test]
    fn the_pods_none_wins_and_a_namespace_that_is_not_known_decides_nothing() {
        use Asks::{Enrol, LeaveAlone, Nothing};
        for (pod, namespace, selection) in [
            (Nothing, Some(Enrol), Some(Selection::Enrolled)),
            (LeaveAlone, Some(Enrol), Some(Selection::Plain)),
            (Enrol, Some(Nothing), Some(Selection::Enrolled)),
            (Enrol, Some(LeaveAlone), Some(Selection::Enrolled)),
            (Nothing, Some(LeaveAlone), Some(Selection::Plain)),
            (Nothing, Some(Nothing), Some(Selection::Plain)),
            (Enrol, None, Some(Selection::Enrolled)),
            (LeaveAlone, None, Some(Selection::Plain)),
            (Nothing, None, None),
        ] {
            assert_eq!(together(pod, namespace), selection, "{pod:?} {namespace:?}");
        }
    }

    #[test]
    fn the_label_can_be_another_one() {
        let mode: Mode = "example.org/mesh=on".parse().unwrap();
        assert_eq!(mode.asks(&labels("example.org/mesh", "on")), Asks::Enrol);
        assert_eq!(mode.asks(&labels("example.org/mesh", "none")), Asks::LeaveAlone);
        assert_eq!(mode.asks(&labels("istio.io/dataplane-mode", "ambient")), Asks::Nothing);
        for bad in ["", "=", "key", "key=", "=on", "key=none"] {
            assert!(bad.parse::<Mode>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_reason_is_given_only_where_the_pod_would_be_enrolled() {
        let code = |selection, host, sidecar| match unless(selection, host, sidecar) {
            Selection::LeftAlone(reason) => reason.code.code(),
            Selection::Enrolled => "enrolled",
            Selection::Plain => "plain",
        };
        assert_eq!(code(Selection::Enrolled, true, Some("a proxy")), "host_network");
        assert_eq!(code(Selection::Enrolled, false, Some("a proxy")), "sidecar");
        assert_eq!(code(Selection::Enrolled, false, None), "enrolled");
        assert_eq!(code(Selection::Plain, true, Some("a proxy")), "plain");
    }
}
