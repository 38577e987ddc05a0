//! Facts at random, installed in the maps: the programs and the lists over plain values agree on
//! every rule and verdict.

use std::cell::RefCell;

use adit_ebpf_common::{
    decide::{Arrival, Connect, Inbound, Outbound, inbound, outbound, plain::PlainFacts},
    enrolment::{CgroupInfo, NetnsInfo, PodRecord, flag},
    exclusions::{CidrPrefix, INBOUND as IS_DIALLED, Listed, OUTBOUND as DIALS, PortPrefix},
    flows::{Destination, Flow},
    listeners::{AppListenerState, ListenerKey},
    trace::Rule,
};
use adit_ebpf_loader::ExclusionList;
use proptest::{prelude::*, sample::select, test_runner::TestRunner};

use crate::rig::{DNS, HBONE, INBOUND, OUTBOUND, Rig, address, agent::How, at, empty, repeated};

/// The pod's own first and second, the other end's, and addresses that nobody has. The second ones
/// are not assigned to the pod: what matters here is the verdict.
const V4: [&str; 6] = ["10.99.0.1", "10.99.0.11", "10.99.0.2", "192.0.2.1", "127.0.0.1", "10.99.0.9"];
const V6: [&str; 6] = ["fd99::1", "fd99::11", "fd99::2", "2001:db8::1", "::1", "fe80::99:9"];
const PORTS: [u16; 8] = [53, 80, 81, 6379, OUTBOUND, INBOUND, HBONE, DNS];
/// The one that the pod has, and another pod's.
const EXCLUSIONS: [u32; 2] = [7, 8];
const ELSEWHERE: u64 = 1;

/// What the maps hold, and a connection each way.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own, drawn at random")]
struct Case {
    flags: u32,
    detected: u32,
    enrolled: bool,
    netns_known: bool,
    /// The netns that the pod's entry names: the socket's own, none, another one.
    entry_netns: Option<u64>,
    tunnel_up: bool,
    exclusion_id: u32,
    has_v6: bool,
    /// The netns of the second addresses' records: none, the pod's, another one.
    second: Option<bool>,
    listens: [bool; 4],
    listed_ports: Vec<(u32, PortPrefix, Listed)>,
    listed_cidrs: Vec<(u32, CidrPrefix, Listed)>,
    /// List, kind and number. The application's are 0.
    excluded_ids: Vec<(u32, u32, u32)>,
    resolver: Option<&'static str>,
    app_listeners: Vec<(u16, bool)>,
    complete: Option<bool>,
    is_v4: bool,
    to: (usize, u16),
    arrives_at: u16,
}

fn listed() -> impl Strategy<Value = Listed> {
    prop_oneof![
        4 => Just(Listed::EXCLUDED),
        1 => Just(Listed::OUTSIDE),
        1 => Just(Listed::INCLUDED),
        1 => Just(Listed::BY_ROUTE),
    ]
}

fn cases() -> impl Strategy<Value = Case> {
    let likely = || prop::bool::weighted(0.8);
    let rarely = || prop::bool::weighted(0.1);
    let bits = (likely(), likely(), any::<[bool; 4]>(), [rarely(), rarely()]);
    let flags = bits.prop_map(|(enrolled, ready, [open, dns, spread, guards_ids], [sidecar, guarded])| {
        [
            (enrolled, flag::IN_MESH),
            (ready, flag::READY),
            (open, flag::FAIL_OPEN),
            (dns, flag::DNS_CAPTURE),
            (spread, flag::SPREAD),
            (sidecar, flag::SIDECAR),
            (guards_ids, flag::GUARDS_IDS),
            (guarded, flag::GUARDED),
        ]
        .into_iter()
        .filter_map(|(set, bit)| set.then_some(bit))
        .sum::<u32>()
    });
    // Whole families, and ranges of IPv6 that have the mapped form of IPv4 as far as bits go.
    let cidrs = select(vec![
        (true, "10.99.0.0", 96 + 24),
        (true, "192.0.2.0", 96 + 24),
        (true, "0.0.0.0", 96),
        (false, "fd99::", 64),
        (false, "::", 0),
        (false, "::", 1),
        (false, "::", 80),
        (false, "::ffff:0:0", 96),
    ])
    .prop_map(|(is_v4, first, length)| CidrPrefix { is_v4, first: address(first), length });
    let ports =
        (any::<bool>(), select(PORTS.to_vec()), 0..=16u32).prop_map(|(dials, port, length)| PortPrefix {
            direction: if dials { DIALS } else { IS_DIALLED },
            first: port & u16::MAX.checked_shl(16 - length).unwrap_or(0),
            length,
        });
    let exclusions = (
        prop::collection::vec((select(EXCLUSIONS.to_vec()), ports, listed()), 0..4),
        prop::collection::vec((select(EXCLUSIONS.to_vec()), cidrs, listed()), 0..4),
        prop::collection::vec((select(EXCLUSIONS.to_vec()), 0..2u32, select(vec![0, 0, 1337])), 0..2),
    );
    let state = (
        flags,
        prop_oneof![8 => Just(0), 1 => Just(flag::SIDECAR)],
        (likely(), likely(), prop_oneof![8 => Just(None), 1 => Just(Some(0)), 2 => Just(Some(ELSEWHERE))]),
        likely(),
        prop_oneof![Just(0), Just(EXCLUSIONS[0])],
        likely(),
        any::<Option<bool>>(),
        [likely(), likely(), likely(), likely()],
    );
    let about = (
        exclusions,
        prop_oneof![2 => Just(None), 1 => select(vec![V4[0], V4[2], V6[2]]).prop_map(Some)],
        prop::collection::vec((select(PORTS.to_vec()), any::<bool>()), 0..4),
        any::<Option<bool>>(),
        any::<bool>(),
        (0..V4.len(), select(PORTS.to_vec())),
        select(PORTS.to_vec()),
    );
    (state, about).prop_map(|(state, about)| {
        let (
            flags,
            detected,
            (enrolled, netns_known, entry_netns),
            tunnel_up,
            exclusion_id,
            has_v6,
            second,
            listens,
        ) = state;
        let ((ports, cidrs, excluded_ids), resolver, app_listeners, complete, is_v4, to, arrives_at) = about;
        Case {
            flags,
            detected,
            enrolled,
            netns_known,
            entry_netns,
            tunnel_up,
            exclusion_id,
            has_v6,
            second,
            listens,
            listed_ports: ports,
            listed_cidrs: cidrs,
            excluded_ids,
            resolver,
            app_listeners,
            complete,
            is_v4,
            to,
            arrives_at,
        }
    })
}

