//! Lists that hold for many pods: those of a namespace, and those of the mesh.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use serde_json::Value;

use super::{
    foreign::{self, ForeignMesh},
    options::{ANNOTATION_PREFIX, OPTIONS, PodOption},
};
use crate::model::{
    exclusions::Exclusions,
    lists::{Lists, effective},
    notes::Notes,
    pod::Pod,
};

/// The options that are lists, by their keys.
const KEYS: [&str; 8] = [
    "excludeOutboundPorts",
    "excludeOutboundCidrs",
    "excludeInterfaces",
    "excludeInboundPorts",
    "includeOutboundPorts",
    "includeOutboundCidrs",
    "includeInboundPorts",
    "guards",
];
/// How many combinations are remembered: more than a node has namespaces with lists.
const MAX_COMBINED: usize = 256;

/// The lists of a namespace or of the mesh. Shared: they may be long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WideLists {
    /// As far as they can be read.
    pub lists: Arc<Lists>,
    /// What was ignored.
    pub notes: Arc<Notes>,
}

fn options() -> impl Iterator<Item = &'static PodOption> {
    OPTIONS.iter().filter(|option| KEYS.contains(&option.key))
}

impl WideLists {
    /// Those of a namespace with these annotations: the same that pods have. `foreign`: the meshes
    /// whose annotations count too.
    pub(crate) fn of_annotations(
        annotations: &BTreeMap<String, String>,
        foreign: &BTreeSet<ForeignMesh>,
    ) -> Self {
        let mut read = Pod::default();
        for option in options() {
            if let Some((name, text)) = option.annotation(annotations) {
                set(&mut read, option, name, &Value::String(text.clone()));
            }
        }
        foreign::set(&mut read, foreign, annotations);
        let is_known = |key: &str| OPTIONS.iter().any(|option| option.annotations.contains(&key));
        for key in annotations.keys().filter(|key| key.starts_with(ANNOTATION_PREFIX) && !is_known(key)) {
            read.notes.push(format!("{key}: unknown annotation ignored"));
        }
        Self::of(read)
    }

    /// Those with these keys: the pods file's own.
    pub(crate) fn of_keys<'a>(given: impl Iterator<Item = (&'a String, &'a Value)>) -> Self {
        let mut read = Pod::default();
        for (key, value) in given {
            match options().find(|option| option.key == key) {
                Some(option) => set(&mut read, option, key, value),
                None => read
                    .notes
                    .push(format!("{key}: unknown key ignored, expected one of {}", KEYS.join(", "))),
            }
        }
        Self::of(read)
    }

    fn of(read: Pod) -> Self {
        Self { lists: read.lists, notes: Arc::new(read.notes) }
    }
}

fn set(read: &mut Pod, option: &PodOption, key: &str, value: &Value) {
    if let Err(invalid) = option.set(read, key, value) {
        read.notes.push(invalid.ignored());
    }
}

/// What follows from the lists of pods, namespaces and the mesh. The same lists, which most pods of a
/// namespace have, are combined once.
#[derive(Debug, Default)]
pub(crate) struct Combined(HashMap<[Arc<Lists>; 3], Arc<Exclusions>>);

impl Combined {
    /// What holds for a pod with these lists: its own, its namespace's, the mesh's.
    pub(crate) fn of(&mut self, levels: [&Arc<Lists>; 3]) -> Arc<Exclusions> {
        let key = levels.map(Arc::clone);
        if let Some(known) = self.0.get(&key) {
            return Arc::clone(known);
        }
        if self.0.len() >= MAX_COMBINED {
            self.0.clear();
        }
        let exclusions = Arc::new(effective(&levels.map(AsRef::as_ref)));
        self.0.insert(key, Arc::clone(&exclusions));
        exclusions
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_list_is_an_option_of_pods() {
        assert_eq!(options().count(), KEYS.len());
    }

    #[test]
    fn namespaces_and_the_mesh_have_lists_and_nothing_else() {
        let annotations = json!({
            "ambient.adit.dev/exclude-outbound-ports": "25, smtp",
            "ambient.adit.dev/fail-mode": "open",
            "ambient.adit.dev/exclude-outbound-port": "25",
            "other.dev/x": "y",
        });
        let namespace =
            WideLists::of_annotations(&serde_json::from_value(annotations).unwrap(), &BTreeSet::new());
        assert_eq!(namespace.lists.outbound.excluded_ports, [25..=25]);
        assert_eq!(namespace.notes.len(), 2, "{:?}", namespace.notes);

        let keys =
            json!({"includeInboundPorts": "8080", "failMode": "open", "excludeOutboundCidrs": ["::/0"]});
        let mesh = WideLists::of_keys(keys.as_object().unwrap().iter());
        assert_eq!(mesh.lists.inbound.included_ports, Some(vec![8080..=8080]));
        assert_eq!(mesh.lists.outbound.excluded_cidrs.len(), 1);
        assert!(mesh.notes[0].starts_with("failMode: unknown key"), "{:?}", mesh.notes);
    }

    #[test]
    fn equal_lists_are_combined_once() {
        let mut combined = Combined::default();
        let wide = WideLists::of_keys(json!({"excludeOutboundPorts": 25}).as_object().unwrap().iter()).lists;
        let none = Arc::<Lists>::default();
        let first = combined.of([&none, &none, &wide]);
        let second = combined.of([&Arc::default(), &Arc::default(), &wide]);
        assert!(Arc::ptr_eq(&first, &second) && first.outbound_ports == [25..=25]);
    }
}
