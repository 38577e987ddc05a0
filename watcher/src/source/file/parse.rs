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
//! namespaces:                              # optional: lists for all pods of a namespace
//!   demo: {excludeOutboundPorts: [25]}
//! mesh: {excludeOutboundCidrs: [10.96.0.0/16]}   # optional: lists for all pods
//! ```
//!
//! An entry that cannot be read is an [`Entry::Bad`], so that it does not take the others with it. A file
//! that is not YAML, or has a wrong key outside the entries, is rejected as a whole.

use std::{
    collections::BTreeMap,
    io,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    model::pod::{BadEntry, Entry, Level, Pod},
    source::{
        MAX_NAMES,
        options::{self, InvalidOption, OPTIONS},
        wide_lists::{Combined, WideLists},
    },
};

/// Why the file as a whole cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodsFileError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It can be read, and has no list of pods.
    #[error("{path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: InvalidPodsFile,
    },
}

/// What is wrong with the text of a pods file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidPodsFile {
    /// A writer that truncates before it writes would otherwise un-enrol every pod for a moment.
    #[error("the file is empty, expected the key `pods` (`pods: []` for none)")]
    Empty,
    /// It is not YAML, or has a wrong key outside the entries.
    #[error("{0}")]
    Syntax(String),
}

/// Why one entry of the file cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidEntry {
    /// It is no map.
    #[error("expected the keys of a pod")]
    NotAPod,
    /// A value is not of its kind.
    #[error(transparent)]
    Option(#[from] InvalidOption),
    /// A key that no option has.
    #[error("{key}: unknown key, expected one of {}", known_keys())]
    UnknownKey {
        /// The first such key.
        key: String,
    },
    /// A key that every entry needs.
    #[error("{key}: missing or empty")]
    Missing {
        /// Which.
        key: &'static str,
    },
    /// The names would not fit into a message to the tunnel.
    #[error("uid, name, namespace and serviceAccount have {bytes} bytes, at most {MAX_NAMES} fit")]
    NamesTooLong {
        /// All together.
        bytes: usize,
    },
    /// The cgroup is not one of the cgroup2 tree.
    #[error("cgroup: \"{given}\" is not below the cgroup2 root {root}")]
    CgroupOutside {
        /// As the entry has it.
        given: PathBuf,
        /// Where cgroup2 is mounted.
        root: PathBuf,
    },
}

