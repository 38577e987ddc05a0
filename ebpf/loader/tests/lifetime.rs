//! What outlives a process, what is replaced in place, what goes, and what is said when it does not
//! work.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    net::Ipv6Addr,
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering},
};

use adit_ebpf_common::{
    enrolment::flag,
    maps::{POD_BY_ADDR, SETTINGS},
    settings::trace_filter::{LEFT_OUT, WATCHED},
    trace::{watched_cgroup, watched_netns},
};
use adit_ebpf_loader::{Kernel, KernelError, pin_name, preflight};
use aya::{EbpfLoader, maps::MapInfo, programs::loaded_links};

use testbed::wait::wait_for;

use crate::rig::{Bpffs, INBOUND, OUTBOUND, Rig, address, agent::How, at, cgroups, empty, repeated, sys};

/// Of the pods' cgroup, of a tunnel's, of a netns.
const ALL_LINKS: usize = 14 + 5 + 1;

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn pins_outlive_their_loader_and_a_successor_adopts_them() {
    let mut rig = Rig::new();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let inbound = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    let to = at("192.0.2.1", 80);
    let (pins, links) = (rig.bpffs.pins(), pinned(&rig));
    assert_eq!(links.len(), ALL_LINKS, "{links:#?}");
    let (cgroups, pods) = (rig.kernel.cgroups().unwrap(), rig.kernel.pods().unwrap());

    // The successor is there before the predecessor goes, or after: alike.
    let successor = Kernel::open(&pins).unwrap();
    assert!(!successor.must_be_filled(), "it has the same maps");
    drop(std::mem::replace(&mut rig.kernel, successor));
    rig.app.dial(How::Tcp, to).expect("the predecessor's links work");
    assert_eq!(rig.tunnel.accept(tunnel).original, Some(to));

    let programs = programs_of(&links);
    let netns = File::open(format!("/proc/{}/ns/net", rig.app.task())).unwrap();
    for _ in 0..2 {
        rig.kernel.attach_pods(&rig.cgroups.join("pods")).unwrap();
        rig.kernel.attach_tunnel(&rig.cgroups.join("tunnel")).unwrap();
        rig.kernel.steer(&[(rig.cookie, netns.as_fd())]).remove(0).unwrap();
    }
    assert_eq!(pinned(&rig), links, "the same links");
    assert!(programs.is_disjoint(&programs_of(&links)), "with the successor's programs");
    assert_eq!(rig.kernel.steered().unwrap(), [rig.cookie]);
    assert_eq!(rig.kernel.cgroups().unwrap(), cgroups);
    assert_eq!(rig.kernel.pods().unwrap(), pods);

    // Listeners of before are still registered.
    rig.app.dial(How::Tcp, to).unwrap();
    assert_eq!(rig.tunnel.accept(tunnel).original, Some(to));
    rig.world.dial(How::Tcp, at("10.99.0.1", 8080)).unwrap();
    rig.tunnel.accept(inbound);
}

