//! Entries that are replaced while programs read them.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use adit_ebpf_common::enrolment::{CgroupInfo, flag};

use crate::rig::{Rig, at, empty};

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
