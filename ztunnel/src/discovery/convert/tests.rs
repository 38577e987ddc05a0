use super::*;
use crate::mesh::local_file::ResourceDefaults;

/// Makes a good message a bad one.
type Spoil<T> = fn(&mut T);

fn decoder() -> ResourceDecoder {
    ResourceDecoder::new(ResourceDefaults {
        trust_domain: "cluster.local".into(),
        cluster_id: "Kubernetes".into(),
    })
}

fn workload() -> proto::Workload {
    proto::Workload {
        uid: "Kubernetes//Pod/demo/web-1".to_owned(),
        name: "web-1".to_owned(),
        namespace: "demo".to_owned(),
        addresses: vec![vec![10, 0, 0, 1]],
        ..proto::Workload::default()
    }
}

fn service() -> proto::Service {
    proto::Service {
        name: "web".to_owned(),
        namespace: "demo".to_owned(),
        hostname: "web.demo.svc.cluster.local".to_owned(),
        ..proto::Service::default()
    }
}

fn address(bytes: &[u8], length: Option<u32>) -> proto::NetworkAddress {
    proto::NetworkAddress { network: "n".to_owned(), address: bytes.to_vec(), length }
}

fn by_address(port: u32) -> proto::GatewayAddress {
    let destination = proto::gateway_address::Destination::Address(address(&[10, 0, 0, 9], None));
    proto::GatewayAddress { destination: Some(destination), hbone_mtls_port: port }
}

#[test]
fn a_workload_is_as_it_was_sent_and_what_it_leaves_out_is_the_clusters() {
    let read = decoder().workload(workload()).unwrap();
    assert_eq!(read.identity().to_string(), "spiffe://cluster.local/ns/demo/sa/default");
    assert_eq!(
        (&*read.cluster_id, &*read.workload_name, &*read.workload_type),
        ("Kubernetes", "web-1", "deployment")
    );
    assert_eq!((read.capacity, read.healthy, read.protocol), (1, true, Protocol::Tcp));

    let mut sent = workload();
    sent.addresses.push("fd00::1".parse::<Ipv6Addr>().unwrap().octets().to_vec());
    sent.tunnel_protocol = proto::TunnelProtocol::Hbone.into();
    sent.waypoint = Some(by_address(15008));
    sent.status = proto::WorkloadStatus::Unhealthy.into();
    sent.network_mode = proto::NetworkMode::HostNetwork.into();
    sent.capacity = Some(7);
    let ports = vec![proto::Port { service_port: 80, target_port: 8080, app_protocol: 0 }];
    sent.services.insert("demo/web.example".to_owned(), proto::PortList { ports });
    sent.authorization_policies.push("istio-system/strict".to_owned());
    sent.application_tunnel = Some(proto::ApplicationTunnel { protocol: 1, port: 15088 });
    let read = decoder().workload(sent).unwrap();
    assert_eq!(*read.addresses, ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
    assert_eq!(
        (read.protocol, read.healthy, read.host_network, read.capacity),
        (Protocol::Hbone, false, true, 7)
    );
    assert_eq!(read.waypoint.as_ref().unwrap().to_string(), "n/10.0.0.9:15008");
    assert_eq!(*read.services[&"demo/web.example".parse().unwrap()], [(80, 8080)].into());
    assert_eq!(read.policies, ["istio-system/strict".parse().unwrap()]);
    assert_eq!(read.application_tunnel.unwrap().port.unwrap().get(), 15088);
}

#[test]
fn a_bad_workload_is_refused_with_the_field() {
    let cases: [(&str, Spoil<proto::Workload>); 12] = [
        ("uid", |w| w.uid.clear()),
        ("name, namespace", |w| w.name.clear()),
        ("name, namespace", |w| w.namespace.clear()),
        ("addresses", |w| w.addresses = vec![vec![1, 2, 3]]),
        ("tunnel_protocol", |w| w.tunnel_protocol = 2),
        ("tunnel_protocol", |w| w.tunnel_protocol = 9),
        ("workload_type", |w| w.workload_type = 9),
        ("waypoint", |w| w.waypoint = Some(by_address(0))),
        ("network_gateway", |w| w.network_gateway = Some(by_address(70_000))),
        ("services", |w| drop(w.services.insert("web".to_owned(), proto::PortList::default()))),
        ("authorization_policies", |w| w.authorization_policies.push("strict".to_owned())),
        ("trust_domain, namespace, service_account", |w| w.service_account = "a/b".to_owned()),
    ];
    for (field, spoil) in cases {
        let mut sent = workload();
        spoil(&mut sent);
        assert_eq!(decoder().workload(sent).unwrap_err().field, field);
    }
}

#[test]
fn a_service_has_addresses_and_ranges() {
    let mut sent = service();
    sent.addresses = vec![address(&[10, 96, 0, 1], None), address(&[10, 97, 3, 4], Some(16))];
    sent.ports = vec![proto::Port { service_port: 80, target_port: 0, app_protocol: 2 }];
    sent.load_balancing =
        Some(proto::LoadBalancing { routing_preference: vec![1, 0, 4], mode: 2, health_policy: 1 });
    sent.weighted_waypoints =
        vec![proto::WeightedWaypoint { destination: Some(by_address(15008)), weight: 3 }];
    sent.visibility = 1;
    let read = decoder().service(sent).unwrap();
    assert_eq!(read.vips, [(Arc::from("n"), "10.96.0.1".parse().unwrap())]);
    assert_eq!(read.cidr_vips, [(Arc::from("n"), "10.97.0.0/16".parse().unwrap())]);
    assert_eq!((read.ports, read.app_protocols[&80]), ([(80, 0)].into(), AppProtocol::Http2));
    assert_eq!(read.load_balancing.preferences, [LbScope::Region, LbScope::Node]);
    assert_eq!((read.load_balancing.mode, read.visibility), (LbMode::Failover, Visibility::Namespace));
    assert_eq!(read.weighted_waypoints[0].weight, 3);

    let cases: [(&str, Spoil<proto::Service>); 7] = [
        ("namespace, hostname", |s| s.hostname.clear()),
        ("addresses", |s| s.addresses = vec![address(&[], None)]),
        ("addresses", |s| s.addresses = vec![address(&[10, 0, 0, 0], Some(33))]),
        ("ports", |s| s.ports = vec![proto::Port { service_port: 65_536, ..proto::Port::default() }]),
        ("subject_alt_names", |s| s.subject_alt_names.push("web".to_owned())),
        ("weighted_waypoints", |s| s.weighted_waypoints.push(proto::WeightedWaypoint::default())),
        ("load_balancing", |s| {
            s.load_balancing = Some(proto::LoadBalancing { mode: 9, ..Default::default() });
        }),
    ];
    for (field, spoil) in cases {
        let mut sent = service();
        spoil(&mut sent);
        assert_eq!(decoder().service(sent).unwrap_err().field, field);
    }
}

/// What is left out of a policy by mistake would change its meaning.
#[test]
fn a_policy_is_whole_or_refused() {
    let with = |one: security::Match| security::Authorization {
        name: "p".to_owned(),
        namespace: "demo".to_owned(),
        scope: 1,
        action: 1,
        rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![one] }] }],
        dry_run: false,
    };
    let presence =
        security::StringMatch { match_type: Some(security::string_match::MatchType::Presence(())) };
    let sent = security::Match {
        not_principals: vec![presence],
        source_ips: vec![security::Address { address: vec![10, 1, 2, 3], length: 8 }],
        destination_ports: vec![8080],
        ..security::Match::default()
    };
    let read = policy(with(sent)).unwrap();
    assert_eq!(
        (read.scope, read.action, read.key.to_string()),
        (PolicyScope::Namespace, Action::Deny, "demo/p".to_owned())
    );
    let one = &read.rules[0].0[0].0[0];
    assert_eq!(one.not_principals, [StringMatch::Presence]);
    assert_eq!((one.source_ips[0].to_string(), one.destination_ports[0]), ("10.0.0.0/8".to_owned(), 8080));

    let unknown = security::StringMatch { match_type: None };
    let bad = [
        ("namespaces", security::Match { namespaces: vec![unknown], ..Default::default() }),
        ("destination_ports", security::Match { destination_ports: vec![1 << 16], ..Default::default() }),
        (
            "not_source_ips",
            security::Match {
                not_source_ips: vec![security::Address { address: vec![1], length: 8 }],
                ..Default::default()
            },
        ),
    ];
    for (field, one) in bad {
        assert_eq!(policy(with(one)).unwrap_err().field, field);
    }
    let nameless = security::Authorization::default();
    assert_eq!(policy(nameless).unwrap_err().field, "name");
    let unknown = security::Authorization { action: 7, ..with(security::Match::default()) };
    assert_eq!(policy(unknown).unwrap_err().field, "action");
}

