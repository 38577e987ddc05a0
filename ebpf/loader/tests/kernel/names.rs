//! DNS queries of pods: whose go to the tunnel, and whom the answers come from.

use adit_ebpf_common::{
    pods::{ExcludedPort, OUTBOUND as DIALS, flag},
    trace::{Hook, Rule},
};

use crate::bench::{Bench, NAMES, READY, address, agent::How, at};

const CAPTURED: u32 = READY | flag::NAMES;

/// What the tunnel listens on in the pod: TCP, then UDP, of both families.
struct Served {
    tcp: [u32; 2],
    udp: [u32; 2],
}

fn serve(bench: &mut Bench) -> Served {
    let [v4, v6] = [format!("127.0.0.1:{NAMES}"), format!("[::1]:{NAMES}")];
    let udp = [bench.tunnel.bind_udp(&v4), bench.tunnel.bind_udp(&v6)];
    Served { tcp: [bench.tunnel.listen(&v4), bench.tunnel.listen(&v6)], udp }
}

/// The resolver's address, what the application's socket is bound to, and the hooks that see it sent and connected.
const CALLS: [(&str, &str, Hook, Hook); 3] = [
    ("10.99.0.2", "0.0.0.0:0", Hook::Sendmsg4, Hook::Connect4),
    ("fd99::2", "[::]:0", Hook::Sendmsg6, Hook::Connect6),
    // The kernel sends it as IPv4, and connects and receives it as IPv6.
    ("::ffff:10.99.0.2", "[::]:0", Hook::Sendmsg4, Hook::Connect6),
];

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn queries_go_to_the_tunnel_and_answers_come_from_the_resolver() {
    let mut bench = Bench::new();
    bench.set(CAPTURED, true);
    let served = serve(&mut bench);
    for (resolver, own, sends, connects) in CALLS {
        let to = at(resolver, 53);
        let family = usize::from(resolver == "fd99::2");
        bench.rules(53);

        let socket = bench.app.bind_udp(own);
        bench.app.send(socket, Some(to), "query");
        let (client, word) = bench.tunnel.receive(served.udp[family]);
        assert_eq!((word.as_str(), bench.rules(53)), ("query", vec![(sends, Rule::Names)]), "{to}");
        bench.tunnel.send(served.udp[family], Some(client), "answer");
        assert_eq!(bench.app.receive(socket), (to, "answer".to_owned()), "{to} unconnected");

        let connected = bench.app.dial(How::Udp, to).unwrap();
        assert_eq!((connected.peer, bench.rules(53)), (to, vec![(connects, Rule::Names)]));
        bench.app.send(connected.handle, None, "query");
        let (client, _) = bench.tunnel.receive(served.udp[family]);
        bench.tunnel.send(served.udp[family], Some(client), "answer");
        assert_eq!(bench.app.receive(connected.handle), (to, "answer".to_owned()), "{to} connected");

        let stream = bench.app.dial(How::Tcp, to).unwrap();
        assert_eq!((stream.peer, bench.rules(53)), (to, vec![(connects, Rule::Names)]));
        bench.tunnel.accept(served.tcp[family]);
    }
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn whatever_is_not_captured_reaches_the_resolver_itself() {
    let mut bench = Bench::new();
    bench.kernel.exclude_port(&ExcludedPort { policy_id: 8, port: 53, direction: DIALS }).unwrap();
    serve(&mut bench);
    let resolver = bench.world.bind_udp("[::]:53");
    let elsewhere = bench.world.bind_udp("[::]:5353");
    let local = bench.app.bind_udp("127.0.0.1:53");
    let socket = bench.app.bind_udp("0.0.0.0:0");
    let reaches = |bench: &mut Bench, why: &str| {
        bench.rules(53);
        for how in ["sent", "connected"] {
            let to = at("10.99.0.2", 53);
            let own = if how == "sent" { None } else { Some(bench.app.dial(How::Udp, to).unwrap()) };
            let (handle, to) = own.map_or((socket, Some(to)), |own| (own.handle, None));
            bench.app.send(handle, to, "query");
            let (client, _) = bench.world.receive(resolver);
            bench.world.send(resolver, Some(client), "answer");
            let (from, _) = bench.app.receive(handle);
            assert_eq!((from, bench.rules(53)), (at("10.99.0.2", 53), vec![]), "{why}, {how}");
        }
    };
    for (flags, up, why) in [
        (READY, true, "not asked for"),
        (flag::NAMES, true, "not enrolled"),
        (CAPTURED | flag::SIDECAR, true, "a sidecar's"),
        (CAPTURED, false, "no tunnel is connected"),
        (flag::IN_MESH | flag::NAMES | flag::FAIL_OPEN, true, "the pod is not ready"),
        (flag::IN_MESH | flag::NAMES, true, "DNS is open where the pod is closed"),
    ] {
        bench.set(flags, up);
        reaches(&mut bench, why);
    }
    bench.resolvers = [address("10.99.0.9"), address("fd99::2"), [0; 16]];
    bench.set(CAPTURED, true);
    reaches(&mut bench, "another resolver's are captured");

    bench.resolvers = [[0; 16]; 3];
    bench.set(CAPTURED, true);
    bench.app.send(socket, Some(at("10.99.0.2", 5353)), "other-port");
    assert_eq!(bench.world.receive(elsewhere).1, "other-port");
    bench.app.send(socket, Some(at("127.0.0.1", 53)), "own-resolver");
    assert_eq!(bench.app.receive(local).1, "own-resolver");
    bench.kernel.exclude_cidr(7, 128, address("10.99.0.2")).unwrap();
    reaches(&mut bench, "excluded by CIDR");
    bench.kernel.clear_policy(7).unwrap();
    bench.kernel.exclude_port(&ExcludedPort { policy_id: 7, port: 53, direction: DIALS }).unwrap();
    reaches(&mut bench, "excluded by port");
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn named_resolvers_are_captured_and_a_tunnel_that_goes_gives_them_back() {
    let mut bench = Bench::new();
    bench.resolvers = [address("10.99.0.9"), address("10.99.0.2"), [0; 16]];
    bench.set(CAPTURED, true);
    let served = serve(&mut bench);
    let resolver = bench.world.bind_udp("[::]:53");
    let socket = bench.app.bind_udp("0.0.0.0:0");
    let to = at("10.99.0.2", 53);
    bench.app.send(socket, Some(to), "first");
    assert_eq!(bench.tunnel.receive(served.udp[0]).1, "first");

    // Nobody told the programs: the listener is gone. The same socket goes on.
    bench.tunnel.close(served.tcp[0]);
    bench.app.send(socket, Some(to), "second");
    let (client, word) = bench.world.receive(resolver);
    assert_eq!(word, "second");
    bench.world.send(resolver, Some(client), "answer");
    assert_eq!(bench.app.receive(socket), (to, "answer".to_owned()));

    let again = bench.tunnel.listen(&format!("127.0.0.1:{NAMES}"));
    bench.app.send(socket, Some(to), "third");
    assert_eq!(bench.tunnel.receive(served.udp[0]).1, "third");
    bench.tunnel.close(again);
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_socket_that_connects_elsewhere_shows_the_truth_again() {
    let mut bench = Bench::new();
    bench.set(CAPTURED, true);
    serve(&mut bench);
    let query = bench.app.dial(How::Udp, at("10.99.0.2", 53)).unwrap();
    // To the tunnel's port in its own name, which nothing redirects.
    let direct = bench.app.redial(query.handle, at("127.0.0.1", NAMES)).unwrap();
    assert_eq!(direct.peer, at("127.0.0.1", NAMES));
}
