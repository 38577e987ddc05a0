//! The pods of this node, read from a YAML file.
//!
//! ```yaml
//! pods:
//! - uid: 8a4b0c1e
//!   name: client
//!   namespace: demo                        # default: default
//!   serviceAccount: client                 # default: default
//!   cgroup: kubepods/pod8a4b0c1e           # absolute, or below the cgroup2 root; default: found by the uid
//!   labels: {istio.io/dataplane-mode: ambient}
//!   addresses: [10.0.1.2]                  # optional: the netns must hold them
//!   failMode: open                         # optional: closed, open
//!   excludeOutboundPorts: [6379, "7000-7010"]
//!   excludeOutboundCidrs: [192.168.0.0/16]
//!   excludeInboundPorts: [9090]
//! ```
//!
//! An entry that cannot be read is an [`Entry::Bad`], so that it does not take the others with it. A file
//! that is no YAML, or has a wrong key outside the entries, is refused as a whole.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::{
    model::{
        exclusions::{self, Exclusions},
        pod::{BadEntry, Entry, Pod},
    },
    source::{MAX_NAMES, selection},
};

const KEYS: [&str; 12] = [
    "uid",
    "name",
    "namespace",
    "serviceAccount",
    "cgroup",
    "labels",
    "addresses",
    "failMode",
    "dnsCapture",
    "excludeOutboundPorts",
    "excludeOutboundCidrs",
    "excludeInboundPorts",
];

/// Why a file was refused as a whole.
#[derive(Debug, thiserror::Error)]
pub enum PodsFileError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {problem}")]
    Parse { path: PathBuf, problem: String },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSection {
    pods: Option<Vec<Value>>,
}

/// Reads `path`; relative cgroups are below `cgroup_root`.
pub fn read(path: &Path, cgroup_root: &Path) -> Result<Vec<Entry>, PodsFileError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| PodsFileError::Read { path: path.to_owned(), source })?;
    parse(&text, cgroup_root).map_err(|problem| PodsFileError::Parse { path: path.to_owned(), problem })
}

/// Reads the text of a pods file.
pub fn parse(text: &str, cgroup_root: &Path) -> Result<Vec<Entry>, String> {
    if text.trim().is_empty() {
        // A writer that truncates before it writes would otherwise un-enrol every pod for a moment.
        return Err("the file is empty, expected the key `pods` (`pods: []` for none)".to_owned());
    }
    // `y`, `n` and `on` are names that a pod may have, not booleans (as they are in YAML 1.1).
    let options = serde_saphyr::options! { strict_booleans: true };
    let file: FileSection =
        serde_saphyr::from_str_with_options(text, options).map_err(|error| first_line(&error.to_string()))?;
    let pods = file.pods.unwrap_or_default();
    Ok(pods.into_iter().enumerate().map(|(index, value)| entry(index, value, cgroup_root)).collect())
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn entry(index: usize, value: Value, cgroup_root: &Path) -> Entry {
    let Value::Object(mut keys) = value else {
        let problem = "expected the keys of a pod".to_owned();
        return Entry::Bad(BadEntry { index: Some(index), uid: None, name: None, problem });
    };
    let text_of = |key| keys.get(key).and_then(Value::as_str).map(str::to_owned);
    let (uid, name) = (text_of("uid"), text_of("name"));
    match pod(&mut keys, cgroup_root) {
        Ok(pod) => Entry::Pod(Arc::new(pod)),
        Err(problem) => Entry::Bad(BadEntry { index: Some(index), uid, name, problem }),
    }
}

fn pod(keys: &mut Map<String, Value>, cgroup_root: &Path) -> Result<Pod, String> {
    let mut notes = Vec::new();
    let exclusions = Exclusions {
        outbound_ports: ports(keys, "excludeOutboundPorts", &mut notes),
        outbound_cidrs: keys
            .remove("excludeOutboundCidrs")
            .map(|value| exclusions::cidrs("excludeOutboundCidrs", &value, &mut notes))
            .unwrap_or_default(),
        inbound_ports: ports(keys, "excludeInboundPorts", &mut notes),
    };
    let pod = Pod {
        uid: required(keys, "uid")?,
        name: required(keys, "name")?,
        namespace: text(keys, "namespace")?.unwrap_or_else(|| "default".to_owned()),
        service_account: text(keys, "serviceAccount")?.unwrap_or_else(|| "default".to_owned()),
        cgroup: text(keys, "cgroup")?.map(|given| cgroup(&given, cgroup_root)).transpose()?,
        selection: selection::by_labels(
            &take::<BTreeMap<String, String>>(keys, "labels")?.unwrap_or_default(),
        ),
        fail_mode: take(keys, "failMode")?,
        dns_capture: take(keys, "dnsCapture")?,
        addresses: take(keys, "addresses")?.unwrap_or_default(),
        exclusions,
        notes,
    };
    if let Some(key) = keys.keys().next() {
        let mut problem = format!("{key}: unknown key, expected one of");
        for (i, known) in KEYS.iter().enumerate() {
            let _ = write!(problem, "{} {known}", if i == 0 { "" } else { "," });
        }
        return Err(problem);
    }
    let names = pod.uid.len() + pod.name.len() + pod.namespace.len() + pod.service_account.len();
    if names > MAX_NAMES {
        return Err(format!(
            "uid, name, namespace and serviceAccount have {names} bytes, at most {MAX_NAMES} fit"
        ));
    }
    Ok(pod)
}

fn ports(
    keys: &mut Map<String, Value>,
    key: &str,
    notes: &mut Vec<String>,
) -> std::collections::BTreeSet<u16> {
    keys.remove(key).map(|value| exclusions::ports(key, &value, notes)).unwrap_or_default()
}

fn take<T: DeserializeOwned>(keys: &mut Map<String, Value>, key: &str) -> Result<Option<T>, String> {
    match keys.remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value).map(Some).map_err(|error| format!("{key}: {error}")),
    }
}

