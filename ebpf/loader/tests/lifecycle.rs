//! What the lifecycle programs tell, and that they close an expected pod as its cgroup is made.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use adit_ebpf_common::{
    enrolment::{CgroupInfo, flag},
    lifecycle::{Kind, name},
};
use adit_ebpf_loader::{Lifecycle, LifecycleEvent};

use crate::rig::{Rig, empty};

/// Events until `wanted` says that one is it, within ten seconds.
fn until(
    lifecycle: &mut Lifecycle,
    wanted: impl Fn(&LifecycleEvent) -> bool,
) -> Result<Vec<LifecycleEvent>, Vec<LifecycleEvent>> {
    let (mut seen, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(10));
    while Instant::now() < deadline {
        while let Some(event) = lifecycle.next() {
            let found = wanted(&event);
            seen.push(event);
            if found {
                return Ok(seen);
            }
        }
    }
    Err(seen)
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn an_expected_pod_is_closed_before_mkdir_returns_and_nobody_else_is_told_of() {
    let mut rig = Rig::new();
    let (pods, world) = (rig.cgroups.join("pods"), rig.cgroups.join("world"));
    let mut lifecycle = rig.kernel.lifecycle(&pods).unwrap();
    let info = CgroupInfo { flags: flag::IN_MESH, ..empty() };
    let key = name(b"podnew").unwrap();
    rig.kernel.expect_pod(&key, &info).unwrap();
    let entry = |rig: &Rig, id| {
        rig.kernel.cgroups().unwrap().into_iter().find(|(found, _)| *found == id).map(|(_, info)| info)
    };

    for dir in [world.join("podnew"), pods.join("podother"), pods.join("podnew")] {
        fs::create_dir(&dir).unwrap();
    }
    let id = fs::metadata(pods.join("podnew")).unwrap().ino();
    assert_eq!(entry(&rig, id), Some(info));
    for other in [world.join("podnew"), pods.join("podother")] {
        assert_eq!(entry(&rig, fs::metadata(other).unwrap().ino()), None);
    }
    rig.app.enter_cgroup(&pods.join("podnew"));
    rig.app.enter_cgroup(&pods.join("podother"));
    for dir in [world.join("podnew"), pods.join("podnew")] {
        fs::remove_dir(&dir).unwrap();
    }
    let gone = pods.join("podnew");
    let last = |event: &LifecycleEvent| matches!(event, LifecycleEvent::Cgroup { path, kind: Kind::Removed, .. } if *path == gone);
    let told = until(&mut lifecycle, last).unwrap();
    let of = |wanted: &std::path::Path| {
        let kinds = told.iter().filter_map(|event| match event {
            LifecycleEvent::Cgroup { path, kind, closed } if path == wanted => Some((*kind, *closed)),
            _ => None,
        });
        kinds.collect::<Vec<_>>()
    };
    let plain = |kind| (kind, None);
    let (made, other) = (of(&gone), of(&pods.join("podother")));
    assert_eq!(made.first(), Some(&(Kind::Made, Some(id))));
    for kind in [Kind::Joined, Kind::Populated, Kind::Removed] {
        assert!(made.contains(&plain(kind)), "{kind:?} in {made:?}");
    }
    assert_eq!(other.first(), Some(&plain(Kind::Made)));
    let foreign = told
        .iter()
        .any(|event| matches!(event, LifecycleEvent::Cgroup { path, .. } if !path.starts_with(&pods)));
    assert!(!foreign, "{told:?}");

    rig.kernel.expect_pod_no_more(&key).unwrap();
    fs::create_dir(&gone).unwrap();
    assert_eq!(entry(&rig, fs::metadata(&gone).unwrap().ino()), None);
    assert_eq!(lifecycle.lost().unwrap(), 0);
    fs::remove_dir(&gone).unwrap();
    rig.app.enter_cgroup(&rig.cgroups.join("pods/mesh/container"));
    fs::remove_dir(pods.join("podother")).unwrap();
}

/// What comes next in its cgroup may be in another netns, and nothing decides about arrivals there.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_closed_pods_netns_is_forgotten_with_its_last_process() {
    let mut rig = Rig::new();
    let pods = rig.cgroups.join("pods");
    let mut lifecycle = rig.kernel.lifecycle(&pods).unwrap();
    let served =
        CgroupInfo { flags: flag::IN_MESH | flag::READY, netns_cookie: 7, exclusion_id: 3, ..empty() };
    let with = |flags| CgroupInfo { flags: served.flags | flags, ..served };
    let closed = CgroupInfo { flags: flag::IN_MESH, netns_cookie: 0, exclusion_id: 0, ..served };
    for (name, before, after) in [
        ("closed", served, closed),
        ("open", with(flag::FAIL_OPEN), with(flag::FAIL_OPEN)),
        ("tunnel", with(flag::TUNNEL), with(flag::TUNNEL)),
        ("unknown", closed, closed),
    ] {
        let pod = pods.join(format!("pod{name}"));
        fs::create_dir_all(pod.join("container")).unwrap();
        let id = fs::metadata(&pod).unwrap().ino();
        rig.kernel.set_cgroup(id, &before).unwrap();
        rig.app.enter_cgroup(&pod.join("container"));
        assert_eq!(rig.kernel.cgroup(id).unwrap(), Some(before), "{name}: it has a process");
        rig.app.enter_cgroup(&rig.cgroups.join("pods/mesh/container"));
        assert_eq!(rig.kernel.cgroup(id).unwrap(), Some(after), "{name}");
        let emptied = |event: &LifecycleEvent| matches!(event, LifecycleEvent::Cgroup { path, kind: Kind::Removed, .. } if *path == pod);
        fs::remove_dir(pod.join("container")).unwrap();
        fs::remove_dir(&pod).unwrap();
        let told = until(&mut lifecycle, emptied).unwrap();
        let changed: Vec<_> = told
            .iter()
            .filter_map(|event| match event {
                LifecycleEvent::Cgroup { path, kind, closed: Some(id) } if *path == pod => Some((*kind, *id)),
                _ => None,
            })
            .collect();
        let expected = if before == after { vec![] } else { vec![(Kind::Populated, id)] };
        assert_eq!(changed, expected, "{name}");
    }
}
