//! No packet in clear: an attacker's view of two nodes on which everything comes, goes and breaks.
//!
//! [`Rig`](rig::Rig) has real watchers, real tunnels and pods whose programs dial and serve without
//! a pause. One node reads a pods file, the other one follows an API server. The rig takes random
//! [steps](steps::Step) and captures what leaves each pod. The
//! [`Judge`](judge::Judge) says what must never be seen:
//!
//! * A packet in clear of a pod that must be closed. That is any packet of the pod's own sockets on
//!   its veth, and anything else from there that opens a connection or carries data, unless it is
//!   HBONE. A pod must be closed from the creation of its cgroup on if a watcher knew it before,
//!   else from when a watcher reports it as open; until its label is taken off. Connections that
//!   began while it need not be closed may go on.
//! * A connection past the policy. All enrolled pods are under a strict policy. So a client without
//!   an identity must not hear from the application, and the application must not accept it,
//!   whichever address of the pod's netns was dialled.
//!
//! What stays in the pod's netns is not seen: the tunnel's deliveries to the application, and
//! connections to the loopback or to the pod itself.

mod api;
mod files;
mod findings;
mod flips;
mod judge;
mod life;
mod network;
mod node;
mod rig;
mod size;
mod steps;
mod tamper;

use std::fs;

use testbed::{program::TestSize, wait::wait_for};

use self::{
    flips::Flips,
    life::Mode,
    rig::{Rig, Role},
    size::Size,
};

/// The short form takes some 30 s. `ADIT_CLEAR_STARTS`, `…_KILLS`, `…_BOOTS` and `…_SEED` make it
/// long, or the same once more. `ADIT_CLEAR_OTHER_WATCHER` and `…_OTHER_TUNNEL` name programs of
/// another build, such as the release before: each start then changes the build.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn no_packet_in_clear() {
    let size = Size::get();
    let mut rig = Rig::with_api(size.seed);
    while let Some(next) = rig.next_step(&size) {
        rig.step(next);
    }
    rig.settle();
    eprintln!("{}", rig.summary());
}

/// The rig finds what it is made to find: a pod that chose *open*, taken for a closed one.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_rig_sees_the_packets_of_an_open_pod() {
    let mut rig = Rig::new(1);
    let open = rig.start_pod(0, Mode::Open);
    rig.wait_open(open);
    rig.expect_closed(open);
    rig.stop_tunnels(0);
    let found = wait_for("a packet in clear", || rig.find());
    assert!(found.contains("in clear") && found.contains("closed since"), "{found}");
}

/// The same with a link of the kernel programs that somebody removed.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_rig_sees_that_a_link_is_gone() {
    let mut rig = Rig::new(2);
    let links = rig.pins(0).join("links");
    let mut removed = 0;
    for link in fs::read_dir(&links).expect("links").flatten() {
        let name = link.file_name().to_string_lossy().into_owned();
        if name.contains("connect") {
            fs::remove_file(link.path()).expect("a link");
            removed += 1;
        }
    }
    assert!(removed > 0, "{:?}", fs::read_dir(&links).expect("links").flatten().collect::<Vec<_>>());
    let found = wait_for("a packet in clear", || rig.find());
    assert!(found.contains("in clear"), "{found}");
}

/// The same without the policy.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_rig_sees_who_gets_past_the_policy() {
    let mut rig = Rig::new(3);
    rig.lift_policy();
    let found = wait_for("somebody past the policy", || rig.find());
    assert!(found.contains("past the policy") || found.contains("in clear"), "{found}");
    assert!(rig.is_fixed(Role::Server));
}

/// Clients of servers in the mesh, under the load of all the others.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn labels_under_load_let_nothing_out_after_the_first_captured_connection() {
    let mut rig = Rig::new(4);
    let flips = rig.flip(TestSize::get().pick(4, 12), TestSize::get().pick(5, 50));
    let Flips { attempts, captured, same_port, slowest, .. } = &flips;
    eprintln!(
        "{attempts} connections, {captured} captured, {same_port} of those seen to come from the client's own \
         port; the slowest took {slowest} us"
    );
    assert!(flips.captured > 0);
    assert!(flips.late.is_empty(), "{:#?}", flips.late);
    assert!(flips.hung.is_empty(), "{:#?}\n{}", flips.hung, rig.failures());
}