/// A text; a number is taken as its digits, since YAML reads an unquoted uid of digits as a number.
fn text(keys: &mut Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    if let Some(Value::Number(number)) = keys.get(key) {
        let digits = number.to_string();
        keys.remove(key);
        return Ok(Some(digits));
    }
    take(keys, key)
}

fn required(keys: &mut Map<String, Value>, key: &str) -> Result<String, String> {
    text(keys, key)?.filter(|text| !text.is_empty()).ok_or_else(|| format!("{key}: missing or empty"))
}

fn cgroup(given: &str, root: &Path) -> Result<PathBuf, String> {
    // `join` takes an absolute path as it is.
    let path: PathBuf = root.join(given).components().collect();
    let plain = path.components().all(|part| part != Component::ParentDir);
    if plain && path != root && path.starts_with(root) {
        Ok(path)
    } else {
        Err(format!("cgroup: \"{given}\" is not below the cgroup2 root {}", root.display()))
    }
}

#[cfg(test)]
mod tests {
    use crate::model::pod::FailMode;

    use super::*;

    fn root() -> &'static Path {
        Path::new("/sys/fs/cgroup/unified")
    }

    #[test]
    fn every_key_is_read() {
        let entries = parse(
            r#"
pods:
- uid: 8a4b
  name: client
  namespace: demo
  serviceAccount: sa
  cgroup: /sys/fs/cgroup/unified/kubepods/pod8a4b
  labels: {istio.io/dataplane-mode: ambient}
  addresses: [10.0.0.1, "fd00::1"]
  failMode: open
  excludeOutboundPorts: [6379, "7000-7010", nonsense]
  excludeOutboundCidrs: [192.168.0.0/16]
  excludeInboundPorts: 9090
- {uid: 12, name: second, cgroup: kubepods/second}
"#,
            root(),
        )
        .unwrap();
        let [Entry::Pod(first), Entry::Pod(second)] = entries.as_slice() else { panic!("{entries:?}") };
        assert_eq!((first.uid.as_str(), first.service_account.as_str()), ("8a4b", "sa"));
        assert_eq!(first.fail_mode, Some(FailMode::Open));
        assert_eq!(first.addresses.len(), 2);
        assert_eq!(first.exclusions.outbound_ports.len(), 12);
        assert_eq!(first.exclusions.inbound_ports, [9090].into());
        assert_eq!(first.notes.len(), 1, "{:?}", first.notes);
        assert_eq!((second.uid.as_str(), second.namespace.as_str()), ("12", "default"));
        assert_eq!(second.cgroup, Some(root().join("kubepods/second")));
    }

    #[test]
    fn a_bad_entry_is_named_by_key_and_leaves_the_others() {
        for (bad, says) in [
            ("{uid: b, name: bad, cgroup: c, cgruop: d}", "cgruop: unknown key"),
            ("{name: bad, cgroup: c}", "uid: missing"),
            ("{uid: b, name: bad, cgroup: /elsewhere}", "not below"),
            ("{uid: b, name: bad, cgroup: ../up}", "not below"),
            ("{uid: b, name: bad, cgroup: /sys/fs/cgroup/unified}", "not below"),
            ("{uid: b, name: bad, cgroup: c, failMode: half}", "failMode: unknown variant"),
            ("{uid: b, name: bad, cgroup: c, labels: [1]}", "labels: invalid type"),
            ("{uid: b, name: bad, cgroup: c, addresses: [10.0.0]}", "addresses:"),
        ] {
            let text = format!("pods:\n- {bad}\n- {{uid: g, name: good, cgroup: g}}\n");
            let entries = parse(&text, root()).unwrap();
            let [Entry::Bad(entry), Entry::Pod(_)] = entries.as_slice() else { panic!("{bad}: {entries:?}") };
            assert!(entry.problem.contains(says), "{bad}: {}", entry.problem);
            assert_eq!(entry.name.as_deref(), Some("bad"));
        }
    }

    #[test]
    fn a_file_that_does_not_parse_is_refused_as_a_whole() {
        for bad in ["", "  \n", "pods: [", "pod: []", "pods: 5", "pods: []\nmore: 1", "[]"] {
            assert!(parse(bad, root()).is_err(), "{bad:?}");
        }
        assert_eq!(parse("pods: []", root()), Ok(Vec::new()));
        assert_eq!(parse("pods:\n", root()), Ok(Vec::new()));
    }
}
