//! DNS queries of pods: whose go to the tunnel, and whom the answers come from.

use adit_ebpf_common::{
    enrolment::flag,
    exclusions::OUTBOUND as DIALS,
    trace::{Hook, Rule},
};
use adit_ebpf_loader::ExclusionList;

use crate::rig::{DNS, READY, Rig, address, agent::How, at};

const CAPTURED: u32 = READY | flag::DNS_CAPTURE;

/// What the tunnel listens on in the pod: TCP, then UDP, of both families.
struct Served {
    tcp: [u32; 2],
    udp: [u32; 2],
}

fn serve(rig: &mut Rig) -> Served {
    let [v4, v6] = [format!("127.0.0.1:{DNS}"), format!("[::1]:{DNS}")];
    let udp = [rig.tunnel.bind_udp(&v4), rig.tunnel.bind_udp(&v6)];
    Served { tcp: [rig.tunnel.listen(&v4), rig.tunnel.listen(&v6)], udp }
}

/// The resolver's address, what the application's socket is bound to, and the hooks that see it
/// sent and connected.
const CALLS: [(&str, &str, Hook, Hook); 3] = [
    ("10.99.0.2", "0.0.0.0:0", Hook::Sendmsg4, Hook::Connect4),
    ("fd99::2", "[::]:0", Hook::Sendmsg6, Hook::Connect6),
    // The kernel sends it as IPv4, and connects and receives it as IPv6.
    ("::ffff:10.99.0.2", "[::]:0", Hook::Sendmsg4, Hook::Connect6),
];

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn queries_go_to_the_tunnel_and_answers_come_from_the_resolver() {
    let mut rig = Rig::new();
    rig.set(CAPTURED, true);
    let served = serve(&mut rig);
    for (resolver, own, sends, connects) in CALLS {
        let to = at(resolver, 53);
        let family = usize::from(resolver == "fd99::2");
        rig.rules(53);

        let socket = rig.app.bind_udp(own);
        rig.app.send(socket, Some(to), "query");
        let (client, word) = rig.tunnel.receive(served.udp[family]);
        assert_eq!((word.as_str(), rig.rules(53)), ("query", vec![(sends, Rule::DnsRedirect)]), "{to}");
        rig.tunnel.send(served.udp[family], Some(client), "answer");
        assert_eq!(rig.app.receive(socket), (to, "answer".to_owned()), "{to} unconnected");
        let asked = std::net::SocketAddr::new(to.ip().to_canonical(), 53);
        assert_eq!(rig.tunnel.dial(How::Udp, client).unwrap().peer, asked, "the tunnel can ask the same");
        assert_eq!(rig.app.dial(How::Udp, client).unwrap().peer, client, "nobody else is told");

        let connected = rig.app.dial(How::Udp, to).unwrap();
        assert_eq!((connected.peer, rig.rules(53)), (to, vec![(connects, Rule::DnsRedirect)]));
        rig.app.send(connected.handle, None, "query");
        let (client, _) = rig.tunnel.receive(served.udp[family]);
        assert_eq!(rig.tunnel.dial(How::Udp, client).unwrap().peer, asked, "{to} connected");
        rig.tunnel.send(served.udp[family], Some(client), "answer");
        assert_eq!(rig.app.receive(connected.handle), (to, "answer".to_owned()), "{to} connected");
        rig.app.close(connected.handle);
        assert_eq!(rig.tunnel.dial(How::Udp, client).unwrap().peer, client, "who is gone has asked nobody");

        let stream = rig.app.dial(How::Tcp, to).unwrap();
        assert_eq!((stream.peer, rig.rules(53)), (to, vec![(connects, Rule::DnsRedirect)]));
        rig.tunnel.accept(served.tcp[family]);
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn whatever_is_not_captured_reaches_the_resolver_itself() {
    let mut rig = Rig::new();
    let port = ExclusionList::default().with_ports(DIALS, 53..=53);
    rig.kernel.add_exclusions(8, &port).unwrap();
    serve(&mut rig);
    let resolver = rig.world.bind_udp("[::]:53");
    let elsewhere = rig.world.bind_udp("[::]:5353");
    let local = rig.app.bind_udp("127.0.0.1:53");
    let socket = rig.app.bind_udp("0.0.0.0:0");
    let reaches = |rig: &mut Rig, why: &str| {
        rig.rules(53);
        for how in ["sent", "connected"] {
            let to = at("10.99.0.2", 53);
            let own = if how == "sent" { None } else { Some(rig.app.dial(How::Udp, to).unwrap()) };
            let (handle, to) = own.map_or((socket, Some(to)), |own| (own.handle, None));
            rig.app.send(handle, to, "query");
            let (client, _) = rig.world.receive(resolver);
            rig.world.send(resolver, Some(client), "answer");
            let (from, _) = rig.app.receive(handle);
            assert_eq!((from, rig.rules(53)), (at("10.99.0.2", 53), vec![]), "{why}, {how}");
        }
    };
    for (flags, up, why) in [
        (READY, true, "not asked for"),
        (flag::DNS_CAPTURE, true, "not enrolled"),
        (CAPTURED | flag::SIDECAR, true, "a sidecar's"),
        (CAPTURED, false, "no tunnel is connected"),
        (flag::IN_MESH | flag::DNS_CAPTURE | flag::FAIL_OPEN, true, "the pod is not ready"),
        (flag::IN_MESH | flag::DNS_CAPTURE, true, "DNS is open where the pod is closed"),
    ] {
        rig.set(flags, up);
        reaches(&mut rig, why);
    }
    rig.resolvers = [address("10.99.0.9"), address("fd99::2"), [0; 16]];
    rig.set(CAPTURED, true);
    reaches(&mut rig, "another resolver's are captured");

    rig.resolvers = [[0; 16]; 3];
    rig.set(CAPTURED, true);
    rig.app.send(socket, Some(at("10.99.0.2", 5353)), "other-port");
    assert_eq!(rig.world.receive(elsewhere).1, "other-port");
    rig.app.send(socket, Some(at("127.0.0.1", 53)), "own-resolver");
    assert_eq!(rig.app.receive(local).1, "own-resolver");
    let cidr = ExclusionList::default().with_cidr(address("10.99.0.2"), 128);
    rig.kernel.add_exclusions(7, &cidr).unwrap();
    reaches(&mut rig, "excluded by CIDR");
    rig.kernel.remove_exclusions(7, &cidr).unwrap();
    rig.kernel.add_exclusions(7, &port).unwrap();
    reaches(&mut rig, "excluded by port");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn named_resolvers_are_captured_and_a_tunnel_that_goes_gives_them_back() {
    let mut rig = Rig::new();
    rig.resolvers = [address("10.99.0.9"), address("10.99.0.2"), [0; 16]];
    rig.set(CAPTURED, true);
    let served = serve(&mut rig);
    let resolver = rig.world.bind_udp("[::]:53");
    let socket = rig.app.bind_udp("0.0.0.0:0");
    let to = at("10.99.0.2", 53);
    rig.app.send(socket, Some(to), "first");
    assert_eq!(rig.tunnel.receive(served.udp[0]).1, "first");

    // The programs get no notice except that the listener is gone. The same socket goes on.
    rig.tunnel.close(served.tcp[0]);
    rig.app.send(socket, Some(to), "second");
    let (client, word) = rig.world.receive(resolver);
    assert_eq!(word, "second");
    rig.world.send(resolver, Some(client), "answer");
    assert_eq!(rig.app.receive(socket), (to, "answer".to_owned()));

    let again = rig.tunnel.listen(&format!("127.0.0.1:{DNS}"));
    rig.app.send(socket, Some(to), "third");
    assert_eq!(rig.tunnel.receive(served.udp[0]).1, "third");
    rig.tunnel.close(again);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_socket_that_connects_elsewhere_shows_the_truth_again() {
    let mut rig = Rig::new();
    rig.set(CAPTURED, true);
    serve(&mut rig);
    let query = rig.app.dial(How::Udp, at("10.99.0.2", 53)).unwrap();
    // To the tunnel's port in its own name, which nothing redirects.
    let direct = rig.app.redial(query.handle, at("127.0.0.1", DNS)).unwrap();
    assert_eq!(direct.peer, at("127.0.0.1", DNS));
}
