//! Pods, namespaces and the mesh's lists as the API listed them last, and what follows for the
//! watcher's loop. Pure: no socket, no clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::api::core::v1 as api;
use kube::{core::PartialObjectMeta, runtime::watcher::Event};

use serde_json::Value;
use tracing::warn;

use crate::{
    model::pod::{BadEntry, Entry, Level, Pod},
    source::{
        selection::LabelDecision,
        wide_lists::{Combined, WideLists},
    },
};

use super::pod::{self, ApiPod, ReadRules};

/// What is known of each kind of objects, whole only after its first complete list.
#[derive(Debug)]
pub(crate) struct ClusterCache {
    rules: ReadRules,
    namespaces: BTreeMap<String, NamespaceFacts>,
    /// The mesh's lists.
    mesh: WideLists,
    combined: Combined,
    /// By the API's uid.
    pods: BTreeMap<String, Result<ApiPod, BadEntry>>,
    /// Lists that are not complete yet; until they are, the earlier ones stay active.
    listing_namespaces: Option<BTreeMap<String, NamespaceFacts>>,
    listing_mesh: WideLists,
    listing_pods: Option<BTreeMap<String, Result<ApiPod, BadEntry>>>,
    namespaces_listed: bool,
    pods_listed: bool,
    mesh_listed: bool,
    /// Cgroup uids whose entry may have changed.
    dirty: BTreeSet<String>,
    /// What the loop knows, with the pod behind it, where the entry is valid.
    published: BTreeMap<String, (Entry, Option<ApiPod>)>,
}

/// What counts of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
struct NamespaceFacts {
    /// What its labels decide.
    decision: LabelDecision,
    /// What it excludes and includes.
    wide: WideLists,
}

/// A change of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodChange {
    /// The uid of the pod's cgroup, by which the loop knows it.
    pub uid: String,
    /// `None`: gone.
    pub entry: Option<Entry>,
    /// Whether the entry differs from the last one. The loop needs no other change of a pod.
    pub entry_changed: bool,
    /// The pod behind it, where its entry is valid.
    pub api_pod: Option<ApiPod>,
}

impl ClusterCache {
    /// Empty, until all kinds are listed.
    pub(crate) fn new(rules: ReadRules) -> Self {
        Self {
            mesh_listed: rules.mesh_lists.is_none(),
            rules,
            namespaces: BTreeMap::new(),
            mesh: WideLists::default(),
            combined: Combined::default(),
            listing_mesh: WideLists::default(),
            pods: BTreeMap::new(),
            listing_namespaces: None,
            listing_pods: None,
            namespaces_listed: false,
            pods_listed: false,
            dirty: BTreeSet::new(),
            published: BTreeMap::new(),
        }
    }

    /// Whether all have been listed once.
    pub(crate) fn is_whole(&self) -> bool {
        self.namespaces_listed && self.pods_listed && self.mesh_listed
    }

    /// Applies an event of the watch of the ConfigMap that has the mesh's lists. Without one there are
    /// none.
    pub(crate) fn on_mesh_lists(&mut self, event: Event<api::ConfigMap>) {
        let read = |map: api::ConfigMap| {
            let data = map.data.unwrap_or_default().into_iter();
            let keys: BTreeMap<_, _> = data.map(|(key, text)| (key, Value::String(text))).collect();
            WideLists::of_keys(keys.iter())
        };
        let mesh = match event {
            Event::Init => {
                self.listing_mesh = WideLists::default();
                return;
            }
            Event::InitApply(map) => {
                self.listing_mesh = read(map);
                return;
            }
            Event::InitDone => {
                self.mesh_listed = true;
                std::mem::take(&mut self.listing_mesh)
            }
            Event::Apply(map) => read(map),
            Event::Delete(_) => WideLists::default(),
        };
        if mesh == self.mesh {
            return;
        }
        for note in mesh.notes.iter() {
            warn!(note, "lists of the mesh");
        }
        self.mesh = mesh;
        self.dirty.extend(self.pods.values().filter_map(cgroup_uid));
    }

