//! Which policy pods name for their `PeerAuthentication`s, and what it says.

use std::collections::{BTreeMap, HashMap};

use super::*;
use crate::settings::MeshSettings;

const ROOT: &str = "adit-system";

fn peer(
    name: &str,
    created: i64,
    app: Option<&str>,
    mode: Mode,
    ports: &[(u16, Mode)],
) -> PeerAuthentication {
    PeerAuthentication {
        name: name.to_owned(),
        created,
        selector: app.map(|app| [("app".to_owned(), app.to_owned())].into()),
        mode,
        ports: ports.iter().copied().collect(),
        ..PeerAuthentication::default()
    }
}

fn objects(peers: &[PeerAuthentication]) -> NamespaceObjects {
    let by_name = peers.iter().map(|peer| (peer.name.clone(), peer.clone()));
    NamespaceObjects { peer_authentications: by_name.collect(), ..NamespaceObjects::default() }
}

/// What a pod with the label `app: web` of namespace `demo` names, and the policies of `demo`.
fn of_web(root: &[PeerAuthentication], demo: &[PeerAuthentication]) -> (Option<String>, Vec<Authorization>) {
    let (settings, root, demo, nodes) =
        (MeshSettings::default(), objects(root), objects(demo), HashMap::new());
    let around = Surroundings { settings: &settings, root: &root, nodes: &nodes, peer_authentication: true };
    let labels: BTreeMap<String, String> = [("app".to_owned(), "web".to_owned())].into();
    (Rules::new(&around, "demo", &demo).policy_for(&labels), policies(&around, "demo", &demo))
}

const STRICT: &str = "adit-system/istio_converted_static_strict";
const CONVERTED: &str = "demo/converted_peer_authentication_w";

#[test]
fn the_nearest_that_says_something_decides() {
    use Mode::{Permissive, Strict, Unset};
    let mesh = |mode| peer("m", 1, None, mode, &[]);
    let namespace = |mode| peer("n", 1, None, mode, &[]);
    let pods = |mode| peer("w", 1, Some("web"), mode, &[]);
    let others = peer("o", 0, Some("other"), Strict, &[]);
    for (root, demo, named) in [
        (vec![], vec![], None),
        (vec![mesh(Strict)], vec![], Some(STRICT)),
        (vec![mesh(Strict)], vec![namespace(Unset)], Some(STRICT)),
        (vec![mesh(Strict)], vec![namespace(Permissive)], None),
        (vec![mesh(Permissive)], vec![namespace(Strict)], Some(STRICT)),
        (vec![], vec![namespace(Strict), pods(Permissive)], None),
        (vec![], vec![namespace(Strict), pods(Unset)], Some(STRICT)),
        (vec![], vec![pods(Strict)], Some(STRICT)),
        (vec![], vec![others], None),
        // The oldest of several.
        (vec![], vec![namespace(Strict), peer("old", 0, None, Permissive, &[])], None),
        // In the root namespace one for certain pods is about none of other namespaces.
        (vec![peer("r", 0, Some("web"), Strict, &[])], vec![], None),
    ] {
        let found = of_web(&root, &demo);
        assert_eq!(found, (named.map(str::to_owned), vec![]), "{root:?} {demo:?}");
    }
}

/// The clause that keeps a port out of a denial.
fn open(port: u32) -> Clause {
    clause(Match { not_destination_ports: vec![port], ..Match::default() })
}

/// What is strict from above, but for these ports.
fn inherited_but(ports: &[u32]) -> Vec<Rule> {
    vec![Rule { clauses: ports.iter().copied().map(open).chain([clause(anonymous())]).collect() }]
}

/// As Istio's control plane treats it: `DISABLE` is `PERMISSIVE` in all places but one.
#[test]
fn to_disable_a_port_does_not_open_it_where_strictness_comes_from_above() {
    use Mode::{Disable, Permissive, Strict, Unset};
    let mesh = |mode| vec![peer("m", 1, None, mode, &[])];
    let namespace = |mode| peer("n", 1, None, mode, &[]);
    assert_eq!(of_web(&mesh(Strict), &[namespace(Disable)]).0, None);
    assert_eq!(of_web(&mesh(Disable), &[]).0, None);
    assert_eq!(of_web(&mesh(Strict), &[peer("w", 1, Some("web"), Disable, &[])]).0, None);

    for (above, mode, ports, expected) in [
        (Strict, Unset, &[(80, Disable)][..], None),
        (Strict, Unset, &[(80, Disable), (81, Permissive)], Some(inherited_but(&[80, 81]))),
        (Unset, Strict, &[(80, Disable)], Some(vec![Rule { clauses: vec![clause(anonymous()), open(80)] }])),
    ] {
        let (named, policies) = of_web(&mesh(above), &[peer("w", 1, Some("web"), mode, ports)]);
        match expected {
            None => assert_eq!((named.as_deref(), policies), (Some(STRICT), vec![]), "{ports:?}"),
            Some(rules) => {
                assert_eq!(named.as_deref(), Some(CONVERTED), "{ports:?}");
                assert_eq!(policies[0].rules, rules, "{ports:?}");
            }
        }
    }
}

