//! Everything that can be set for a pod, in one table: the key in the pods file, the annotations
//! that mean the same, how the value is read, and what it is for.
//!
//! To add an option, add a row to [`OPTIONS`] and a field to [`Pod`]. Both sources, the checks for
//! unknown keys and the tables in `docs/configuration.md` follow from the row.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::model::{
    exclusions,
    pod::{FailMode, Pod},
};

use super::{guards, selection};

/// What the names of our annotations begin with.
pub(crate) const ANNOTATION_PREFIX: &str = "ambient.adit.dev/";

/// One option of a pod.
#[derive(Debug)]
pub(crate) struct PodOption {
    /// Its key in an entry of the pods file.
    pub key: &'static str,
    /// The annotations that set it; the first that a pod has counts. None: the API has a field for
    /// it.
    pub annotations: &'static [&'static str],
    /// What a value may be, for messages and the documentation.
    pub expected: &'static str,
    #[cfg_attr(not(test), expect(dead_code, reason = "for docs/configuration.md, which a test makes"))]
    /// A value as an annotation has it; for an option without annotations, as the pods file has it.
    pub example: &'static str,
    #[cfg_attr(not(test), expect(dead_code, reason = "for docs/configuration.md, which a test makes"))]
    /// What holds where it is not set.
    pub default: &'static str,
    #[cfg_attr(not(test), expect(dead_code, reason = "for docs/configuration.md, which a test makes"))]
    /// What it is for.
    pub about: &'static str,
    read: fn(&mut Pod, &Given<'_>) -> Option<()>,
}

/// A value as its source has it.
struct Given<'a> {
    /// The key or annotation, to name it in notes.
    key: &'a str,
    value: &'a Value,
}

/// A value that an option cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: \"{value}\" is not valid, expected {expected}")]
pub(crate) struct InvalidOption {
    /// The key or annotation.
    pub key: String,
    /// The beginning of the value.
    pub value: String,
    /// What the option may be.
    pub expected: &'static str,
}

impl InvalidOption {
    /// As a note, where the option is ignored and the pod goes on without it.
    pub(crate) fn ignored(&self) -> String {
        format!("{}: \"{}\" ignored, expected {}", self.key, self.value, self.expected)
    }
}

const PORTS: &str = "ports from 1 to 65535 and ranges such as 7000-7010";
const TEXT: &str = "text";

