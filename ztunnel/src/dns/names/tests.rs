use std::sync::Arc;

use super::*;
use crate::mesh::{
    Mesh, Workload,
    services::{HealthPolicy, Visibility},
    tests::{but, ip, service, workload},
};

const CLIENT: DnsClient<'static> = DnsClient { namespace: "default", network: "" };

fn zone() -> DnsZone {
    DnsZone::new("cluster.local", Some("preferred".into()), true)
}

/// A service that a ServiceEntry of `namespace` defines.
fn entry(hostname: &str, namespace: &str, vips: &[&str]) -> Service {
    let vips = vips.iter().map(|vip| ("".into(), ip(vip))).collect();
    Service { hostname: hostname.into(), namespace: namespace.into(), vips, ..service("entry", "10.9.9.9") }
}

fn of(mesh: &Mesh, name: &str, family: AddressFamily) -> Option<Vec<IpAddr>> {
    find(mesh, &zone(), CLIENT, name, family).map(|found| found.addresses)
}

fn v4(mesh: &Mesh, name: &str) -> Option<Vec<IpAddr>> {
    of(mesh, name, AddressFamily::V4)
}

#[test]
fn a_service_is_found_by_every_short_form() {
    let mesh = Mesh::new([], [service("web", "10.1.0.1")], []);
    for name in ["web", "web.default", "web.default.svc", "web.default.svc.cluster.local"] {
        assert_eq!(find(&mesh, &zone(), CLIENT, name, AddressFamily::V4).unwrap().alias_of, None, "{name}");
        assert_eq!(v4(&mesh, name), Some(vec![ip("10.1.0.1")]), "{name}");
    }
    for name in ["webb", "web.other", "web.default.pod", "default.svc.cluster.local", "svc", "local"] {
        assert_eq!(v4(&mesh, name), None, "{name}");
    }
    let other = DnsClient { namespace: "other", ..CLIENT };
    assert!(
        find(&mesh, &zone(), other, "web", AddressFamily::V4).is_none(),
        "another namespace's short name"
    );
    assert!(find(&mesh, &zone(), other, "web.default", AddressFamily::V4).is_some());
}

#[test]
fn what_a_search_domain_was_appended_to_is_an_alias() {
    let services = [service("web", "10.1.0.1"), entry("www.example.com", "default", &["10.1.0.2"])];
    let mesh = Mesh::new([], services, []);
    for (name, alias_of) in [
        ("web.default.default.svc.cluster.local", "web.default"),
        ("web.default.svc.svc.cluster.local", "web.default.svc"),
        ("web.default.svc.cluster.local.cluster.local", "web.default.svc.cluster.local"),
        ("www.example.com.default.svc.cluster.local", "www.example.com"),
        ("www.example.com.svc.cluster.local", "www.example.com"),
        ("www.example.com.cluster.local", "www.example.com"),
    ] {
        let found = find(&mesh, &zone(), CLIENT, name, AddressFamily::V4).expect(name);
        assert_eq!((found.alias_of.as_deref(), found.addresses.len()), (Some(alias_of), 1), "{name}");
    }
    // Not a search domain of this client.
    assert_eq!(v4(&mesh, "www.example.com.other.svc.cluster.local"), None);
}

#[test]
fn a_wildcard_stands_for_all_names_below_it_and_a_longer_match_wins() {
    let services = [
        entry("*.example.com", "default", &["10.1.0.1"]),
        entry("*.deep.example.com", "default", &["10.1.0.2"]),
        entry("www.example.com", "default", &["10.1.0.3"]),
    ];
    let mesh = Mesh::new([], services, []);
    assert_eq!(v4(&mesh, "any.example.com"), Some(vec![ip("10.1.0.1")]));
    assert_eq!(v4(&mesh, "a.b.example.com"), Some(vec![ip("10.1.0.1")]));
    assert_eq!(v4(&mesh, "x.deep.example.com"), Some(vec![ip("10.1.0.2")]));
    assert_eq!(v4(&mesh, "www.example.com"), Some(vec![ip("10.1.0.3")]));
    assert_eq!(v4(&mesh, "any.example.com.default.svc.cluster.local"), Some(vec![ip("10.1.0.1")]));
    assert_eq!(v4(&mesh, "example.com"), None);
    assert_eq!(v4(&mesh, "example.org"), None);
}