    /// Applies an event of the watch of namespaces.
    pub(crate) fn on_namespace(&mut self, event: Event<PartialObjectMeta<api::Namespace>>) {
        let read = |namespace: PartialObjectMeta<api::Namespace>| {
            let meta = namespace.metadata;
            let decision = self.rules.labels.decide(&meta.labels.unwrap_or_default());
            let wide = WideLists::of_annotations(&meta.annotations.unwrap_or_default(), &self.rules.foreign);
            meta.name.map(|name| (name, NamespaceFacts { decision, wide }))
        };
        match event {
            Event::Init => self.listing_namespaces = Some(BTreeMap::new()),
            Event::InitApply(namespace) => {
                self.listing_namespaces.get_or_insert_default().extend(read(namespace));
            }
            Event::InitDone => {
                let before = std::mem::replace(
                    &mut self.namespaces,
                    self.listing_namespaces.take().unwrap_or_default(),
                );
                self.namespaces_listed = true;
                let changed = |name: &String| before.get(name) != self.namespaces.get(name);
                let names: BTreeSet<String> = before
                    .keys()
                    .chain(self.namespaces.keys())
                    .filter(|name| changed(name))
                    .cloned()
                    .collect();
                self.touch_namespaces(&names);
            }
            Event::Apply(namespace) => {
                let Some((name, facts)) = read(namespace) else { return };
                if self.namespaces.get(&name) != Some(&facts) {
                    self.namespaces.insert(name.clone(), facts);
                    self.touch_namespaces(&[name].into());
                }
            }
            Event::Delete(namespace) => {
                // The API reports the end of its pods separately: nothing follows from this alone.
                if let Some((name, _)) = read(namespace) {
                    self.namespaces.remove(&name);
                }
            }
        }
    }

    /// Applies an event of the watch of pods.
    pub(crate) fn on_pod(&mut self, event: Event<api::Pod>) {
        match event {
            Event::Init => self.listing_pods = Some(BTreeMap::new()),
            Event::InitApply(given) => {
                if let (Some(api_uid), Some(read)) = (given.metadata.uid.clone(), self.read(&given)) {
                    self.listing_pods.get_or_insert_default().insert(api_uid, read);
                }
            }
            Event::InitDone => {
                let before = std::mem::replace(&mut self.pods, self.listing_pods.take().unwrap_or_default());
                self.pods_listed = true;
                self.dirty.extend(before.values().chain(self.pods.values()).filter_map(cgroup_uid));
            }
            Event::Apply(given) => {
                let Some(api_uid) = given.metadata.uid.clone() else { return };
                let read = self.read(&given);
                self.dirty.extend(read.as_ref().and_then(cgroup_uid));
                let before = match read {
                    Some(read) => self.pods.insert(api_uid, read),
                    None => self.pods.remove(&api_uid),
                };
                self.dirty.extend(before.as_ref().and_then(cgroup_uid));
            }
            Event::Delete(given) => {
                let before = given.metadata.uid.and_then(|api_uid| self.pods.remove(&api_uid));
                self.dirty.extend(before.as_ref().and_then(cgroup_uid));
            }
        }
    }

    /// Reads a pod, as far as it is otherwise than it was last.
    fn read(&self, given: &api::Pod) -> Option<Result<ApiPod, BadEntry>> {
        let before = given.metadata.uid.as_ref().and_then(|api_uid| self.pods.get(api_uid));
        pod::read(given, &self.rules, before.and_then(|read| read.as_ref().ok()))
    }

    /// What has changed since the last call; nothing before all lists were complete once.
    pub(crate) fn changes(&mut self) -> Vec<PodChange> {
        if !self.is_whole() {
            return Vec::new();
        }
        let dirty = std::mem::take(&mut self.dirty);
        dirty.into_iter().filter_map(|uid| self.change(uid)).collect()
    }

    /// Everything that was published.
    pub(crate) fn all(&self) -> Vec<Entry> {
        self.published.values().map(|(entry, _)| entry.clone()).collect()
    }

    fn change(&mut self, uid: String) -> Option<PodChange> {
        let holder = self.holder(&uid).cloned();
        let entry = match &holder {
            None => None,
            Some(Err(bad)) => Some(Entry::Bad(bad.clone())),
            Some(Ok(api_pod)) => Some(Entry::Pod(Arc::new(self.decided(api_pod)?))),
        };
        let api_pod = holder.and_then(Result::ok);
        let before = match &entry {
            Some(entry) => self.published.insert(uid.clone(), (entry.clone(), api_pod.clone())),
            None => self.published.remove(&uid),
        };
        let entry_changed = before.as_ref().map(|(entry, _)| entry) != entry.as_ref();
        let is_other =
            entry_changed || before.as_ref().and_then(|(_, api_pod)| api_pod.as_ref()) != api_pod.as_ref();
        is_other.then_some(PodChange { uid, entry, entry_changed, api_pod })
    }

