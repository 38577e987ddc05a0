//! What the programs remember of connections, for how long, and what they count.

use std::{fs, path::Path};

use adit_ebpf_common::{
    enrolment::flag,
    flows::{ACK_LIFETIME, Flow, Original, TunnelFlow},
    maps::{KUBELET_FLOWS, MapSpec, ORIGINAL_DST, TUNNEL_FLOWS},
    sealed::Sealed,
    trace::{Hook, Rule},
};
use adit_ebpf_loader::pin_name;
use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};

use testbed::wait::wait_for;

use crate::rig::{HBONE, INBOUND, OUTBOUND, READY, Rig, add_address, address, agent::How, at};

/// The pinned map of flows.
fn open<V>(pins: &Path, map: &MapSpec) -> HashMap<MapData, Flow, Sealed<V>>
where
    Sealed<V>: Pod,
{
    let data = MapData::from_pin(pins.join("maps").join(pin_name(map))).unwrap();
    HashMap::try_from(Map::from_map_data(data).unwrap()).unwrap()
}

/// A reused port must neither find another's destination nor pass as the tunnel's.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn nothing_is_remembered_of_closed_connections() {
    let mut rig = Rig::new();
    let pins = rig.bpffs.pins();
    let originals = || open::<Original>(&pins, &ORIGINAL_DST).keys().count();
    let flows = || open::<TunnelFlow>(&pins, &TUNNEL_FLOWS).keys().count();
    let tunnel = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let dialled = rig.app.dial(How::Tcp, at("192.0.2.1", 80)).unwrap();
    let accepted = rig.tunnel.accept(tunnel);
    assert_eq!(originals(), 0, "moved into the accepted socket");
    rig.app.close(dialled.handle);
    rig.tunnel.close(accepted.handle);

    rig.tunnel.close(tunnel);
    // It counts for both families, but does not take this one.
    let other = rig.tunnel.listen(&format!("[fd99::1]:{OUTBOUND}"));
    assert_eq!(rig.app.dial(How::Tcp, at("192.0.2.1", 80)).unwrap_err(), libc::ECONNREFUSED);
    rig.tunnel.close(other);
    assert_eq!(originals(), 0, "withdrawn: it was not taken");

    let world = rig.world.listen("[::]:8080");
    let flow = rig.tunnel.dial(How::Tcp, at("10.99.0.2", 8080)).unwrap();
    assert_eq!(flows(), 1);
    rig.tunnel.close(flow.handle);
    // Resets its side, which was never accepted: a socket that waits for the other's end may do so
    // for a minute.
    rig.world.close(world);
    wait_for("closed flows are forgotten", || flows() == 0);
}

/// The end of a tunnel's connection may go unseen, and a connection may stay half open for an hour.
/// Whoever has its ports then must not reach the application as if it were the tunnel.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_tunnels_flow_passes_during_its_handshake_only() {
    let mut rig = Rig::new();
    let pins = rig.bpffs.pins();
    let valid_until = || {
        let entries = open::<TunnelFlow>(&pins, &TUNNEL_FLOWS);
        let opened = entries.iter().map(|entry| {
            let (flow, sealed) = entry.unwrap();
            sealed.open(&flow).expect("the seal of its flow").valid_until
        });
        opened.max()
    };
    // Of CLOCK_BOOTTIME, in steps of 10 ms; no machine is suspended during a test.
    let now = || {
        let text = fs::read_to_string("/proc/uptime").unwrap();
        let centiseconds: u64 = text.split(' ').next().unwrap().replace('.', "").parse().unwrap();
        centiseconds * 10_000_000
    };
    let app = rig.app.listen("[::]:8080");
    let plain = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    let own = at("10.99.0.1", 8080);
    // The client's address, which the tunnel speaks from.
    add_address(&rig.app, "10.99.0.77");
    let dialled = rig.tunnel.dial_from(at("10.99.0.77", 0), own).unwrap();
    assert_eq!(rig.rules(8080).last(), Some(&(Hook::SkLookup, Rule::NotedFlow)));
    let accepted = rig.app.accept(app);
    let until = valid_until().expect("the flow is recorded");
    assert!(until <= now() + ACK_LIFETIME + 10_000_000, "it is established, and passes no longer than that");

    // As when the tunnel's programs are gone before its sockets.
    rig.kernel.detach_tunnel(&rig.cgroups.join("tunnel"), rig.cgroups.id("tunnel")).unwrap();
    rig.app.close(accepted.handle);
    rig.tunnel.close(dialled.handle);
    wait_for("the end of the handshake's time", || now() > until);
    rig.rules(8080);
    wait_for("the ports to be free", || rig.app.dial_from(dialled.local, own).is_ok());
    assert_eq!(rig.rules(8080).last(), Some(&(Hook::SkLookup, Rule::SteerPlain)));
    assert!(rig.app.is_idle(app), "the application got it");
    rig.tunnel.accept(plain);
}