/// An empty message is a policy that allows, for the whole mesh: what is not said has its default.
#[test]
fn what_stands_in_for_a_policy_forbids_at_least_what_that_may_forbid() {
    let resource = |value: Vec<u8>| {
        let resource = Some(prost_types::Any { type_url: String::new(), value });
        Resource { name: "demo/p".to_owned(), resource, ..Resource::default() }
    };
    let of = |scope: i32, action: i32, dry_run| {
        let (name, namespace) = ("p".to_owned(), "demo".to_owned());
        let sent = security::Authorization { name, namespace, scope, action, dry_run, ..Default::default() };
        stand_in(&resource(sent.encode_to_vec()))
    };
    for (scope, action, expected) in [
        (0, 0, (PolicyScope::Global, Action::Allow, 0)),
        (1, 0, (PolicyScope::Namespace, Action::Allow, 0)),
        (2, 1, (PolicyScope::WorkloadSelector, Action::Deny, 1)),
        (1, 2, (PolicyScope::Namespace, Action::Deny, 1)),
        (3, 1, (PolicyScope::Global, Action::Deny, 1)),
        (3, 0, (PolicyScope::Global, Action::Allow, 0)),
    ] {
        let policy = of(scope, action, false);
        assert_eq!((policy.scope, policy.action, policy.rules.len()), expected, "{scope} {action}");
        assert!(policy.stand_in && !policy.dry_run);
        assert_eq!(policy.key.to_string(), "demo/p");
        assert!(policy.rules.iter().all(|rule| rule.0.is_empty()), "without clauses it matches everybody");
    }
    assert!(of(0, 1, true).dry_run, "it decided nothing, and does not now");
    for nonsense in [resource(vec![0x0a, 0xff]), Resource { resource: None, ..resource(vec![]) }] {
        let policy = stand_in(&nonsense);
        assert_eq!((policy.scope, policy.action), (PolicyScope::Global, Action::Deny));
        assert_eq!((policy.key.to_string(), policy.rules.len()), ("demo/p".to_owned(), 1));
    }
    let nameless = Resource { name: "nameless".to_owned(), ..resource(vec![0xff]) };
    assert_eq!(stand_in(&nameless).key.to_string(), "/nameless");
}