    /// A pod with what its namespace and the mesh say of it.
    ///
    /// Until its namespace is known, a known pod stays unchanged and a new one unpublished (`None`), or
    /// without the namespace's lists where its own label decides. That lasts as long as the watch of
    /// namespaces lags behind that of pods.
    fn decided(&mut self, api_pod: &ApiPod) -> Option<Pod> {
        let namespace = self.namespaces.get(&api_pod.pod.namespace);
        let none = WideLists::default();
        let wide = namespace.map_or(&none, |facts| &facts.wide);
        let levels = [&api_pod.pod.lists, &wide.lists, &self.mesh.lists];
        let exclusions = self.combined.of(levels);
        let origins = [
            "annotations of the pod".to_owned(),
            format!("annotations of namespace {}", api_pod.pod.namespace),
            format!("ConfigMap {}", self.rules.mesh_lists.as_deref().unwrap_or_default()),
        ];
        let mut origins = origins.into_iter();
        let levels = Level::of(levels.map(|lists| (origins.next().unwrap_or_default(), lists)));
        let mut pod = api_pod.decided(namespace.map(|facts| facts.decision), exclusions)?;
        pod.levels = levels;
        for note in wide.notes.iter() {
            pod.notes.push(format!("namespace {}: {note}", pod.namespace));
        }
        Some(pod)
    }

    /// Of several pods that claim one cgroup, which only static ones can, the oldest holds it.
    fn holder(&self, uid: &str) -> Option<&Result<ApiPod, BadEntry>> {
        if let Some(own) = self.pods.get(uid).filter(|read| cgroup_uid(read).as_deref() == Some(uid)) {
            return Some(own);
        }
        self.pods
            .iter()
            .filter(|(_, read)| cgroup_uid(read).as_deref() == Some(uid))
            .min_by_key(|(api_uid, read)| {
                (read.as_ref().map_or(i64::MAX, |api_pod| api_pod.created), *api_uid)
            })
            .map(|(_, read)| read)
    }

    fn touch_namespaces(&mut self, names: &BTreeSet<String>) {
        let in_them = self.pods.values().filter_map(|read| read.as_ref().ok());
        self.dirty.extend(
            in_them
                .filter(|api_pod| names.contains(&api_pod.pod.namespace))
                .map(|api_pod| api_pod.pod.uid.clone()),
        );
    }
}