/// Writes the case into the maps, and returns the same as plain values.
/// Written by nobody's plan: who has an address counts.
const fn owned_by(netns_cookie: u64) -> PodRecord {
    PodRecord { netns_cookie, flags: 0, device: 0 }
}

fn install(rig: &mut Rig, case: &Case) -> PlainFacts {
    let kernel = &mut rig.kernel;
    let mut settings = kernel.settings().unwrap();
    settings.tunnel_up = u16::from(case.tunnel_up);
    settings.resolvers[0] = case.resolver.map_or([0; 16], address);
    kernel.set_settings(&settings).unwrap();
    let mut facts = PlainFacts::new(settings);

    let id = rig.cgroups.id("pods/mesh");
    let (v4, v6) = (address(V4[0]), if case.has_v6 { address(V6[0]) } else { [0; 16] });
    let info = CgroupInfo {
        v4,
        v6,
        netns_cookie: case.entry_netns.unwrap_or(rig.cookie),
        flags: case.flags,
        detected: case.detected,
        exclusion_id: case.exclusion_id,
        redirect_port: OUTBOUND,
        ..empty()
    };
    kernel.remove_cgroup(id).unwrap();
    if case.enrolled {
        kernel.set_cgroup(id, &info).unwrap();
        facts.caller = Some(info);
    }
    kernel.remove_netns(rig.cookie).unwrap();
    if case.netns_known {
        let (flags, exclusion_id) = (case.flags, case.exclusion_id);
        let netns = NetnsInfo { cgroup_id: id, flags, exclusion_id };
        kernel.set_netns(rig.cookie, &netns).unwrap();
        facts.netns = Some(netns);
        facts.netns_pod = facts.caller;
    }
    facts.socket_netns = rig.cookie;
    for (first, second) in [(V4[0], V4[1]), (V6[0], V6[1])] {
        kernel.remove_pod(address(first)).unwrap();
        kernel.remove_pod(address(second)).unwrap();
        if case.enrolled {
            facts.owners.insert(address(first), owned_by(rig.cookie));
        }
        if let Some(own) = case.second {
            facts.owners.insert(address(second), owned_by(if own { rig.cookie } else { ELSEWHERE }));
        }
    }
    for (address, record) in &facts.owners {
        kernel.set_pod(*address, record).unwrap();
    }
    for (exclusion_id, list) in kernel.exclusions().unwrap() {
        kernel.remove_exclusions(exclusion_id, &list).unwrap();
    }
    for exclusion_id in EXCLUSIONS {
        let of = |id: &u32| *id == exclusion_id;
        let list = ExclusionList {
            ports: case.listed_ports.iter().filter(|(id, ..)| of(id)).map(|(_, of, is)| (*of, *is)).collect(),
            cidrs: case.listed_cidrs.iter().filter(|(id, ..)| of(id)).map(|(_, of, is)| (*of, *is)).collect(),
            ids: case
                .excluded_ids
                .iter()
                .filter(|(id, ..)| of(id))
                .map(|(_, kind, id)| (*kind, *id))
                .collect(),
        };
        kernel.add_exclusions(exclusion_id, &list).unwrap();
    }
    facts.listed_ports.clone_from(&case.listed_ports);
    facts.listed_cidrs.clone_from(&case.listed_cidrs);
    facts.excluded_ids.extend(&case.excluded_ids);
    // As a listener of before is forgotten, its application is gone.
    kernel.unsteer(&[rig.cookie].into()).unwrap();
    rig.steer();
    let kernel = &mut rig.kernel;
    for (port, is_v4) in &case.app_listeners {
        let key = ListenerKey::new(rig.cookie, *port, *is_v4);
        kernel.add_app_listener(&key).unwrap();
        facts.app_listeners.insert((key.netns_cookie, key.port, key.family));
    }
    if let Some(complete) = case.complete {
        let state = AppListenerState { count: 0, complete: u32::from(complete) };
        kernel.set_app_listener_state(rig.cookie, &state).unwrap();
        if complete {
            facts.complete.insert(rig.cookie);
        }
    }
    facts
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn programs_and_lists_agree() {
    let rig = RefCell::new(Rig::new());
    let config = ProptestConfig {
        cases: u32::from(repeated(250)),
        // A failure is shown; shrinking it takes a kernel's time for each step.
        max_shrink_iters: 50,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    TestRunner::new(config)
        .run(&cases(), |case| {
            let rig = &mut *rig.borrow_mut();
            let mut facts = install(rig, &case);
            let addresses = [format!("[::]:{OUTBOUND}"), format!("[::]:{INBOUND}"), format!("[::]:{HBONE}")];
            let mut handles = Vec::new();
            for (at, listens) in addresses.iter().zip(case.listens) {
                if listens {
                    handles.push(rig.tunnel.listen(at));
                    let port = at.rsplit(':').next().unwrap().parse::<u32>().unwrap();
                    facts.tunnel_listeners.insert((rig.cookie, port, 6));
                }
            }
            if case.listens[3] {
                handles.push(rig.tunnel.listen(&format!("127.0.0.1:{DNS}")));
                facts.tunnel_listeners.insert((rig.cookie, u32::from(DNS), 4));
            }
            // Whoever is connected to reads nothing: the backlog of a listener takes it.
            connects(rig, &case, &facts);
            arrives(rig, &case, &facts);
            for handle in handles {
                rig.tunnel.close(handle);
            }
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

fn connects(rig: &mut Rig, case: &Case, facts: &PlainFacts) {
    let (to, port) = (if case.is_v4 { V4[case.to.0] } else { V6[case.to.0] }, case.to.1);
    let destination = Destination::new(address(to), port);
    let expected = outbound(facts, &Connect { is_tcp: true, is_udp: false, destination });
    let explained = rig
        .kernel
        .explain_connect(Some(rig.cgroups.id("pods/mesh")), Some(rig.cookie), [Some(0); 2], destination)
        .unwrap();
    rig.rules(port);
    let dialled = rig.app.begin(at(to, port));
    let rules = rig.rules(port);
    assert_eq!((rules[0].1, explained), (expected.rule(), expected.rule()), "to {to} {port}: {rules:?}");
    let refused = dialled == Err(libc::EPERM);
    assert_eq!(refused, matches!(expected, Outbound::Refuse(_)), "to {to} {port}: {dialled:?}");
    if let Ok(handle) = dialled {
        rig.app.close(handle);
    }
}

fn arrives(rig: &mut Rig, case: &Case, facts: &PlainFacts) {
    let (from, to) = if case.is_v4 { (V4[2], V4[0]) } else { (V6[2], V6[0]) };
    let port = case.arrives_at;
    let flow = Flow { local: address(from), remote: address(to), local_port: 0, remote_port: port };
    let expected = inbound(facts, &Arrival { flow, is_v4: case.is_v4 });
    let explained =
        rig.kernel.explain_arrival(rig.cookie, address(from), Destination::new(address(to), port)).unwrap();
    rig.rules(port);
    let dialled = rig.world.dial(How::Tcp, at(to, port));
    let rules = rig.rules(port);
    assert_eq!((rules[0].1, explained), (expected.rule(), expected.rule()), "at {to} {port}: {rules:?}");
    let steered = matches!(expected, Inbound::Pass(Rule::SteerPlain | Rule::SteerHbone));
    assert!(!steered || dialled.is_ok(), "at {to} {port}: {dialled:?}");
    if matches!(expected, Inbound::Drop(_)) {
        assert_eq!(dialled.as_ref().map(|_| ()).unwrap_err(), &libc::ECONNREFUSED, "at {to} {port}");
    }
    if let Ok(end) = dialled {
        rig.world.close(end.handle);
    }
}
