//! Reads from one pod of the API what decides its enrolment, and nothing else.
//!
//! Users write annotations by hand: an invalid one is noted on the pod and ignored, the others stay
//! active.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::api::core::v1 as api;
use serde_json::Value;

use crate::{
    model::{
        exclusions::Exclusions,
        notes::Notes,
        pod::{BadEntry, Pod},
    },
    source::{
        MAX_NAMES,
        foreign::{self, ForeignMesh},
        options::{self, ANNOTATION_PREFIX, OPTIONS, own_annotations},
        profiles,
        selection::{self, EnrolmentLabels, LabelDecision},
    },
};

/// Where the result is written, as Istio's agent does.
pub(crate) const REDIRECTION: &str = "ambient.istio.io/redirection";
/// Its value.
pub(crate) const REDIRECTION_ENABLED: &str = "enabled";

/// A static pod is shown by the API as its mirror, with an uid of its own. The kubelet names its
/// cgroup by this hash of its manifest.
const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";
const CONFIG_HASH: &str = "kubernetes.io/config.hash";

/// How pods are read.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReadRules {
    /// The labels that enrol.
    pub labels: EnrolmentLabels,
    /// Containers that carry their pod's traffic themselves.
    pub sidecars: BTreeSet<String>,
    /// The ConfigMap of the mesh's lists, which count once they are known; `None`: there are none.
    pub mesh_lists: Option<String>,
    /// The meshes whose annotations are read.
    pub foreign: BTreeSet<ForeignMesh>,
    /// Its keys are random, so that nobody can write two texts with one hash.
    pub hasher: RandomState,
}

/// What a pod's annotations set. Reading them may take a while, and most events change nothing of
/// them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReadOptions {
    /// The hash of the annotations' texts.
    hash: u64,
    /// A pod on which nothing else is set.
    set: Pod,
}

/// A pod as the API has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiPod {
    /// The uid in the API; that of the cgroup is another for a static pod.
    pub api_uid: String,
    /// Seconds since 1970; of two that claim the same cgroup the older holds it.
    pub created: i64,
    /// What its own labels decide.
    pub decision: LabelDecision,
    /// Whether it uses the node's network.
    pub host_network: bool,
    /// What carries its traffic already.
    pub sidecar: Option<String>,
    /// Whether it carries [`REDIRECTION`].
    pub marked: bool,
    /// As it is published, but for the selection.
    pub pod: Pod,
    /// What its annotations set.
    pub options: Arc<ReadOptions>,
    /// The ids of its containers by name, as far as the kubelet has told them.
    pub containers: BTreeMap<String, String>,
}

/// Reads `given`. `None`: it has ended, or lacks a uid or a name. `before` is the same pod as it
/// was read last: annotations that did not change are not read again.
///
/// # Errors
/// Its uid cannot name a cgroup, or its names are too long.
pub(crate) fn read(
    given: &api::Pod,
    rules: &ReadRules,
    before: Option<&ApiPod>,
) -> Option<Result<ApiPod, BadEntry>> {
    let phase = given.status.as_ref().and_then(|status| status.phase.as_deref());
    if matches!(phase, Some("Succeeded" | "Failed")) {
        return None;
    }
    let meta = &given.metadata;
    let (api_uid, name) = (meta.uid.clone()?, meta.name.clone()?);
    let namespace = meta.namespace.clone()?;
    let none = BTreeMap::new();
    let annotations = meta.annotations.as_ref().unwrap_or(&none);
    let uid = cgroup_uid(&api_uid, annotations).to_owned();
    let spec = given.spec.as_ref();
    let service_account = spec
        .and_then(|spec| spec.service_account_name.clone())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "default".to_owned());

    let names = [&uid, &name, &namespace, &service_account].map(String::len).iter().sum::<usize>();
    if !is_uid(&uid) || names > MAX_NAMES {
        let problem = format!(
            "uid \"{uid}\" or names of {names} bytes, expected a uid of Kubernetes and at most {MAX_NAMES}"
        );
        return Some(Err(BadEntry { index: None, uid: Some(uid), name: Some(name), problem }));
    }

    let options = read_options(annotations, rules, before);
    let mut pod = Pod { uid, name, namespace, service_account, ..options.set.clone() };
    pod.addresses = addresses(given, &mut pod.notes);
    pod.is_running = is_running(given);
    let marked = annotations.get(REDIRECTION).is_some_and(|value| value == REDIRECTION_ENABLED);
    pod.is_announced = marked;
    Some(Ok(ApiPod {
        api_uid,
        created: meta.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
        decision: rules.labels.decide(meta.labels.as_ref().unwrap_or(&BTreeMap::new())),
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
        sidecar: sidecar(given, annotations, rules),
        marked,
        pod,
        options,
        containers: containers(given),
    }))
}