/// Probes pass, whatever the tunnel does, and nobody else's connections from the same address.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn what_the_kubelet_opens_passes_and_what_its_neighbours_open_does_not() {
    let mut rig = Rig::new();
    let pins = rig.bpffs.pins();
    let recorded = || open::<TunnelFlow>(&pins, &KUBELET_FLOWS).keys().count();
    // The kubelet's cgroup is that of the world; its neighbour on the node has the same address.
    rig.kernel.attach_kubelet(Some(&rig.cgroups.join("world"))).unwrap();
    let app = rig.app.listen("[::]:8080");
    rig.set(READY & !flag::READY, false);
    for own in [at("10.99.0.1", 8080), at("fd99::1", 8080)] {
        let probe = rig.world.dial(How::Tcp, own).unwrap();
        let accepted = rig.app.accept(app);
        assert_eq!(rig.rules(8080), [(Hook::SkLookup, Rule::Kubelet)]);
        assert_eq!(recorded(), 1);
        let refused = rig.plain.dial(How::Tcp, own);
        assert_eq!(refused.unwrap_err(), libc::ECONNREFUSED);
        assert_eq!(rig.rules(8080).last(), Some(&(Hook::SkLookup, Rule::FailClosed)));
        rig.app.close(accepted.handle);
        rig.world.close(probe.handle);
        wait_for("the probe's flow to be forgotten", || recorded() == 0);
    }
    // The kubelet is elsewhere now.
    rig.kernel.attach_kubelet(Some(&rig.cgroups.join("pods/plain"))).unwrap();
    assert_eq!(rig.world.dial(How::Tcp, at("10.99.0.1", 8080)).unwrap_err(), libc::ECONNREFUSED);
    assert!(rig.plain.dial(How::Tcp, at("10.99.0.1", 8080)).is_ok());
    rig.kernel.attach_kubelet(None).unwrap();
    assert_eq!(rig.plain.dial(How::Tcp, at("10.99.0.1", 8080)).unwrap_err(), libc::ECONNREFUSED);
}

/// What needs the netns prepared although its pod left: the tunnel's connections that speak from an
/// address that is not, or not any more, the pod's.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn connections_that_speak_as_others_are_counted_until_they_close() {
    let mut rig = Rig::new();
    let cookie = rig.kernel.pods().unwrap()[0].1.netns_cookie;
    for (own, away) in [("10.99.0.1", "10.99.0.2"), ("fd99::1", "fd99::2")] {
        let world = rig.world.listen("[::]:8080");
        let as_the_pod = rig.tunnel.dial(How::Tcp, at(away, 8080)).unwrap();
        assert_eq!(rig.kernel.pinned_connections(cookie).unwrap(), 0);
        rig.kernel.remove_pod(address(own)).unwrap();
        let others = [(); 3].map(|()| rig.tunnel.dial(How::Tcp, at(away, 8080)).unwrap());
        assert_eq!(rig.kernel.pinned_connections(cookie).unwrap(), 3);
        for other in others.into_iter().chain([as_the_pod]) {
            rig.tunnel.close(other.handle);
        }
        rig.world.close(world);
        wait_for("none is left", || rig.kernel.pinned_connections(cookie).unwrap() == 0);
    }
    rig.kernel.forget_pinned_connections(cookie).unwrap();
    rig.kernel.forget_pinned_connections(cookie).expect("missing is fine");
}

/// The tunnel dials the application for these, maybe only when the pod has left.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn connections_to_a_pod_are_counted_until_they_close_accepted_or_not() {
    let mut rig = Rig::new();
    let cookie = rig.kernel.pods().unwrap()[0].1.netns_cookie;
    let (plain, hbone) =
        (rig.tunnel.listen(&format!("[::]:{INBOUND}")), rig.tunnel.listen(&format!("[::]:{HBONE}")));
    let counted = |rig: &Rig| rig.kernel.pinned_connections(cookie).unwrap();
    let mut count = 0;
    for to in [at("10.99.0.1", 8080), at("fd99::1", 8080), at("10.99.0.1", HBONE), at("fd99::1", HBONE)] {
        let dialled = rig.world.dial(How::Tcp, to).unwrap();
        count += 1;
        wait_for("it is counted", || counted(&rig) == count);
        let listener = if to.port() == HBONE { hbone } else { plain };
        if to.is_ipv4() {
            let accepted = rig.tunnel.accept(listener);
            rig.tunnel.close(accepted.handle);
            rig.world.close(dialled.handle);
            count -= 1;
            wait_for("it is not any more", || counted(&rig) == count);
        }
    }
    let outbound = rig.tunnel.listen(&format!("[::]:{OUTBOUND}"));
    let dialled = rig.app.dial(How::Tcp, at("192.0.2.1", 80)).unwrap();
    rig.tunnel.accept(outbound);
    assert_eq!(counted(&rig), 2, "what the pod dials speaks as the pod");
    rig.app.close(dialled.handle);
    rig.tunnel.close(plain);
    rig.tunnel.close(hbone);
    wait_for("connections that were not accepted to be gone", || counted(&rig) == 0);
}

/// The mark routes answers back to the host: a connection that does not spend the client's address,
/// or a listener, must not have it.
#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn the_tunnels_mark_stays_on_the_last_hop() {
    let mut rig = Rig::new();
    rig.tunnel.mark(0x539);
    rig.app.listen("[::]:8080");
    let inbound = rig.tunnel.listen(&format!("[::]:{INBOUND}"));
    rig.world.listen("[::]:8080");
    for (own, away) in [("10.99.0.1", "10.99.0.2"), ("fd99::1", "fd99::2")] {
        assert_eq!(rig.tunnel.dial(How::Tcp, at(away, 8080)).unwrap().mark, 0);
        assert_eq!(rig.tunnel.dial_from(at(own, 0), at(own, 8080)).unwrap().mark, 0x539);
        rig.world.dial(How::Tcp, at(own, 8080)).unwrap();
        assert_eq!(rig.tunnel.accept(inbound).mark, 0);
    }
    rig.app.mark(0x539);
    assert_eq!(
        rig.app.dial(How::Tcp, at("127.0.0.1", 8080)).unwrap().mark,
        0x539,
        "others' marks are theirs"
    );
}