#[test]
fn ports_are_exceptions_from_either() {
    use Mode::{Permissive, Strict, Unset};
    let strict_but = |port: u32| vec![Rule { clauses: vec![clause(anonymous()), open(port)] }];
    let only = |port: u32| {
        vec![Rule { clauses: vec![clause(Match { destination_ports: vec![port], ..anonymous() })] }]
    };
    let mesh = |mode| vec![peer("m", 1, None, mode, &[])];
    for (root, mode, port, expected) in [
        (vec![], Strict, (80, Permissive), Some(strict_but(80))),
        (mesh(Strict), Unset, (80, Permissive), Some(inherited_but(&[80]))),
        (vec![], Permissive, (80, Strict), Some(only(80))),
        (mesh(Permissive), Unset, (80, Strict), Some(only(80))),
        // Also where the mesh is strict, and these pods are not.
        (mesh(Strict), Permissive, (80, Strict), Some(only(80))),
        (vec![], Strict, (80, Strict), None),
        (vec![], Unset, (80, Permissive), None),
    ] {
        let (named, policies) = of_web(&root, &[peer("w", 1, Some("web"), mode, &[port])]);
        if let Some(rules) = expected {
            assert_eq!(named.as_deref(), Some(CONVERTED), "{mode:?} {port:?}");
            assert_eq!(policies.len(), 1);
            assert_eq!((policies[0].rules.clone(), policies[0].action()), (rules, Action::Deny));
        } else {
            assert_ne!(named.as_deref(), Some(CONVERTED), "{mode:?} {port:?}");
            assert_eq!(policies, []);
        }
    }
}

#[test]
fn the_fixed_policy_is_there_before_anybody_names_it() {
    let (settings, nodes) = (MeshSettings::default(), HashMap::new());
    let root = NamespaceObjects::default();
    let with = |peer_authentication| {
        let around = Surroundings { settings: &settings, root: &root, nodes: &nodes, peer_authentication };
        policies(&around, ROOT, &root)
    };
    assert_eq!(with(false), []);
    let [fixed] = &with(true)[..] else { panic!() };
    assert_eq!(format!("{}/{}", fixed.namespace, fixed.name), STRICT);
    assert_eq!(fixed.rules, [Rule { clauses: vec![clause(anonymous())] }]);
}

#[test]
fn the_status_says_what_has_no_effect_and_what_is_not_as_it_is_written() {
    use Mode::{Disable, Permissive, Strict, Unset};
    let said = |namespace: &str, name: &str, peers: &[PeerAuthentication]| {
        let objects = objects(peers);
        let said = report(ROOT, namespace, &objects, &objects.peer_authentications[name]);
        assert_eq!((said.object.kind.name(), said.object.name.as_str()), ("PeerAuthentication", name));
        (said.is_attached, said.reason, said.message)
    };
    let web = |mode, ports: &[(u16, Mode)]| peer("w", 1, Some("web"), mode, ports);
    for fine in [web(Strict, &[(80, Permissive)]), peer("w", 1, None, Unset, &[])] {
        let (is_attached, reason, _) = said("demo", "w", &[fine]);
        assert_eq!((is_attached, reason), (true, "Accepted"));
    }
    let unreadable = PeerAuthentication { unreadable: Some("spec: x".to_owned()), ..web(Strict, &[]) };
    for (namespace, peers, is_attached, reason, message) in [
        ("demo", vec![unreadable], true, "UnsupportedValue", "spec: x; plaintext is refused"),
        ("demo", vec![web(Disable, &[])], true, "UnsupportedValue", "mTLS is accepted"),
        ("demo", vec![web(Strict, &[(80, Disable)])], true, "UnsupportedValue", "mTLS is accepted"),
        ("demo", vec![web(Unset, &[(80, Disable)])], true, "UnsupportedValue", "only where the mode"),
        (ROOT, vec![web(Strict, &[])], false, "UnsupportedValue", "no effect with a selector"),
        (
            "demo",
            vec![peer("w", 2, None, Strict, &[]), peer("first", 1, None, Permissive, &[])],
            false,
            "Conflicted",
            "first is older",
        ),
    ] {
        let (attached, why, text) = said(namespace, "w", &peers);
        assert!(text.contains(message), "{text}");
        assert_eq!((attached, why), (is_attached, reason), "{text}");
    }
}