fn known_keys() -> String {
    OPTIONS.iter().map(|option| option.key).collect::<Vec<_>>().join(", ")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSection {
    pods: Option<Vec<Value>>,
    namespaces: Option<BTreeMap<String, BTreeMap<String, Value>>>,
    mesh: Option<BTreeMap<String, Value>>,
}

/// The lists that hold for many pods.
struct Wide {
    namespaces: BTreeMap<String, WideLists>,
    mesh: WideLists,
    combined: Combined,
}

impl Wide {
    /// Fills in what holds for `pod`, by its own lists and the wider ones.
    fn complete(&mut self, pod: &mut Pod) {
        let none = WideLists::default();
        let namespace = self.namespaces.get(&pod.namespace).unwrap_or(&none);
        let levels = [&pod.lists, &namespace.lists, &self.mesh.lists];
        pod.exclusions = self.combined.of(levels);
        let origins = [
            "its entry in the pods file".to_owned(),
            format!("`namespaces.{}` in the pods file", pod.namespace),
            "`mesh` in the pods file".to_owned(),
        ];
        let mut origins = origins.into_iter();
        pod.levels = Level::of(levels.map(|lists| (origins.next().unwrap_or_default(), lists)));
        let noted =
            [(format!("namespace {}: ", pod.namespace), namespace), ("mesh: ".to_owned(), &self.mesh)];
        for (whose, WideLists { notes, .. }) in noted {
            for note in notes.iter() {
                pod.notes.push(format!("{whose}{note}"));
            }
        }
    }
}

/// Reads `path`; relative cgroups are below `cgroup_root`.
///
/// # Errors
/// The file cannot be read, or is rejected as a whole.
pub(crate) fn read(path: &Path, cgroup_root: &Path) -> Result<Vec<Entry>, PodsFileError> {
    let path_buf = || path.to_owned();
    let text =
        std::fs::read_to_string(path).map_err(|source| PodsFileError::Read { path: path_buf(), source })?;
    parse(&text, cgroup_root).map_err(|source| PodsFileError::Parse { path: path_buf(), source })
}

/// Reads the text of a pods file. An entry that cannot be used is an [`Entry::Bad`].
///
/// # Errors
/// The text is rejected as a whole.
pub(crate) fn parse(text: &str, cgroup_root: &Path) -> Result<Vec<Entry>, InvalidPodsFile> {
    if text.trim().is_empty() {
        return Err(InvalidPodsFile::Empty);
    }
    // `y`, `n` and `on` are names that a pod may have, not booleans (which they are in YAML 1.1).
    let options = serde_saphyr::options! { strict_booleans: true };
    let file: FileSection = serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| InvalidPodsFile::Syntax(first_line(&error.to_string())))?;
    let namespaces = file.namespaces.unwrap_or_default().into_iter();
    let mut wide = Wide {
        namespaces: namespaces.map(|(name, keys)| (name, WideLists::of_keys(keys.iter()))).collect(),
        mesh: WideLists::of_keys(file.mesh.unwrap_or_default().iter()),
        combined: Combined::default(),
    };
    let pods = file.pods.unwrap_or_default();
    Ok(pods
        .into_iter()
        .enumerate()
        .map(|(index, value)| entry(index, &value, cgroup_root, &mut wide))
        .collect())
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn entry(index: usize, value: &Value, cgroup_root: &Path, wide: &mut Wide) -> Entry {
    let text_of = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let read = value.as_object().ok_or(InvalidEntry::NotAPod).and_then(|keys| pod(keys, cgroup_root));
    match read {
        Ok(mut pod) => {
            wide.complete(&mut pod);
            Entry::Pod(Arc::new(pod))
        }
        Err(error) => Entry::Bad(BadEntry {
            index: Some(index),
            uid: text_of("uid"),
            name: text_of("name"),
            problem: error.to_string(),
        }),
    }
}

fn pod(keys: &Map<String, Value>, cgroup_root: &Path) -> Result<Pod, InvalidEntry> {
    let mut pod =
        Pod { namespace: "default".to_owned(), service_account: "default".to_owned(), ..Pod::default() };
    for option in OPTIONS {
        option.set(&mut pod, option.key, keys.get(option.key).unwrap_or(&Value::Null))?;
    }
    options::note_refused(&mut pod, "rerouteVirtualInterfaces");
    if let Some(key) = keys.keys().find(|key| OPTIONS.iter().all(|option| option.key != *key)) {
        return Err(InvalidEntry::UnknownKey { key: key.clone() });
    }
    for (key, value) in [("uid", &pod.uid), ("name", &pod.name)] {
        if value.is_empty() {
            return Err(InvalidEntry::Missing { key });
        }
    }
    let names = [&pod.uid, &pod.name, &pod.namespace, &pod.service_account];
    let bytes = names.map(String::len).iter().sum();
    if bytes > MAX_NAMES {
        return Err(InvalidEntry::NamesTooLong { bytes });
    }
    pod.cgroup = pod.cgroup.map(|given| below(given, cgroup_root)).transpose()?;
    Ok(pod)
}

fn below(given: PathBuf, root: &Path) -> Result<PathBuf, InvalidEntry> {
    // `join` takes an absolute path unchanged.
    let path: PathBuf = root.join(&given).components().collect();
    let plain = path.components().all(|part| part != Component::ParentDir);
    if plain && path != root && path.starts_with(root) {
        Ok(path)
    } else {
        Err(InvalidEntry::CgroupOutside { given, root: root.to_owned() })
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
        assert_eq!(first.exclusions.outbound_ports, [6379..=6379, 7000..=7010]);
        assert_eq!(first.exclusions.inbound_ports, [9090..=9090]);
        assert_eq!(first.notes.len(), 1, "{:?}", first.notes);
        assert_eq!((second.uid.as_str(), second.namespace.as_str()), ("12", "default"));
        assert_eq!(second.cgroup, Some(root().join("kubepods/second")));
    }

    #[test]
    fn namespaces_and_the_mesh_have_lists_too() {
        let text = "pods:\n- {uid: a, name: a, namespace: demo, excludeOutboundPorts: 6379}\n- {uid: b, name: b}\n\
             namespaces: {demo: {includeOutboundCidrs: 10.0.0.0/8, excludeOutboundPorts: smtp}}\n\
             mesh: {excludeOutboundPorts: [25], failMode: open}\n";
        let entries = parse(text, root()).unwrap();
        let [Entry::Pod(a), Entry::Pod(b)] = entries.as_slice() else { panic!("{entries:?}") };
        assert_eq!(a.exclusions.outbound_ports, [6379..=6379]);
        assert_eq!(a.exclusions.outbound_included.as_ref().map(|included| included.cidrs.len()), Some(1));
        assert_eq!((&b.exclusions.outbound_ports[..], b.notes.len()), (&[25..=25][..], 1));
        let notes = a.notes.join("\n");
        assert!(notes.contains("namespace demo: excludeOutboundPorts: \"smtp\""), "{notes}");
        assert!(notes.contains("mesh: failMode: unknown key"), "{notes}");
    }

    #[test]
    fn a_bad_entry_is_named_by_key_and_leaves_the_others() {
        for (bad, says) in [
            ("{uid: b, name: bad, cgroup: c, cgruop: d}", "cgruop: unknown key"),
            ("{name: bad, cgroup: c}", "uid: missing"),
            ("{uid: b, name: bad, cgroup: /elsewhere}", "not below"),
            ("{uid: b, name: bad, cgroup: ../up}", "not below"),
            ("{uid: b, name: bad, cgroup: /sys/fs/cgroup/unified}", "not below"),
            (
                "{uid: b, name: bad, cgroup: c, failMode: half}",
                r#"failMode: "half" is not valid, expected closed or open"#,
            ),
            ("{uid: b, name: bad, cgroup: c, labels: [1]}", r#"labels: "[1]" is not valid"#),
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