#[test]
fn a_headless_service_is_its_healthy_endpoints_of_this_network() {
    let mut headless = service("db", "10.1.0.1");
    headless.vips.clear();
    let endpoint = |name: &str, address: &str| {
        but(workload(name, address), |common| {
            common.services.insert(headless.key(), Arc::new([(80, 8080)].into()));
        })
    };
    let sick = Workload { healthy: false, ..endpoint("db-3", "10.0.0.3") };
    let far = but(endpoint("db-4", "10.0.0.4"), |common| common.network = "east".into());
    let endpoints =
        [endpoint("db-1", "10.0.0.1"), endpoint("db-2", "10.0.0.2"), sick, far, endpoint("db-6", "fd00::6")];
    let mesh = Mesh::new(endpoints.clone(), [headless.clone()], []);
    assert_eq!(v4(&mesh, "db"), Some(vec![ip("10.0.0.1"), ip("10.0.0.2")]));
    assert_eq!(of(&mesh, "db", AddressFamily::V6), Some(vec![ip("fd00::6")]));

    let mut unready_too = headless.clone();
    unready_too.load_balancing.health_policy = HealthPolicy::AllowAll;
    assert_eq!(v4(&Mesh::new(endpoints, [unready_too], []), "db").unwrap().len(), 3);
    assert_eq!(v4(&Mesh::new([], [headless], []), "db"), Some(vec![]), "it exists, though without endpoints");
}

#[test]
fn a_service_of_another_namespace_alone_has_no_name_here() {
    let mut hidden = entry("x.com", "elsewhere", &["10.1.0.1"]);
    assert_eq!(v4(&Mesh::new([], [hidden.clone()], []), "x.com"), Some(vec![ip("10.1.0.1")]));
    hidden.visibility = Visibility::Namespace;
    assert_eq!(v4(&Mesh::new([], [hidden], []), "x.com"), None);
}

#[test]
fn an_entry_without_an_address_is_left_to_the_outer_world() {
    let mesh = Mesh::new([], [entry("www.example.com", "default", &[])], []);
    assert_eq!(v4(&mesh, "www.example.com"), None);
}

#[test]
fn of_equal_names_the_clients_namespace_counts_then_the_preferred_one_then_the_canonical_one() {
    let canonical = Service { canonical: true, ..entry("x.com", "canonical", &["10.1.0.3"]) };
    let all = [
        entry("x.com", "any", &["10.1.0.4"]),
        canonical,
        entry("x.com", "preferred", &["10.1.0.2"]),
        entry("x.com", "default", &["10.1.0.1"]),
    ];
    for (count, expected) in [(4, "10.1.0.1"), (3, "10.1.0.2"), (2, "10.1.0.3"), (1, "10.1.0.4")] {
        let mesh = Mesh::new([], all[..count].to_vec(), []);
        assert_eq!(v4(&mesh, "x.com"), Some(vec![ip(expected)]), "of {count}");
    }
}

#[test]
fn an_address_of_the_other_family_is_not_told_and_a_mapped_one_is_ipv4() {
    let services =
        [entry("four.com", "default", &["10.1.0.1"]), entry("mapped.com", "default", &["::ffff:10.1.0.2"])];
    let mesh = Mesh::new([], services, []);
    assert_eq!(of(&mesh, "four.com", AddressFamily::V6), Some(vec![]));
    assert_eq!(v4(&mesh, "mapped.com"), Some(vec![ip("10.1.0.2")]));
    assert_eq!(of(&mesh, "mapped.com", AddressFamily::V6), Some(vec![]));
}

#[test]
fn without_ipv6_no_ipv6_address_is_told() {
    let mesh = Mesh::new([], [entry("six.com", "default", &["fd00::1"])], []);
    assert_eq!(of(&mesh, "six.com", AddressFamily::V6), Some(vec![ip("fd00::1")]));
    let zone = DnsZone::new("cluster.local", None, false);
    assert_eq!(
        find(&mesh, &zone, CLIENT, "six.com", AddressFamily::V6).unwrap().addresses,
        Vec::<IpAddr>::new()
    );
}

#[test]
fn addresses_of_another_network_are_not_told() {
    let mut both = service("web", "10.1.0.1");
    both.vips.push(("east".into(), ip("10.2.0.1")));
    let mesh = Mesh::new([], [both], []);
    assert_eq!(v4(&mesh, "web"), Some(vec![ip("10.1.0.1")]));
}
