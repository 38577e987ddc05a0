//! Whether a pod is enrolled: a label of the pod or of its namespace decides, Istio's by default.

use std::{collections::BTreeMap, str::FromStr};

use crate::model::pod::Selection;
use crate::model::reason::{Reason, ReasonCode};

/// The label's value that leaves a pod alone although its namespace is enrolled.
const NONE: &str = "none";

/// The label that enrols, and the value that means this mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataplaneLabel {
    /// The label's key.
    pub key: String,
    /// The value that enrols.
    pub value: String,
}

impl Default for DataplaneLabel {
    fn default() -> Self {
        Self { key: "istio.io/dataplane-mode".to_owned(), value: "ambient".to_owned() }
    }
}

impl std::fmt::Display for DataplaneLabel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.key, self.value)
    }
}

/// A text that is no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected KEY=VALUE such as {}, with a value other than {NONE}", DataplaneLabel::default())]
pub struct InvalidDataplaneLabel;

impl FromStr for DataplaneLabel {
    type Err = InvalidDataplaneLabel;

    fn from_str(text: &str) -> Result<Self, InvalidDataplaneLabel> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() && !value.is_empty() && value != NONE => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err(InvalidDataplaneLabel),
        }
    }
}

/// What the labels of one pod or namespace decide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LabelDecision {
    /// It is enrolled.
    Enrol,
    /// It is not, whatever the namespace decides.
    OptOut,
    /// Nothing: the label is missing, misspelt, or names another mesh.
    #[default]
    Undecided,
}

impl DataplaneLabel {
    pub(crate) fn decide(&self, labels: &BTreeMap<String, String>) -> LabelDecision {
        match labels.get(&self.key) {
            Some(value) if *value == self.value => LabelDecision::Enrol,
            Some(value) if value == NONE => LabelDecision::OptOut,
            _ => LabelDecision::Undecided,
        }
    }
}

/// The decision of the pod's and the namespace's labels together. The pod's `none` wins, so that
/// one pod of an enrolled namespace can stay out. `None`: it depends on the namespace, which is not
/// known yet.
#[must_use]
pub fn combine(pod: LabelDecision, namespace: Option<LabelDecision>) -> Option<Selection> {
    match (pod, namespace) {
        (LabelDecision::Enrol, _) | (LabelDecision::Undecided, Some(LabelDecision::Enrol)) => {
            Some(Selection::Enrolled)
        }
        (LabelDecision::OptOut, _) | (LabelDecision::Undecided, Some(_)) => Some(Selection::Plain),
        (LabelDecision::Undecided, None) => None,
    }
}

/// The decision of a pod's labels alone, where there are no namespaces.
#[must_use]
pub fn by_labels(labels: &BTreeMap<String, String>) -> Selection {
    combine(DataplaneLabel::default().decide(labels), Some(LabelDecision::Undecided)).unwrap_or_default()
}

/// `selection`, unless the pod cannot be enrolled whatever its labels decide. A pod that no label
/// enrols needs no reason.
#[must_use]
pub fn except(selection: Selection, host_network: bool, sidecar: Option<&str>) -> Selection {
    match (selection, sidecar) {
        (Selection::Enrolled, _) if host_network => {
            Selection::LeftAlone(Reason::new(ReasonCode::HostNetwork, "it uses the node's network"))
        }
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
        use LabelDecision::{Enrol, OptOut, Undecided};
        for (pod, namespace, selection) in [
            (Undecided, Some(Enrol), Some(Selection::Enrolled)),
            (OptOut, Some(Enrol), Some(Selection::Plain)),
            (Enrol, Some(Undecided), Some(Selection::Enrolled)),
            (Enrol, Some(OptOut), Some(Selection::Enrolled)),
            (Undecided, Some(OptOut), Some(Selection::Plain)),
            (Undecided, Some(Undecided), Some(Selection::Plain)),
            (Enrol, None, Some(Selection::Enrolled)),
            (OptOut, None, Some(Selection::Plain)),
            (Undecided, None, None),
        ] {
            assert_eq!(combine(pod, namespace), selection, "{pod:?} {namespace:?}");
        }
    }

    #[test]
    fn the_label_can_be_another_one() {
        let label: DataplaneLabel = "example.org/mesh=on".parse().unwrap();
        assert_eq!(label.decide(&labels("example.org/mesh", "on")), LabelDecision::Enrol);
        assert_eq!(label.decide(&labels("example.org/mesh", "none")), LabelDecision::OptOut);
        assert_eq!(label.decide(&labels("istio.io/dataplane-mode", "ambient")), LabelDecision::Undecided);
        for bad in ["", "=", "key", "key=", "=on", "key=none"] {
            assert!(bad.parse::<DataplaneLabel>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_reason_is_given_only_where_the_pod_would_be_enrolled() {
        let code = |selection, host, sidecar| match except(selection, host, sidecar) {
            Selection::LeftAlone(reason) => reason.code.code(),
            Selection::Enrolled => "enrolled",
            Selection::Plain | Selection::ObjectGone => "plain",
        };
        assert_eq!(code(Selection::Enrolled, true, Some("a proxy")), "host_network");
        assert_eq!(code(Selection::Enrolled, false, Some("a proxy")), "sidecar");
        assert_eq!(code(Selection::Enrolled, false, None), "enrolled");
        assert_eq!(code(Selection::Plain, true, Some("a proxy")), "plain");
    }
}
