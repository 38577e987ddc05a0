//! Whether a pod is enrolled: by Istio's label.

use super::Pod;

/// The label that says who carries a pod's traffic.
pub const LABEL: &str = "istio.io/dataplane-mode";

/// Whether `pod` is enrolled: only by the value `ambient`, so `none`, a typing error or no label at
/// all leave it alone.
pub fn is_enrolled(pod: &Pod) -> bool {
    pod.labels.get(LABEL).is_some_and(|mode| mode == "ambient")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::desired::pods_file::{Entry, parse};

    use super::*;

    #[test]
    fn only_the_value_ambient_enrols() {
        for (labels, enrolled) in [
            ("{istio.io/dataplane-mode: ambient}", true),
            ("{istio.io/dataplane-mode: none}", false),
            ("{istio.io/dataplane-mode: Ambient}", false),
            ("{dataplane-mode: ambient}", false),
            ("{}", false),
        ] {
            let text = format!("pods: [{{uid: u, name: n, cgroup: c, labels: {labels}}}]");
            let entries = parse(&text, Path::new("/cgroup")).unwrap();
            let [Entry::Pod(pod)] = entries.as_slice() else { panic!("{entries:?}") };
            assert_eq!(is_enrolled(pod), enrolled, "{labels}");
        }
    }
}