/// In the order in which the documentation lists them.
#[rustfmt::skip]
pub(crate) const OPTIONS: &[PodOption] = &[
    PodOption { key: "uid", annotations: &[], expected: TEXT, example: "8a4b0c1e", default: "required, unique", about: "the pod's uid", read: |pod, given| { pod.uid = given.text()?; Some(()) } },
    PodOption { key: "name", annotations: &[], expected: TEXT, example: "client", default: "required", about: "the pod's name", read: |pod, given| { pod.name = given.text()?; Some(()) } },
    PodOption { key: "namespace", annotations: &[], expected: TEXT, example: "demo", default: "`default`", about: "the pod's namespace", read: |pod, given| { pod.namespace = given.text()?; Some(()) } },
    PodOption { key: "serviceAccount", annotations: &[], expected: TEXT, example: "client", default: "`default`", about: "the service account, which becomes the pod's identity", read: |pod, given| { pod.service_account = given.text()?; Some(()) } },
    PodOption { key: "cgroup", annotations: &[], expected: "a path", example: "kubepods/pod8a4b0c1e", default: "found by the uid, as kubelets name the directories", about: "the pod's cgroup: absolute, or below the cgroup2 root", read: |pod, given| { pod.cgroup = Some(PathBuf::from(given.text()?)); Some(()) } },
    PodOption { key: "labels", annotations: &[], expected: "a map of labels", example: "{istio.io/dataplane-mode: ambient}", default: "none: the pod is not enrolled", about: "the pod is enrolled with exactly this label", read: labels },
    PodOption { key: "addresses", annotations: &[], expected: "a list of IP addresses", example: "[10.0.1.2]", default: "what the netns has", about: "addresses that the pod's netns must have; else the pod is refused", read: |pod, given| { pod.addresses = given.parsed::<BTreeSet<IpAddr>>()?; Some(()) } },
    PodOption { key: "failMode", annotations: &["ambient.adit.dev/fail-mode"], expected: "closed or open", example: "open", default: "`--fail-mode`", about: "while no tunnel serves the pod: `closed` refuses its traffic (its connects fail with `EPERM`), `open` lets it pass in plaintext", read: fail_mode },
    PodOption { key: "dnsCapture", annotations: &["ambient.adit.dev/dns-capture", "ambient.istio.io/dns-capture"], expected: "true or false", example: "true", default: "`--dns-capture`", about: "whether the tunnel answers the pod's DNS queries", read: dns_capture },
    PodOption { key: "excludeOutboundPorts", annotations: &["ambient.adit.dev/exclude-outbound-ports"], expected: PORTS, example: "6379,7000-7010", default: "none", about: "connections to these ports leave in plaintext", read: |pod, given| { Arc::make_mut(&mut pod.lists).outbound.excluded_ports = exclusions::ports(given.key, given.value, &mut pod.notes); Some(()) } },
    PodOption { key: "excludeOutboundCidrs", annotations: &["ambient.adit.dev/exclude-outbound-cidrs"], expected: "CIDRs and addresses", example: "192.168.0.0/16,fd00::/8", default: "none", about: "connections to these addresses leave in plaintext", read: |pod, given| { Arc::make_mut(&mut pod.lists).outbound.excluded_cidrs = exclusions::cidrs(given.key, given.value, &mut pod.notes); Some(()) } },
    PodOption { key: "excludeInterfaces", annotations: &["ambient.adit.dev/exclude-interfaces"], expected: "names of interfaces, `*` and `?` in them", example: "net1,storage*", default: "none", about: "connections that the pod's [routes](#interfaces) send out of these interfaces leave in plaintext", read: |pod, given| { Arc::make_mut(&mut pod.lists).outbound.excluded_interfaces = exclusions::interfaces(given.key, given.value, &mut pod.notes); Some(()) } },
    PodOption { key: "excludeInboundPorts", annotations: &["ambient.adit.dev/exclude-inbound-ports"], expected: PORTS, example: "9090", default: "none", about: "connections to these ports reach the application directly; policy does not apply", read: |pod, given| { Arc::make_mut(&mut pod.lists).inbound.excluded_ports = exclusions::ports(given.key, given.value, &mut pod.notes); Some(()) } },
    PodOption { key: "includeOutboundPorts", annotations: &["ambient.adit.dev/include-outbound-ports"], expected: PORTS, example: "80,443", default: "none", about: "of the pod's connections only those to these ports, or to `includeOutboundCidrs`, go through the tunnel. `*`: all", read: |pod, given| { Arc::make_mut(&mut pod.lists).outbound.included_ports = some_of(exclusions::ports(given.key, given.value, &mut pod.notes)); Some(()) } },
    PodOption { key: "includeOutboundCidrs", annotations: &["ambient.adit.dev/include-outbound-cidrs"], expected: "CIDRs and addresses", example: "10.0.0.0/8,fd00::/8", default: "none", about: "of the pod's connections only those to these addresses, or to `includeOutboundPorts`, go through the tunnel. `*`: all", read: |pod, given| { Arc::make_mut(&mut pod.lists).outbound.included_cidrs = some_of(exclusions::cidrs(given.key, given.value, &mut pod.notes)); Some(()) } },
    PodOption { key: "includeInboundPorts", annotations: &["ambient.adit.dev/include-inbound-ports"], expected: PORTS, example: "8080", default: "none", about: "of the connections to the pod only those to these ports go through the tunnel; policy does not apply to the others. `*`: all", read: |pod, given| { Arc::make_mut(&mut pod.lists).inbound.included_ports = some_of(exclusions::ports(given.key, given.value, &mut pod.notes)); Some(()) } },
    PodOption { key: "guards", annotations: &["ambient.adit.dev/guards"], expected: guards::EXPECTED, example: "istio,uid:5000", default: "none", about: "processes whose connections leave in plaintext: by user, group or container, or by a [profile](#guards). `none`: those of the namespace and of the mesh do not count", read: |pod, given| { Arc::make_mut(&mut pod.lists).guards = guards::read(given.key, given.value, &mut pod.notes); Some(()) } },
    PodOption { key: "bypassInbound", annotations: &["ambient.adit.dev/bypass-inbound-capture", "ambient.istio.io/bypass-inbound-capture"], expected: "true or false", example: "true", default: "`false`", about: "`true`: whatever arrives at the pod reaches the application directly, on every port; policy does not apply. Peers in the mesh still reach it by HBONE", read: bypass_inbound },
    PodOption { key: "rerouteVirtualInterfaces", annotations: &["istio.io/reroute-virtual-interfaces"], expected: "names of interfaces", example: "tap0,net1", default: "none", about: "cannot be obeyed: what arrives by these interfaces, from a virtual machine for example, is forwarded past the tunnel. A note and an Event say so", read: virtual_interfaces },
];

/// Notes what is set and cannot be obeyed.
pub(crate) fn note_refused(pod: &mut Pod, key: &str) {
    if !pod.virtual_interfaces.is_empty() {
        let names = pod.virtual_interfaces.join(", ");
        pod.notes
            .push(format!("{key}: cannot be obeyed, what arrives by {names} is forwarded past the tunnel"));
    }
}

impl PodOption {
    /// Sets it on `pod` to `value`, which its source names `key`. `null` leaves it unset. Single
    /// items of a list that make no sense are noted on the pod and ignored.
    ///
    /// # Errors
    /// The value as a whole makes no sense; the pod is left as it was.
    pub(crate) fn set(&self, pod: &mut Pod, key: &str, value: &Value) -> Result<(), InvalidOption> {
        if value.is_null() {
            return Ok(());
        }
        (self.read)(pod, &Given { key, value }).ok_or_else(|| InvalidOption {
            key: key.to_owned(),
            value: match value {
                Value::String(text) => shorten(text),
                other => shorten(&other.to_string()),
            },
            expected: self.expected,
        })
    }

