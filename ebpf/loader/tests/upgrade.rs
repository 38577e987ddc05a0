//! A build that finds another version's maps and programs: these decide until its own maps are
//! filled. What other versions leave is made of this one: its pins get other names, as those of
//! another ABI number have, while its links and programs stay.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use adit_ebpf_common::{
    enrolment::{CgroupInfo, flag},
    lifecycle::name,
    maps::{ALL, CGROUP_INFO, Keeps},
    sealed::Sealed,
};
use adit_ebpf_loader::{Kernel, KernelError, LifecycleEvent, pin_name};
use aya::maps::{HashMap, MapData};

use testbed::wait::wait_for;

use crate::rig::{INBOUND, OUTBOUND, READY, Rig, agent::How, at, empty};

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Both ways, by the tunnel.
fn assert_carried(rig: &mut Rig, outbound: u32, inbound: u32) {
    let to = at("192.0.2.1", 80);
    let dialled = rig.app.dial(How::Tcp, to).expect("redirected");
    let accepted = rig.tunnel.accept(outbound);
    assert_eq!(accepted.original, Some(to));
    rig.app.close(dialled.handle);
    rig.tunnel.close(accepted.handle);
    let arrived = rig.world.dial(How::Tcp, at("10.99.0.1", 8080)).expect("steered");
    let accepted = rig.tunnel.accept(inbound);
    rig.world.close(arrived.handle);
    rig.tunnel.close(accepted.handle);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn another_versions_programs_decide_until_the_maps_are_filled() {
    let mut rig = Rig::new();
    let outbound = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let inbound = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    let maps = rig.bpffs.pins().join("maps");
    for map in ALL.iter().filter(|map| map.keeps == Keeps::Entries) {
        fs::rename(maps.join(pin_name(map)), maps.join(format!("{}-9", map.name))).unwrap();
    }
    // One that is killed before it has filled them leaves its maps empty: they are not taken for
    // those that the programs use.
    for _ in 0..2 {
        let successor = Kernel::open(&rig.bpffs.pins()).unwrap();
        assert!(successor.must_be_filled());
        assert_eq!((successor.cgroups().unwrap(), successor.pods().unwrap()), (vec![], vec![]));
        rig.kernel = successor;
        assert_carried(&mut rig, outbound, inbound);
    }
    assert!(names(&maps).contains(&"cgroup_info_map-9".to_owned()), "kept as long as they decide");

    rig.set(READY, true);
    rig.steer();
    assert_carried(&mut rig, outbound, inbound);
    rig.kernel.attach_tunnel(&rig.cgroups.join("tunnel")).unwrap();
    assert_carried(&mut rig, outbound, inbound);
    rig.kernel.attach_pods(&rig.cgroups.join("pods")).unwrap();
    assert!(!rig.kernel.must_be_filled());
    assert_carried(&mut rig, outbound, inbound);
    assert!(names(&maps).iter().all(|name| !name.ends_with("-9")), "{:?}", names(&maps));
    let next = Kernel::open(&rig.bpffs.pins()).unwrap();
    assert!(!next.must_be_filled(), "the programs use these maps");
    rig.set(flag::IN_MESH, true);
    rig.app.dial(How::Tcp, at("192.0.2.1", 80)).expect_err("the programs read the new maps");
}

/// A map of this ABI number and another size, as an earlier build made it.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_map_of_another_size_is_replaced_and_filled_first() {
    let mut rig = Rig::new();
    let outbound = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let inbound = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    let path = rig.bpffs.pins().join("maps").join(pin_name(&CGROUP_INFO));
    fs::remove_file(&path).unwrap();
    let mut small = HashMap::<MapData, u64, Sealed<CgroupInfo>>::create(64, 0).unwrap();
    small.insert(5, Sealed::new(&5, empty()), 0).unwrap();
    small.pin(&path).unwrap();
    rig.kernel = Kernel::open(&rig.bpffs.pins()).unwrap();
    assert!(rig.kernel.must_be_filled());
    assert_eq!(rig.kernel.cgroups().unwrap(), [], "not the small one");
    assert_carried(&mut rig, outbound, inbound);
    rig.set(READY, true);
    rig.kernel.attach_pods(&rig.cgroups.join("pods")).unwrap();
    assert_carried(&mut rig, outbound, inbound);
}

