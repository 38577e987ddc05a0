//! Fixtures for the tests of plans: pods, what is observed of them, and the plans that follow.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use adit_ebpf_common::lifecycle::name;

use crate::{
    model::{
        notes::Notes,
        pod::{FailMode, Pod, Selection},
    },
    observe::{
        Gap, Observed, ObservedNetns,
        cgroups::CgroupId,
        netns::{NetnsFacts, NetnsId},
    },
};

use super::{
    Eligibility, Plan, PodNetns, PodView, PodWorkload,
    claims::Claims,
    desired::{Circumstances, pod_plan},
    diff::{Applied, ApplyStep, DiffScope, MapContents, steps},
    eligibility::{closed_netns, evaluate},
};

mod desired;
mod diff;
mod eligibility;
mod pod_state;

const ATTACHED: &str = "/cgroup/pods";

fn pod(uid: &str) -> Pod {
    Pod {
        uid: uid.to_owned(),
        name: uid.to_owned(),
        namespace: "demo".to_owned(),
        service_account: "sa".to_owned(),
        cgroup: Some(Path::new(ATTACHED).join(uid)),
        selection: Selection::Enrolled,
        fail_mode: None,
        dns_capture: None,
        virtual_interfaces: Vec::new(),
        addresses: BTreeSet::new(),
        lists: Arc::default(),
        levels: Vec::new(),
        exclusions: Arc::default(),
        containers: BTreeMap::new(),
        is_running: false,
        is_announced: false,
        notes: Notes::default(),
    }
}

fn facts(n: u8) -> NetnsFacts {
    NetnsFacts {
        id: NetnsId { dev: 4, inode: u64::from(n) },
        cookie: 1000 + u64::from(n),
        addresses: vec![IpAddr::from([10, 0, 0, n]), format!("fd00::{n}").parse().unwrap()],
        link_local_v4: Vec::new(),
        devices: BTreeMap::new(),
        guest: None,
    }
}

/// A pod's cgroup with one container, whose processes are in netns `n`.
fn seen(n: u8, netns: Vec<ObservedNetns>) -> Observed {
    let id = u64::from(n) * 10;
    let dir = PathBuf::from(format!("/observed/{n}"));
    let cgroups = [(dir.join("c"), id + 1), (dir.clone(), id)].into();
    Observed { dir: Some(dir), cgroups, netns, gap: None }
}

fn in_order(n: u8) -> Observed {
    seen(n, vec![ObservedNetns::Pod(facts(n))])
}

/// Each pod with its own directory.
fn placed(pods: Vec<(Pod, Observed)>) -> Vec<(Arc<Pod>, Observed)> {
    let place = |(pod, observed): (Pod, Observed)| {
        let Some(to) = pod.cgroup.clone() else { return (Arc::new(pod), observed) };
        let from = observed.dir.clone().unwrap_or_default();
        let moved = |path: &Path| {
            path.strip_prefix(&from)
                .map_or_else(|_| path.to_owned(), |below| to.join(below).components().collect())
        };
        let cgroups = observed.cgroups.iter().map(|(path, id)| (moved(path), *id)).collect();
        (Arc::new(pod), Observed { dir: Some(to), cgroups, ..observed })
    };
    pods.into_iter().map(place).collect()
}

/// One after the other.
fn evaluate_all(pods: Vec<(Arc<Pod>, Observed)>, current: &BTreeMap<String, u64>) -> Vec<PodView> {
    let mut claims = Claims::default();
    pods.into_iter()
        .map(|(pod, observed)| {
            let current = current.get(&pod.uid).copied();
            let eligibility = evaluate(&pod, &observed, Path::new(ATTACHED), current, &mut claims);
            let closed_netns = closed_netns(&pod, &observed, &eligibility, current, &mut claims);
            PodView { pod, observed, eligibility, closed_netns }
        })
        .collect()
}

/// What holds for the node and for single pods, by uid.
#[derive(Default)]
struct Setting {
    ready: BTreeSet<String>,
    in_grace: BTreeSet<String>,
    exclusion_ids: BTreeMap<String, u32>,
    steered: BTreeMap<String, BTreeMap<u64, PodNetns>>,
    fail_mode: FailMode,
    dns_capture: bool,
}

impl Setting {
    fn plan(&self, pods: Vec<(Pod, Observed)>) -> Plan {
        let views = evaluate_all(placed(pods), &BTreeMap::new());
        let plan = |view: &PodView| {
            let uid = &view.pod.uid;
            let circumstances = Circumstances {
                leaving: false,
                has_sidecar: false,
                fail_mode: self.fail_mode,
                dns_capture: self.dns_capture,
                ready: self.ready.contains(uid),
                spread: false,
                in_grace: self.in_grace.contains(uid),
                steered: self.steered.get(uid).cloned().unwrap_or_default(),
                exclusions: Arc::clone(&view.pod.exclusions),
                exclusion_id: self.exclusion_ids.get(uid).copied().unwrap_or(0),
                cgroup_names: vec![name(uid.as_bytes()).unwrap()],
            };
            (uid.clone(), pod_plan(view, &circumstances))
        };
        views.iter().map(plan).collect()
    }
}

/// Everything that a plan has applied.
#[derive(Default)]
struct Node {
    maps: MapContents,
    netns: BTreeMap<u64, PodNetns>,
    workloads: BTreeMap<String, PodWorkload>,
}

impl Node {
    fn with(plan: &Plan) -> Self {
        let mut node = Self::default();
        for (uid, plan) in plan.clone() {
            node.maps.exclusions.extend(plan.exclusions);
            node.maps.expected.extend(plan.expected);
            node.maps.cgroups.extend(plan.cgroups);
            node.maps.addresses.extend(plan.addresses);
            node.maps.arrivals.extend(plan.arrivals);
            node.netns.extend(plan.netns);
            node.workloads.extend(plan.workload.map(|workload| (uid, workload)));
        }
        node
    }

    fn steps(&self, scope: DiffScope<'_>, plan: &Plan) -> Vec<ApplyStep> {
        let applied = Applied { maps: &self.maps, netns: &self.netns, workloads: &self.workloads };
        steps(&applied, scope, plan)
    }

    /// With no tunnel connected.
    fn all_steps(&self, plan: &Plan) -> Vec<ApplyStep> {
        self.steps(DiffScope::All { tunnels: &BTreeSet::new() }, plan)
    }
}