    /// The annotation that sets it on a pod with `annotations`, and its text.
    pub(crate) fn annotation<'a>(
        &self,
        annotations: &'a BTreeMap<String, String>,
    ) -> Option<(&'static str, &'a String)> {
        self.annotations.iter().find_map(|name| Some((*name, annotations.get(*name)?)))
    }
}

/// Our own annotations; Istio's are none of them.
pub(crate) fn own_annotations() -> impl Iterator<Item = &'static str> {
    OPTIONS
        .iter()
        .flat_map(|option| option.annotations)
        .copied()
        .filter(|name| name.starts_with(ANNOTATION_PREFIX))
}

impl Given<'_> {
    fn parsed<T: DeserializeOwned>(&self) -> Option<T> {
        T::deserialize(self.value).ok()
    }

    /// A number counts as its digits: YAML reads an unquoted uid of digits as a number.
    fn text(&self) -> Option<String> {
        match self.value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        }
    }

    fn truth(&self) -> Option<bool> {
        match self.value {
            Value::Bool(truth) => Some(*truth),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        }
    }
}

fn labels(pod: &mut Pod, given: &Given<'_>) -> Option<()> {
    pod.selection = selection::by_labels(&given.parsed()?);
    Some(())
}

fn fail_mode(pod: &mut Pod, given: &Given<'_>) -> Option<()> {
    pod.fail_mode = Some(match given.value.as_str()?.trim() {
        "closed" => FailMode::Closed,
        "open" => FailMode::Open,
        _ => return None,
    });
    Some(())
}

fn dns_capture(pod: &mut Pod, given: &Given<'_>) -> Option<()> {
    pod.dns_capture = Some(given.truth()?);
    Some(())
}

fn virtual_interfaces(pod: &mut Pod, given: &Given<'_>) -> Option<()> {
    let text = given.value.as_str()?;
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    pod.virtual_interfaces = names.map(shorten).take(16).collect();
    Some(())
}

/// The same as an exclusion of every port, whatever `excludeInboundPorts` says.
fn bypass_inbound(pod: &mut Pod, given: &Given<'_>) -> Option<()> {
    if given.truth()? {
        Arc::make_mut(&mut pod.lists).inbound.excluded_ports = vec![1..=u16::MAX];
    }
    Some(())
}

/// A list without one valid item is none: it would leave everything outside the mesh.
fn some_of<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

/// As much of a value as a message needs.
fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    #[test]
    fn every_option_reads_its_own_example_and_refuses_nonsense() {
        let mut keys = BTreeSet::new();
        for option in OPTIONS {
            assert!(keys.insert(option.key), "{} is there twice", option.key);
            let example = if option.annotations.is_empty() {
                serde_saphyr::from_str(option.example).unwrap()
            } else {
                Value::String(option.example.to_owned())
            };
            let mut pod = Pod::default();
            option.set(&mut pod, option.key, &example).unwrap();
            assert!(pod.notes.is_empty(), "{}", option.key);
            assert_ne!(pod, Pod::default(), "{} sets nothing", option.key);
            let mut untouched = Pod::default();
            option.set(&mut untouched, option.key, &Value::Null).unwrap();
            assert_eq!(untouched, Pod::default(), "{}", option.key);
            let nonsense = serde_json::json!({"a": ["b"]});
            let result = option.set(&mut pod, option.key, &nonsense);
            assert!(result.is_err() || !pod.notes.is_empty(), "{} takes nonsense", option.key);
        }
    }

    /// Made from the rows: `UPDATE_DOCS=1 cargo test -p watcher documentation`.
    #[test]
    fn the_documentation_has_a_line_for_every_option() {
        let mut keys = "| key | value | default | |\n|---|---|---|---|\n".to_owned();
        let mut annotations =
            "| annotation of a pod | value | such as | as in the pods file |\n|---|---|---|---|\n".to_owned();
        for PodOption { key, annotations: names, expected, example, default, about, .. } in OPTIONS {
            let _ = writeln!(keys, "| `{key}` | {expected} | {default} | {about} |");
            if let [name, others @ ..] = names {
                let also: Vec<String> =
                    others.iter().map(|other| format!(" (or Istio's `{other}`)")).collect();
                let also = also.concat();
                let _ = writeln!(annotations, "| `{name}`{also} | {expected} | `{example}` | `{key}` |");
            }
        }
        let page = "docs/configuration.md";
        testbed::doc_table::assert_current(
            page,
            "keys of the pods file: made from watcher/src/source/options.rs",
            &keys,
        );
        testbed::doc_table::assert_current(
            page,
            "annotations: made from watcher/src/source/options.rs",
            &annotations,
        );
    }
}