/// Nobody can copy the sockets in it: the version that made it has to run, or the tunnel to listen
/// anew. Until then everything is as it was.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn another_versions_map_of_the_tunnels_sockets_is_refused_by_name() {
    let mut rig = Rig::new();
    let outbound = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let inbound = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    let maps = rig.bpffs.pins().join("maps");
    fs::rename(maps.join("tunnel_listeners"), maps.join("tunnel_listeners-2")).unwrap();
    let before = names(&maps);
    let error = Kernel::open(&rig.bpffs.pins()).unwrap_err();
    assert!(matches!(error, KernelError::OtherVersion { map: "tunnel_listeners", .. }), "{error:?}");
    assert!(error.to_string().contains("tunnel_listeners-2"), "{error}");
    assert_eq!(names(&maps), before, "nothing has changed");
    assert_carried(&mut rig, outbound, inbound);

    // Of another type.
    fs::remove_file(maps.join("tunnel_listeners-2")).unwrap();
    HashMap::<MapData, [u8; 16], u32>::create(64, 0).unwrap().pin(maps.join("tunnel_listeners")).unwrap();
    let error = Kernel::open(&rig.bpffs.pins()).unwrap_err();
    assert!(matches!(error, KernelError::OtherVersion { .. }), "{error:?}");
    assert_carried(&mut rig, outbound, inbound);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn expected_pods_are_closed_while_nobody_runs_and_the_successor_goes_on() {
    let mut rig = Rig::new();
    let pods = rig.cgroups.join("pods");
    let lifecycle = rig.kernel.lifecycle(&pods).unwrap();
    rig.kernel.end_earlier_lifecycle().unwrap();
    let info = CgroupInfo { flags: flag::IN_MESH, ..empty() };
    let keys = ["podone", "podtwo"].map(|pod| name(pod.as_bytes()).unwrap());
    for key in &keys {
        rig.kernel.expect_pod(key, &info).unwrap();
    }
    drop(lifecycle);
    let pins = rig.bpffs.pins();
    let links = |pins: &Path| {
        names(&pins.join("links"))
            .into_iter()
            .filter(|name| name.starts_with("lifecycle-"))
            .collect::<Vec<_>>()
    };
    let earlier = links(&pins);
    assert_eq!(earlier.len(), 5, "{earlier:?}");
    // Nothing is left of the process but its pins.
    let Rig {
        kernel, trace, bpffs, cgroups, app: _app, plain: _plain, world: _world, tunnel: _tunnel, ..
    } = rig;
    drop((kernel, trace));
    let entry = |kernel: &Kernel, dir: &str| {
        let id = fs::metadata(pods.join(dir)).unwrap().ino();
        kernel.cgroups().unwrap().into_iter().find(|(found, _)| *found == id).map(|(_, info)| info)
    };
    fs::create_dir(pods.join("podone")).unwrap();

    let mut successor = Kernel::open(&bpffs.pins()).unwrap();
    assert_eq!(entry(&successor, "podone"), Some(info));
    assert_eq!(successor.expected_pods().unwrap().len(), 2, "adopted");
    let mut lifecycle = successor.lifecycle(&pods).unwrap();
    assert_eq!(links(&bpffs.pins()).len(), 10, "beside the earlier ones");
    successor.end_earlier_lifecycle().unwrap();
    let own = links(&bpffs.pins());
    assert!(own.len() == 5 && own.iter().all(|link| !earlier.contains(link)), "{own:?}");
    fs::create_dir(pods.join("podtwo")).unwrap();
    assert_eq!(entry(&successor, "podtwo"), Some(info));
    wait_for("its event", || {
        let event = lifecycle.next()?;
        matches!(event, LifecycleEvent::Cgroup { closed: Some(_), .. }).then_some(())
    });
    for dir in ["podone", "podtwo"] {
        fs::remove_dir(pods.join(dir)).unwrap();
    }
    Kernel::remove(&bpffs.pins()).unwrap();
    assert!(!bpffs.path().join("adit").exists());
    drop(cgroups);
}
