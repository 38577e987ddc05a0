//! Whether a pod is enrolled: labels of the pod or of its namespace decide, Istio's by default.

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::model::pod::Selection;
use crate::model::reason::{Reason, ReasonCode};

/// Istio's label. Its value `none` on a pod leaves the pod alone, whichever labels enrol.
pub const MODE: &str = "istio.io/dataplane-mode";
/// The value of a label that leaves a pod alone although its namespace is enrolled.
const NONE: &str = "none";

/// A label that enrols.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelSelector {
    key: String,
    /// The value that enrols; `None`: every value but `none`.
    value: Option<String>,
}

impl LabelSelector {
    fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        labels.get(&self.key).is_some_and(|given| match &self.value {
            Some(value) => given == value,
            None => given != NONE,
        })
    }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{}={value}", self.key),
            None => f.write_str(&self.key),
        }
    }
}

/// A text that selects no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected KEY=VALUE or KEY, such as {MODE}=ambient, with a value other than {NONE}")]
pub struct InvalidLabelSelector;

impl FromStr for LabelSelector {
    type Err = InvalidLabelSelector;

    fn from_str(text: &str) -> Result<Self, InvalidLabelSelector> {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (text, None),
        };
        let name = key.split_once('/').map_or(key, |(_, name)| name);
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let is_word = |text: &str| !text.is_empty() && text.bytes().all(valid);
        let prefix_fits = key.split_once('/').is_none_or(|(prefix, _)| is_word(prefix));
        if !is_word(name) || !prefix_fits || value.is_some_and(|value| !is_word(value) || value == NONE) {
            return Err(InvalidLabelSelector);
        }
        Ok(Self { key: key.to_owned(), value: value.map(str::to_owned) })
    }
}

/// The labels that enrol, any of them; Istio's by default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnrolmentLabels(Vec<LabelSelector>);

impl Default for EnrolmentLabels {
    fn default() -> Self {
        Self(vec![LabelSelector { key: MODE.to_owned(), value: Some("ambient".to_owned()) }])
    }
}

impl From<Vec<LabelSelector>> for EnrolmentLabels {
    fn from(selectors: Vec<LabelSelector>) -> Self {
        Self(selectors)
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

impl EnrolmentLabels {
    /// What `labels` decide. `none`, as the value of Istio's label or of one that enrols, beats
    /// every other label beside it.
    pub(crate) fn decide(&self, labels: &BTreeMap<String, String>) -> LabelDecision {
        let says_none = |key: &str| labels.get(key).is_some_and(|value| value == NONE);
        if says_none(MODE) || self.0.iter().any(|selector| says_none(&selector.key)) {
            return LabelDecision::OptOut;
        }
        if self.0.iter().any(|selector| selector.selects(labels)) {
            return LabelDecision::Enrol;
        }
        LabelDecision::Undecided
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
    combine(EnrolmentLabels::default().decide(labels), Some(LabelDecision::Undecided)).unwrap_or_default()
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

    fn selectors(texts: &[&str]) -> EnrolmentLabels {
        texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<LabelSelector>>().into()
    }

    #[test]
    fn any_of_several_labels_enrols_by_key_or_by_value() {
        use LabelDecision::{Enrol, OptOut, Undecided};
        let several = selectors(&["istio.io/dataplane-mode=ambient", "vendor.example/mesh=on", "bare"]);
        for (given, decision) in [
            (&[("istio.io/dataplane-mode", "ambient")][..], Enrol),
            (&[("vendor.example/mesh", "on")], Enrol),
            (&[("vendor.example/mesh", "off")], Undecided),
            (&[("vendor.example/mesh", "none")], OptOut),
            (&[("bare", "")], Enrol),
            (&[("bare", "whatever")], Enrol),
            (&[("bare", "none")], OptOut),
            (&[("other", "on")], Undecided),
            (&[("vendor.example/mesh", "on"), ("istio.io/dataplane-mode", "none")], OptOut),
            (&[("vendor.example/mesh", "none"), ("istio.io/dataplane-mode", "ambient")], OptOut),
            (&[("vendor.example/mesh", "off"), ("bare", "")], Enrol),
        ] {
            let given = given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            assert_eq!(several.decide(&given), decision, "{given:?}");
        }
        // Istio's `none` counts where its label does not enrol, too.
        let other = selectors(&["vendor.example/mesh=on"]);
        assert_eq!(other.decide(&labels(MODE, "ambient")), Undecided);
        assert_eq!(other.decide(&labels(MODE, "none")), OptOut);
    }

    #[test]
    fn what_is_no_selector_is_refused() {
        for good in ["key", "example.org/mesh=on", "a-b_c.d/e=f.g"] {
            assert_eq!(good.parse::<LabelSelector>().unwrap().to_string(), good);
        }
        for bad in ["", "=", "key=", "=on", "key=none", "a b", "k=a,b", "a/b/c", "/a", "a/", "key!=x"] {
            assert!(bad.parse::<LabelSelector>().is_err(), "{bad:?}");
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