/// While successors take over one after another, every connection is redirected, and by one
/// program.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn taking_over_leaves_no_gap() {
    // Dropped from the last to the first: processes before the cgroups that they are in, also when
    // this panics.
    let Rig {
        bpffs,
        cgroups,
        kernel: _kernel,
        mut trace,
        plain: _plain,
        world: _world,
        mut tunnel,
        mut app,
        ..
    } = Rig::new();
    let listener = tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let to = at("192.0.2.1", 80);
    let done = AtomicBool::new(false);
    let (dialled, records) = std::thread::scope(|scope| {
        let dialling = scope.spawn(|| {
            let (mut count, mut records) = (0, 0);
            // Read as they come: a busy machine makes more connections than the ring has room for.
            let mut read =
                || std::iter::from_fn(|| trace.next()).filter(|record| record.remote_port == 80).count();
            while !done.load(Ordering::Relaxed) {
                let dialled = app.dial(How::Tcp, to).expect("never refused");
                let accepted = tunnel.accept(listener);
                assert_eq!(accepted.original, Some(to));
                app.close(dialled.handle);
                tunnel.close(accepted.handle);
                count += 1;
                records += read();
            }
            (count, records)
        });
        for _ in 0..repeated(5) {
            let mut successor = Kernel::open(&bpffs.pins()).unwrap();
            successor.attach_pods(&cgroups.join("pods")).unwrap();
            successor.attach_tunnel(&cgroups.join("tunnel")).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        dialling.join().unwrap()
    });
    assert!(dialled > 0);
    assert_eq!(records, dialled);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn removing_leaves_nothing() {
    let mut rig = Rig::new();
    rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let links = pinned(&rig);
    let programs = programs_of(&links);
    let maps: BTreeSet<u32> = fs::read_dir(rig.bpffs.pins().join("maps"))
        .unwrap()
        .map(|entry| MapInfo::from_pin(entry.unwrap().path()).unwrap().id())
        .collect();
    let removed = Kernel::remove(&rig.bpffs.pins()).unwrap();
    assert_eq!((removed.links, removed.maps), (ALL_LINKS, 18));
    assert_eq!(rig.app.dial(How::Udp, at("10.99.0.2", 53)).map(|_| ()), Ok(()));
    rig.world.listen("0.0.0.0:8080");
    rig.app
        .dial(How::Tcp, at("10.99.0.2", 8080))
        .expect("no program decides any more, although we hold them");
    assert!(!rig.bpffs.path().join("adit").exists(), "no pin, no folder");
    assert_eq!(Kernel::remove(&rig.bpffs.pins()).unwrap(), adit_ebpf_loader::Removed::default());

    let Rig { kernel, trace, .. } = rig;
    drop((kernel, trace));
    wait_for("links, programs and maps are gone", || {
        loaded_links().filter_map(Result::ok).all(|link| !links.iter().any(|(_, id)| *id == link.id()))
            && aya::programs::loaded_programs()
                .filter_map(Result::ok)
                .all(|program| !programs.contains(&program.id()))
            && aya::maps::loaded_maps().filter_map(Result::ok).all(|map| !maps.contains(&map.id()))
    });
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn maps_hold_what_was_written() {
    let bpffs = Bpffs::new();
    let mut kernel = Kernel::open(&bpffs.pins()).unwrap();
    kernel.set_cgroup(5, &empty()).unwrap();
    kernel.remove_cgroup(5).unwrap();
    kernel.remove_cgroup(5).expect("missing is fine");
    kernel.remove_pod(address("10.0.0.1")).expect("missing is fine");
    assert_eq!(kernel.cgroups().unwrap(), []);
    kernel.unsteer(&[99].into()).expect("missing is fine");
}

/// Another build's map of another layout is replaced, the others are kept.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_map_of_another_layout_is_replaced() {
    let bpffs = Bpffs::new();
    let mut kernel = Kernel::open(&bpffs.pins()).unwrap();
    kernel.set_cgroup(5, &empty()).unwrap();
    drop(kernel);
    let maps = bpffs.pins().join("maps");
    fs::rename(maps.join(pin_name(&SETTINGS)), maps.join(pin_name(&POD_BY_ADDR))).unwrap();
    let kernel = Kernel::open(&bpffs.pins()).unwrap();
    assert_eq!(kernel.pods().unwrap(), []);
    assert_eq!(kernel.cgroups().unwrap(), [(5, empty())]);
}

/// An earlier build called some maps by other names: what only got a new name keeps its contents,
/// the rest goes.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_map_of_an_earlier_name_is_adopted() {
    let mut rig = Rig::new();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let maps = rig.bpffs.pins().join("maps");
    for (name, formerly) in [("tunnel_listeners", "listeners"), ("pinned_connections", "deliveries")] {
        fs::rename(maps.join(name), maps.join(formerly)).unwrap();
    }
    fs::rename(maps.join("app_listeners"), maps.join("listened")).unwrap();

    let successor = Kernel::open(&rig.bpffs.pins()).unwrap();
    drop(std::mem::replace(&mut rig.kernel, successor));
    rig.kernel.attach_pods(&rig.cgroups.join("pods")).unwrap();
    let to = at("192.0.2.1", 80);
    rig.app.dial(How::Tcp, to).expect("the tunnel's listener of before is still registered");
    assert_eq!(rig.tunnel.accept(tunnel).original, Some(to));
    let names: BTreeSet<_> =
        fs::read_dir(&maps).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.contains("app_listeners") && !names.contains("listened"), "{names:?}");
    assert_eq!(names.len(), 18, "{names:?}");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn attaching_elsewhere_detaches_here() {
    let mut rig = Rig::new();
    rig.kernel.attach_pods(&rig.cgroups.join("pods/plain")).unwrap();
    assert_eq!(pinned(&rig).len(), ALL_LINKS);
    rig.world.listen("0.0.0.0:8080");
    rig.app.dial(How::Tcp, at("10.99.0.2", 8080)).expect("not redirected any more");
    let tunnel_id = rig.cgroups.id("tunnel");
    rig.kernel.detach_tunnel(&rig.cgroups.join("tunnel"), tunnel_id).unwrap();
    rig.kernel.detach_tunnel(&rig.cgroups.join("tunnel"), tunnel_id).expect("missing is fine");
    assert_eq!(pinned(&rig).len(), 14 + 1);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn what_stands_in_the_way_is_named() {
    let (cgroups, bpffs) = (cgroups(), Bpffs::new());
    let mut object =
        EbpfLoader::new().load(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/adit.o"))).unwrap();
    let program: &mut aya::programs::CgroupSockAddr =
        object.program_mut("adit_connect4").unwrap().try_into().unwrap();
    program.load().unwrap();
    let root = File::open(cgroups.path()).unwrap();
    let fd = program.fd().unwrap();
    sys::attach_alone(root.as_fd(), fd.as_fd(), 10, true).unwrap();

    let mut kernel = Kernel::open(&bpffs.pins()).unwrap();
    let error = kernel.attach_pods(&cgroups.join("pods")).unwrap_err();
    assert!(matches!(error, KernelError::Forbidden { program: "adit_connect4", .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("(adit_connect4)") && text.contains(&*cgroups.path().to_string_lossy()), "{text}");

    let checks = preflight::checks(bpffs.path(), cgroups.path(), Some(&cgroups.join("pods")));
    let failed: Vec<_> = checks.iter().filter(|check| check.failed()).collect();
    assert!(failed.len() == 1 && failed[0].name == "other programs", "{checks:#?}");
    assert!(failed[0].found.contains("adit_connect4") && !failed[0].advice.is_empty());

    sys::attach_alone(root.as_fd(), fd.as_fd(), 10, false).unwrap();
    kernel.attach_pods(&cgroups.join("pods")).unwrap();
    assert!(preflight::checks(bpffs.path(), cgroups.path(), None).iter().all(|check| !check.failed()));
    Kernel::remove(&bpffs.pins()).unwrap();
}

/// Above the pods' cgroup it runs after ours (K11); at it or below it may hide what was dialled.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_load_balancer_is_named_and_minded_where_it_runs_first() {
    let (cgroups, bpffs) = (cgroups(), Bpffs::new());
    let check = |pods: &str| {
        let checks = preflight::checks(bpffs.path(), cgroups.path(), Some(&cgroups.join(pods)));
        checks.into_iter().find(|check| check.name == "socket load balancer").unwrap()
    };
    assert_eq!((check("pods").level, &*check("pods").found), (preflight::Level::Ok, "none"));
    let dir = File::open(cgroups.join("pods/mesh")).unwrap();
    let links = sys::attach_balancer(dir.as_fd(), [192, 0, 2, 77].into(), [10, 99, 0, 2].into()).unwrap();
    for (pods, level) in [
        ("pods", preflight::Level::Warn),
        ("pods/mesh", preflight::Level::Warn),
        ("pods/mesh/container", preflight::Level::Ok),
        ("world", preflight::Level::Ok),
    ] {
        let check = check(pods);
        assert_eq!(
            (check.level, check.found.contains("(balancer)")),
            (level, pods != "world"),
            "{pods}: {check:?}"
        );
    }
    drop(links);
    assert_eq!(check("pods").found, "none");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn preflight_says_what_is_missing() {
    let checks = preflight::checks("/proc".as_ref(), "/tmp".as_ref(), Some("/nonexistent".as_ref()));
    let missing: Vec<&str> = checks.iter().filter(|check| check.failed()).map(|check| check.name).collect();
    assert_eq!(missing, ["cgroup v2", "bpffs", "other programs"]);
    assert!(checks.iter().all(|check| (check.level == preflight::Level::Ok) == check.advice.is_empty()));
    let refused = Kernel::open("/tmp/adit-no-bpffs".as_ref());
    assert!(matches!(refused, Err(KernelError::NoBpffs { .. })));
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_trace_follows_its_filter() {
    let mut rig = Rig::new();
    rig.set(flag::IN_MESH, true);
    let mut settings = rig.kernel.settings().unwrap();
    for (port, address, seen) in
        [(0, [0; 16], 2), (81, [0; 16], 1), (0, address("192.0.2.2"), 1), (80, address("192.0.2.2"), 0)]
    {
        (settings.debug, settings.debug_port, settings.debug_address) = (1, port, address);
        rig.kernel.set_settings(&settings).unwrap();
        let _ = rig.app.dial(How::Tcp, at("192.0.2.1", 80));
        let _ = rig.app.dial(How::Tcp, at("192.0.2.2", 81));
        let records = std::iter::from_fn(|| rig.trace.next()).count();
        assert_eq!(records, seen, "port {port}");
    }
    settings.debug = 0;
    rig.kernel.set_settings(&settings).unwrap();
    let _ = rig.app.dial(How::Tcp, at("192.0.2.1", 80));
    assert!(rig.trace.next().is_none());
}

/// What nobody watches takes no room in the buffer: it is left out in the kernel.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_trace_reports_only_pods_that_are_watched_and_no_range_that_is_left_out() {
    let mut rig = Rig::new();
    rig.set(flag::IN_MESH, true);
    let mut settings = rig.kernel.settings().unwrap();
    (settings.debug, settings.debug_port, settings.debug_address) = (1, 0, [0; 16]);
    let mut seen = |rig: &mut Rig, filter: u16| -> Vec<String> {
        settings.trace_filter = filter;
        rig.kernel.set_settings(&settings).unwrap();
        let _ = rig.app.dial(How::Tcp, at("192.0.2.1", 80));
        let _ = rig.app.dial(How::Tcp, at("192.0.2.2", 80));
        let _ = rig.app.dial(How::Tcp, at("2001:db8::1", 80));
        let records = std::iter::from_fn(|| rig.trace.next());
        records.map(|record| Ipv6Addr::from(record.remote).to_canonical().to_string()).collect()
    };
    let (one, two, three) = ("192.0.2.1", "192.0.2.2", "2001:db8::1");
    assert_eq!(seen(&mut rig, 0), [one, two, three]);
    assert_eq!(seen(&mut rig, WATCHED), [""; 0], "nobody is watched");
    let own = rig.cgroups.id("pods/mesh/container");
    for (key, reported) in [
        (watched_cgroup(own), &[one, two, three][..]),
        (watched_cgroup(own + 1), &[]),
        (watched_netns(rig.cookie), &[one, two, three]),
        (watched_netns(rig.cookie + 1), &[]),
        (address(two), &[two]),
        (address(three), &[three]),
    ] {
        rig.kernel.watch(&key, true).unwrap();
        assert_eq!(seen(&mut rig, WATCHED), reported, "{key:?}");
        rig.kernel.watch(&key, false).unwrap();
        rig.kernel.watch(&key, false).unwrap();
    }
    for (range, length, reported) in [
        ("192.0.2.2", 128, &[one, three][..]),
        ("192.0.2.0", 96 + 24, &[three]),
        ("2001:db8::", 32, &[one, two]),
    ] {
        rig.kernel.leave_out(address(range), length, true).unwrap();
        assert_eq!(seen(&mut rig, LEFT_OUT), reported, "{range}/{length}");
        rig.kernel.leave_out(address(range), length, false).unwrap();
    }
    assert_eq!(seen(&mut rig, LEFT_OUT), [one, two, three]);
}

/// The pins of links, with the links' ids.
fn pinned(rig: &Rig) -> BTreeSet<(String, u32)> {
    fs::read_dir(rig.bpffs.pins().join("links"))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let link = aya::programs::links::PinnedLink::from_pin(&path).unwrap();
            let id = aya::programs::links::FdLink::from(link).info().unwrap().id();
            (path.file_name().unwrap().to_string_lossy().into_owned(), id)
        })
        .collect()
}

fn programs_of(links: &BTreeSet<(String, u32)>) -> BTreeSet<u32> {
    loaded_links()
        .filter_map(Result::ok)
        .filter(|link| links.iter().any(|(_, id)| *id == link.id()))
        .map(|link| link.program_id())
        .collect()
}
