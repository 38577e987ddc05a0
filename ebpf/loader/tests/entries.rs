//! Entries that are replaced while programs read them.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use adit_ebpf_common::{
    enrolment::{CgroupInfo, NetnsInfo, flag},
    maps::{CGROUP_INFO, MapSpec, POD_BY_NETNS},
    sealed::Sealed,
    trace::{Hook, Rule},
};
use adit_ebpf_loader::pin_name;
use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};

use crate::rig::{READY, Rig, agent::How, at, empty};

/// As somebody else might, who knows of no seals.
fn write_unsealed<V>(rig: &Rig, map: &MapSpec, key: u64, value: V)
where
    V: Copy + adit_ebpf_common::sealed::Sum,
    Sealed<V>: Pod,
{
    let data = MapData::from_pin(rig.bpffs.pins().join("maps").join(pin_name(map))).unwrap();
    let mut map = HashMap::<_, u64, Sealed<V>>::try_from(Map::from_map_data(data).unwrap()).unwrap();
    map.insert(key, Sealed::broken(value), 0).unwrap();
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn what_cannot_be_read_whole_is_closed_and_shown() {
    let mut rig = Rig::new();
    let (pod, cookie) = (rig.cgroups.id("pods/mesh"), rig.cookie);
    write_unsealed(&rig, &CGROUP_INFO, pod, CgroupInfo { flags: flag::TUNNEL, ..empty() });
    assert_eq!(rig.app.dial(How::Tcp, at("10.99.0.2", 80)).unwrap_err(), libc::EPERM);
    assert_eq!(rig.rules(80), [(Hook::Connect4, Rule::FailClosed)]);
    let shown = rig.kernel.cgroups().unwrap().into_iter().find(|(id, _)| *id == pod);
    assert_eq!(shown.map(|(_, info)| info.flags), Some(flag::BROKEN));

    rig.set(READY, true);
    let _app = rig.app.listen("[::]:8080");
    let open = NetnsInfo { cgroup_id: pod, flags: flag::IN_MESH | flag::FAIL_OPEN, exclusion_id: 0 };
    write_unsealed(&rig, &POD_BY_NETNS, cookie, open);
    let _waiting = rig.world.begin(at("10.99.0.1", 8080));
    assert_eq!(rig.rules(8080).last(), Some(&(Hook::SkLookup, Rule::FailClosed)));
    assert_eq!(
        rig.kernel.netns().unwrap(),
        [(cookie, NetnsInfo { flags: flag::BROKEN, ..NetnsInfo::CLOSED })]
    );
}

/// The kernel gives the memory of a replaced entry to the next one that the same processor writes,
/// at once. Here that one is a tunnel's, which is left alone; the one after it may be the pod's
/// again, with the same contents in the same place.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_closed_pod_is_never_taken_for_another_while_entries_are_replaced() {
    let mut rig = Rig::new();
    let pod = rig.cgroups.id("pods/mesh");
    let closed = CgroupInfo { flags: flag::IN_MESH, netns_cookie: rig.cookie, ..empty() };
    let tunnel = CgroupInfo { flags: flag::TUNNEL, ..empty() };
    rig.set_netns(flag::IN_MESH, 0);
    rig.kernel.set_cgroup(pod, &closed).unwrap();
    let stop = AtomicBool::new(false);
    let Rig { kernel, app, .. } = &mut rig;
    thread::scope(|scope| {
        let replacing = scope.spawn(|| {
            let mut replaced = 0u64;
            while !stop.load(Ordering::Relaxed) {
                kernel.set_cgroup(pod, &closed).unwrap();
                kernel.set_cgroup(1, &tunnel).unwrap();
                replaced += 1;
            }
            replaced
        });
        let (start, mut dialled, mut escaped) = (Instant::now(), 0, 0);
        while start.elapsed() < Duration::from_secs(4) {
            dialled += 1;
            if let Ok(handle) = app.begin(at("10.99.0.2", 80)) {
                escaped += 1;
                app.close(handle);
            }
        }
        stop.store(true, Ordering::Relaxed);
        let replaced = replacing.join().unwrap();
        assert_eq!(escaped, 0, "of {dialled} connects, while its entry was replaced {replaced} times");
    });
}