fn cgroup_uid(read: &Result<ApiPod, BadEntry>) -> Option<String> {
    match read {
        Ok(api_pod) => Some(api_pod.pod.uid.clone()),
        Err(bad) => bad.uid.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::ops::RangeInclusive;

    use serde_json::json;

    use crate::model::pod::Selection;

    use super::*;

    fn pod(uid: &str, namespace: &str, more: &Value) -> api::Pod {
        let mut value = json!({"metadata": {"uid": uid, "name": format!("n-{uid}"), "namespace": namespace}});
        json_patch::merge(&mut value, more);
        serde_json::from_value(value).unwrap()
    }

    fn namespace(name: &str, mode: Option<&str>) -> PartialObjectMeta<api::Namespace> {
        let labels = mode.map_or_else(|| json!({}), |mode| json!({"istio.io/dataplane-mode": mode}));
        serde_json::from_value(
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}),
        )
        .unwrap()
    }

    fn excluding(name: &str, ports: &str) -> PartialObjectMeta<api::Namespace> {
        let annotations = json!({"ambient.adit.dev/exclude-outbound-ports": ports});
        let labels = json!({"istio.io/dataplane-mode": "ambient"});
        let metadata = json!({"name": name, "labels": labels, "annotations": annotations});
        serde_json::from_value(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}))
            .unwrap()
    }

    fn mesh_lists(ports: &str) -> api::ConfigMap {
        serde_json::from_value(json!({"data": {"excludeOutboundPorts": ports}})).unwrap()
    }

    fn excluded(changes: &[PodChange]) -> Vec<(&str, Vec<RangeInclusive<u16>>)> {
        let ports = |entry: &Option<Entry>| match entry {
            Some(Entry::Pod(pod)) => pod.exclusions.outbound_ports.clone(),
            other => panic!("{other:?}"),
        };
        changes.iter().map(|change| (change.uid.as_str(), ports(&change.entry))).collect()
    }

    #[test]
    fn lists_of_namespaces_and_of_the_mesh_hold_for_all_their_pods() {
        let rules =
            ReadRules { mesh_lists: Some("adit-system/adit-lists".to_owned()), ..ReadRules::default() };
        let mut cluster = ClusterCache::new(rules);
        list_namespaces(&mut cluster, &[("demo", Some("ambient")), ("other", None)]);
        let annotated =
            json!({"metadata": {"annotations": {"ambient.adit.dev/exclude-outbound-ports": "9"}}});
        list_pods(&mut cluster, vec![pod("a", "demo", &annotated), pod("b", "other", &json!({}))]);
        assert!(!cluster.is_whole() && cluster.changes().is_empty(), "the mesh's lists are not known yet");
        cluster.on_mesh_lists(Event::Init);
        cluster.on_mesh_lists(Event::InitApply(mesh_lists("25")));
        cluster.on_mesh_lists(Event::InitDone);
        assert_eq!(excluded(&cluster.changes()), [("a", vec![9..=9, 25..=25]), ("b", vec![25..=25])]);
        cluster.on_namespace(Event::Apply(excluding("demo", "6379,smtp")));
        let changes = cluster.changes();
        assert_eq!(excluded(&changes), [("a", vec![9..=9, 25..=25, 6379..=6379])]);
        let Some(Entry::Pod(noted)) = &changes[0].entry else { panic!("{changes:?}") };
        assert!(noted.notes[0].contains("namespace demo: ") && noted.notes[0].contains("smtp"), "{noted:?}");
        cluster.on_mesh_lists(Event::Apply(mesh_lists("25")));
        assert!(cluster.changes().is_empty(), "nothing has changed");
        cluster.on_mesh_lists(Event::Delete(mesh_lists("25")));
        assert_eq!(excluded(&cluster.changes()), [("a", vec![9..=9, 6379..=6379]), ("b", vec![])]);
    }

    fn label(mode: &str) -> Value {
        json!({"metadata": {"labels": {"istio.io/dataplane-mode": mode}}})
    }

    /// After complete lists of these.
    fn cluster(namespaces: &[(&str, Option<&str>)], pods: Vec<api::Pod>) -> ClusterCache {
        let mut cluster = ClusterCache::new(ReadRules::default());
        list_namespaces(&mut cluster, namespaces);
        list_pods(&mut cluster, pods);
        cluster
    }

    fn list_namespaces(cluster: &mut ClusterCache, namespaces: &[(&str, Option<&str>)]) {
        cluster.on_namespace(Event::Init);
        for (name, mode) in namespaces {
            cluster.on_namespace(Event::InitApply(namespace(name, *mode)));
        }
        cluster.on_namespace(Event::InitDone);
    }

    fn list_pods(cluster: &mut ClusterCache, pods: Vec<api::Pod>) {
        cluster.on_pod(Event::Init);
        for pod in pods {
            cluster.on_pod(Event::InitApply(pod));
        }
        cluster.on_pod(Event::InitDone);
    }

    /// uid and whether enrolled; "gone" or "bad".
    fn summary(changes: &[PodChange]) -> Vec<String> {
        changes
            .iter()
            .map(|change| {
                let what = match &change.entry {
                    None => "gone",
                    Some(Entry::Bad(_)) => "bad",
                    Some(Entry::Pod(pod)) if pod.selection == Selection::Enrolled => "in",
                    Some(Entry::Pod(_)) => "out",
                };
                format!("{} {what}", change.uid)
            })
            .collect()
    }

    #[test]
    fn nothing_is_published_before_both_lists_are_complete() {
        let mut cluster = ClusterCache::new(ReadRules::default());
        list_pods(&mut cluster, vec![pod("a", "demo", &json!({}))]);
        assert!(!cluster.is_whole() && cluster.changes().is_empty());
        cluster.on_namespace(Event::Init);
        cluster.on_namespace(Event::InitApply(namespace("demo", Some("ambient"))));
        assert!(!cluster.is_whole() && cluster.changes().is_empty());
        cluster.on_namespace(Event::InitDone);
        assert_eq!(summary(&cluster.changes()), ["a in"]);
    }

    #[test]
    fn a_namespaces_label_changes_all_of_its_pods_at_once_but_those_that_opted_out() {
        let pods = vec![
            pod("a", "demo", &json!({})),
            pod("b", "demo", &label("none")),
            pod("c", "demo", &label("ambient")),
            pod("d", "other", &json!({})),
        ];
        let mut cluster = cluster(&[("demo", None), ("other", None)], pods);
        assert_eq!(summary(&cluster.changes()), ["a out", "b out", "c in", "d out"]);
        cluster.on_namespace(Event::Apply(namespace("demo", Some("ambient"))));
        assert_eq!(summary(&cluster.changes()), ["a in"], "one batch of all that is other than before");
        cluster.on_namespace(Event::Apply(namespace("demo", Some("ambient"))));
        assert!(cluster.changes().is_empty(), "nothing has changed");
        cluster.on_namespace(Event::Apply(namespace("demo", None)));
        assert_eq!(summary(&cluster.changes()), ["a out"]);
    }

    #[test]
    fn a_pod_waits_for_its_namespace_unless_its_own_label_decides() {
        let mut cluster = cluster(&[], vec![]);
        cluster.on_pod(Event::Apply(pod("a", "new", &json!({}))));
        cluster.on_pod(Event::Apply(pod("b", "new", &label("ambient"))));
        assert_eq!(summary(&cluster.changes()), ["b in"]);
        cluster.on_namespace(Event::Apply(namespace("new", Some("ambient"))));
        assert_eq!(summary(&cluster.changes()), ["a in"]);
        // A deleted namespace alone takes no pod out of the mesh.
        cluster.on_namespace(Event::Delete(namespace("new", Some("ambient"))));
        cluster.on_pod(Event::Apply(pod("a", "new", &json!({"status": {"podIP": "10.0.0.1"}}))));
        assert!(cluster.changes().is_empty());
        cluster.on_pod(Event::Delete(pod("a", "new", &json!({}))));
        assert_eq!(summary(&cluster.changes()), ["a gone"]);
    }

    #[test]
    fn while_a_new_list_is_incomplete_the_old_one_holds() {
        let mut cluster = cluster(
            &[("demo", Some("ambient"))],
            vec![pod("a", "demo", &json!({})), pod("b", "demo", &json!({}))],
        );
        assert_eq!(cluster.changes().len(), 2);
        cluster.on_namespace(Event::Init);
        cluster.on_pod(Event::Init);
        cluster.on_pod(Event::InitApply(pod("b", "demo", &json!({}))));
        assert!(cluster.changes().is_empty());
        // The list breaks off and begins again.
        cluster.on_pod(Event::Init);
        cluster.on_pod(Event::InitApply(pod("c", "demo", &json!({}))));
        cluster.on_pod(Event::InitDone);
        assert_eq!(summary(&cluster.changes()), ["a gone", "b gone", "c in"]);
        assert_eq!(cluster.all().len(), 1);
    }

    #[test]
    fn a_pod_that_ended_is_gone_although_the_api_still_has_it() {
        let mut cluster = cluster(&[("demo", None)], vec![pod("a", "demo", &json!({}))]);
        cluster.changes();
        cluster.on_pod(Event::Apply(pod("a", "demo", &json!({"status": {"phase": "Succeeded"}}))));
        assert_eq!(summary(&cluster.changes()), ["a gone"]);
    }

    #[test]
    fn of_two_mirrors_with_one_hash_the_older_holds_it_and_then_the_other() {
        let hash = "0123456789abcdef0123456789abcdef";
        let mirror = |uid: &str, created: &str| {
            let annotations = json!({"kubernetes.io/config.mirror": hash, "kubernetes.io/config.hash": hash});
            pod(uid, uid, &json!({"metadata": {"annotations": annotations, "creationTimestamp": created}}))
        };
        let (old, new) = (mirror("z", "2026-01-01T00:00:00Z"), mirror("a", "2026-01-02T00:00:00Z"));
        let mut cluster = cluster(&[("a", Some("ambient")), ("z", None)], vec![new, old.clone()]);
        assert_eq!(summary(&cluster.changes()), [format!("{hash} out")]);
        cluster.on_pod(Event::Delete(old));
        assert_eq!(summary(&cluster.changes()), [format!("{hash} in")]);
    }
}
