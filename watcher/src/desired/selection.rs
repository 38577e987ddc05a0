//! Whether a pod is enrolled: by Istio's label.

use std::collections::BTreeMap;

use super::Selection;

/// The label that says who carries a pod's traffic.
pub const LABEL: &str = "istio.io/dataplane-mode";

/// What a pod's own labels ask for: only the value `ambient` enrols, so `none`, a typing error or no label
/// at all leave it alone.
pub fn by_labels(labels: &BTreeMap<String, String>) -> Selection {
    match labels.get(LABEL) {
        Some(mode) if mode == "ambient" => Selection::Enrolled,
        _ => Selection::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_value_ambient_enrols() {
        for (key, value, selection) in [
            ("istio.io/dataplane-mode", "ambient", Selection::Enrolled),
            ("istio.io/dataplane-mode", "none", Selection::Plain),
            ("istio.io/dataplane-mode", "Ambient", Selection::Plain),
            ("dataplane-mode", "ambient", Selection::Plain),
        ] {
            let labels = [(key.to_owned(), value.to_owned())].into();
            assert_eq!(by_labels(&labels), selection, "{key}: {value}");
        }
        assert_eq!(by_labels(&BTreeMap::new()), Selection::Plain);
    }
}