impl ApiPod {
    /// The pod with its selection, which its namespace takes part in, and with `exclusions`. `None`
    /// while it depends on a namespace that is not known.
    pub(crate) fn decided(
        &self,
        namespace: Option<LabelDecision>,
        exclusions: Arc<Exclusions>,
    ) -> Option<Pod> {
        let selection = selection::combine(self.decision, namespace)?;
        let selection = selection::except(selection, self.host_network, self.sidecar.as_deref());
        // Only where they matter: they change with every start of a container.
        let is_guarded = !exclusions.guards.containers.is_empty();
        let containers = if is_guarded { self.containers.clone() } else { BTreeMap::new() };
        Some(Pod { selection, exclusions, containers, ..self.pod.clone() })
    }
}

/// The uid by which the kubelet names the pod's cgroup. Users can set these annotations on any pod,
/// so a hash counts only in the form of one, which the uid of an ordinary pod never has.
fn cgroup_uid<'a>(api_uid: &'a str, annotations: &'a BTreeMap<String, String>) -> &'a str {
    let is_hash = |hash: &&String| {
        hash.len() == 32 && hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    match annotations.get(CONFIG_HASH).filter(is_hash) {
        Some(hash) if annotations.contains_key(CONFIG_MIRROR) => hash,
        _ => api_uid,
    }
}

/// It becomes part of names of files.
fn is_uid(uid: &str) -> bool {
    !uid.is_empty() && uid.len() <= 64 && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// What the kubelet says of containers of any kind.
fn statuses(given: &api::Pod) -> impl Iterator<Item = &api::ContainerStatus> {
    given.status.iter().flat_map(|status| {
        [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses]
            .into_iter()
            .flatten()
            .flatten()
    })
}

/// Whether a container runs, by the word of the kubelet.
fn is_running(given: &api::Pod) -> bool {
    statuses(given).any(|container| container.state.as_ref().is_some_and(|state| state.running.is_some()))
}

/// The ids of containers by name: `containerd://0123…`. One that is not long could be part of another
/// cgroup's name.
fn containers(given: &api::Pod) -> BTreeMap<String, String> {
    statuses(given)
        .filter_map(|container| {
            let (_, id) = container.container_id.as_ref()?.split_once("://")?;
            (id.len() >= 32).then(|| (container.name.clone(), id.to_owned()))
        })
        .collect()
}

fn addresses(given: &api::Pod, notes: &mut Notes) -> BTreeSet<IpAddr> {
    let Some(status) = &given.status else { return BTreeSet::new() };
    let listed = status.pod_ips.iter().flatten().map(|entry| entry.ip.as_str());
    // Old servers and hand-made pods may have the single one alone.
    let texts: BTreeSet<&str> = listed.chain(status.pod_ip.as_deref()).filter(|ip| !ip.is_empty()).collect();
    let mut addresses = BTreeSet::new();
    for text in texts {
        match text.parse::<IpAddr>() {
            Ok(address) => drop(addresses.insert(address.to_canonical())),
            Err(_) => notes.push(format!("status.podIPs: \"{text}\" ignored, expected an address")),
        }
    }
    addresses
}

/// Init containers that are restarted always are sidecars too (Kubernetes 1.29).
fn sidecar(given: &api::Pod, annotations: &BTreeMap<String, String>, rules: &ReadRules) -> Option<String> {
    let labels = given.metadata.labels.as_ref();
    if let Some(mark) = profiles::mark(annotations, labels) {
        return Some(format!("it has a sidecar ({mark})"));
    }
    let spec = given.spec.as_ref()?;
    let lasting = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|container| container.restart_policy.as_deref() == Some("Always"));
    spec.containers
        .iter()
        .chain(lasting)
        .find(|container| {
            rules.sidecars.contains(&container.name) || profiles::has_container(&container.name)
        })
        .map(|container| format!("it has the container {}", container.name))
}

/// What the annotations set, as it was read `before` if they are the same.
fn read_options(
    annotations: &BTreeMap<String, String>,
    rules: &ReadRules,
    before: Option<&ApiPod>,
) -> Arc<ReadOptions> {
    let counts = |key: &str| {
        key.starts_with(ANNOTATION_PREFIX)
            || OPTIONS.iter().any(|option| option.annotations.contains(&key))
            || foreign::is_of(&rules.foreign, key)
    };
    let texts: Vec<_> = annotations.iter().filter(|(key, _)| counts(key)).collect();
    let hash = rules.hasher.hash_one(&texts);
    if let Some(before) = before.filter(|before| before.options.hash == hash) {
        return Arc::clone(&before.options);
    }
    let mut set = Pod::default();
    set_options(&mut set, annotations);
    foreign::set(&mut set, &rules.foreign, annotations);
    Arc::new(ReadOptions { hash, set })
}

/// Sets what the annotations say; what they say wrong becomes a note.
fn set_options(pod: &mut Pod, annotations: &BTreeMap<String, String>) {
    for option in OPTIONS {
        if let Some((name, text)) = option.annotation(annotations)
            && let Err(invalid) = option.set(pod, name, &Value::String(text.clone()))
        {
            pod.notes.push(invalid.ignored());
        }
    }
    options::note_refused(pod, "istio.io/reroute-virtual-interfaces");
    let unknown = annotations
        .keys()
        .filter(|key| key.starts_with(ANNOTATION_PREFIX) && own_annotations().all(|own| own != *key));
    for key in unknown {
        let known: Vec<&str> = own_annotations().collect();
        pod.notes.push(format!("{key}: unknown annotation ignored, expected one of {}", known.join(", ")));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::{lists::Lists, pod::FailMode};

    use super::*;

    fn rules() -> ReadRules {
        ReadRules { sidecars: ["proxy".to_owned()].into(), ..ReadRules::default() }
    }

    fn api_pod(value: Value) -> Option<ApiPod> {
        let given: api::Pod = serde_json::from_value(value).unwrap();
        read(&given, &rules(), None).map(|read| read.unwrap())
    }

    fn with_annotations(annotations: &Value) -> ApiPod {
        api_pod(
            json!({"metadata": {"uid": "u-1", "name": "n", "namespace": "d", "annotations": annotations}}),
        )
        .unwrap()
    }

    #[test]
    fn everything_that_counts_is_read() {
        let api_pod = api_pod(json!({
            "metadata": {
                "uid": "8a4b0c1e-0000-4000-8000-000000000001", "name": "web", "namespace": "demo",
                "labels": {"istio.io/dataplane-mode": "ambient"},
                "annotations": {
                    "ambient.adit.dev/fail-mode": "open", "ambient.adit.dev/dns-capture": "false",
                    "ambient.istio.io/dns-capture": "true",
                    "ambient.adit.dev/exclude-outbound-ports": "6379, 7000-7001",
                    "ambient.adit.dev/exclude-outbound-cidrs": "10.0.0.0/8",
                    "ambient.adit.dev/exclude-inbound-ports": "9090",
                    "ambient.istio.io/redirection": "enabled",
                },
            },
            "spec": {"containers": [{"name": "web"}], "serviceAccountName": "web-sa"},
            "status": {"phase": "Running", "podIP": "10.1.0.2", "podIPs": [{"ip": "10.1.0.2"}, {"ip": "fd00::2"}]},
        }))
        .unwrap();
        let Pod { fail_mode, dns_capture, addresses, lists, notes, service_account, .. } = &api_pod.pod;
        assert_eq!(
            (api_pod.decision, api_pod.marked, api_pod.host_network, &api_pod.sidecar),
            (LabelDecision::Enrol, true, false, &None)
        );
        assert_eq!((*fail_mode, *dns_capture), (Some(FailMode::Open), Some(false)));
        assert_eq!(addresses.len(), 2);
        assert_eq!(lists.outbound.excluded_ports, [6379..=6379, 7000..=7001]);
        assert_eq!((lists.outbound.excluded_cidrs.len(), lists.inbound.excluded_ports.len()), (1, 1));
        assert_eq!((service_account.as_str(), notes.len()), ("web-sa", 0));
    }

    #[test]
    fn nonsense_is_noted_and_ignored() {
        let api_pod = with_annotations(&json!({
            "ambient.adit.dev/fail-mode": "ajar",
            "ambient.adit.dev/dns-capture": "yes",
            "ambient.adit.dev/exclude-inbound-ports": "9090, http",
            "ambient.adit.dev/exclude-inbound-port": "1",
            "elsewhere.dev/fail-mode": "ajar",
        }));
        assert_eq!((api_pod.pod.fail_mode, api_pod.pod.dns_capture), (None, None));
        assert_eq!(api_pod.pod.lists.inbound.excluded_ports, [9090..=9090]);
        let notes = api_pod.pod.notes.join("\n");
        assert_eq!(api_pod.pod.notes.len(), 4, "{notes}");
        for part in ["\"ajar\"", "\"yes\"", "\"http\"", "exclude-inbound-port: unknown"] {
            assert!(notes.contains(part), "{part} in {notes}");
        }
    }

    #[test]
    fn istios_annotations_are_obeyed_or_refused_by_name() {
        let set = |annotations: &Value| with_annotations(annotations).pod;
        let all = set(&json!({"ambient.istio.io/bypass-inbound-capture": "true",
            "ambient.adit.dev/exclude-inbound-ports": "80"}));
        assert_eq!((all.lists.inbound.excluded_ports.as_slice(), all.notes.len()), (&[1..=65535][..], 0));
        let none = set(&json!({"ambient.istio.io/bypass-inbound-capture": "false"}));
        assert!(*none.lists == Lists::default() && none.notes.is_empty());
        let bad = set(&json!({"ambient.istio.io/bypass-inbound-capture": "yes"}));
        assert!(*bad.lists == Lists::default() && bad.notes[0].contains("bypass-inbound-capture: \"yes\""));
        let refused = set(&json!({"istio.io/reroute-virtual-interfaces": "tap0, net1"}));
        assert!(refused.notes[0].starts_with("istio.io/reroute-virtual-interfaces: cannot be obeyed"));
        assert!(refused.notes[0].contains("tap0, net1"));
    }

    #[test]
    fn annotations_that_did_not_change_are_not_read_again() {
        let rules = rules();
        let pod = |ports: &str, label: &str| -> api::Pod {
            let annotations = json!({"ambient.adit.dev/exclude-outbound-ports": ports, "other": label});
            let metadata = json!({"uid": "u", "name": "n", "namespace": "d", "annotations": annotations});
            serde_json::from_value(json!({"metadata": metadata, "status": {"podIP": label}})).unwrap()
        };
        let first = read(&pod("80-90,x", "10.0.0.1"), &rules, None).unwrap().unwrap();
        let second = read(&pod("80-90,x", "10.0.0.2"), &rules, Some(&first)).unwrap().unwrap();
        assert!(Arc::ptr_eq(&first.pod.lists, &second.pod.lists) && first != second);
        assert_eq!((second.pod.notes.len(), second.pod.addresses.len()), (1, 1));
        let third = read(&pod("80-91", "10.0.0.2"), &rules, Some(&second)).unwrap().unwrap();
        assert_eq!(
            (third.pod.lists.outbound.excluded_ports.as_slice(), third.pod.notes.len()),
            (&[80..=91][..], 0)
        );
    }

    #[test]
    fn a_pod_that_ended_is_none() {
        for (phase, is_there) in
            [("Pending", true), ("Running", true), ("Succeeded", false), ("Failed", false)]
        {
            let pod =
                json!({"metadata": {"uid": "u", "name": "n", "namespace": "d"}, "status": {"phase": phase}});
            assert_eq!(api_pod(pod).is_some(), is_there, "{phase}");
        }
    }

    #[test]
    fn sidecars_are_found_by_annotation_and_by_name_also_among_init_containers() {
        let pod = |spec: Value| {
            let spec =
                api_pod(json!({"metadata": {"uid": "u", "name": "n", "namespace": "d"}, "spec": spec}));
            spec.unwrap().sidecar.is_some()
        };
        let init = |policy: Value| json!({"containers": [], "initContainers": [{"name": "proxy", "restartPolicy": policy}]});
        assert!(pod(json!({"containers": [{"name": "web"}, {"name": "proxy"}]})));
        assert!(pod(init(json!("Always"))));
        assert!(!pod(init(Value::Null)), "it ends before the others start");
        assert!(!pod(json!({"containers": [{"name": "proxy-test"}]})));
        assert!(with_annotations(&json!({"sidecar.istio.io/status": "{}"})).sidecar.is_some());
    }

    #[test]
    fn a_static_pods_cgroup_is_named_by_its_hash_and_no_other_pods_uid_can_be_claimed() {
        let hash = "0123456789abcdef0123456789abcdef";
        let mirror = |hash: &str| {
            with_annotations(&json!({"kubernetes.io/config.mirror": "x", "kubernetes.io/config.hash": hash}))
                .pod
                .uid
        };
        assert_eq!(mirror(hash), hash);
        assert_eq!(mirror("8a4b0c1e-0000-4000-8000-000000000001"), "u-1");
        assert_eq!(with_annotations(&json!({"kubernetes.io/config.hash": hash})).pod.uid, "u-1");
    }

    #[test]
    fn a_uid_that_is_none_is_refused() {
        for bad in ["", "a/b", "..", &"a".repeat(65)] {
            let pod = json!({"metadata": {"uid": bad, "name": "n", "namespace": "d"}});
            assert!(read(&serde_json::from_value(pod).unwrap(), &rules(), None).unwrap().is_err(), "{bad:?}");
        }
    }
}
