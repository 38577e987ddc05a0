//! Where Istio's control plane sends something else than ours, and why it stays so.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

/// What it is about, why ours is different, and how what ours sends becomes what Istio's does.
pub struct Difference {
    pub what: &'static str,
    pub reason: &'static str,
    apply: fn(&mut BTreeMap<String, Value>),
}

/// All of them. Whatever else is different is a fault.
pub const DIFFERENCES: &[Difference] = &[
    Difference {
        what: "aliases, for a tunnel that asks for everything",
        reason: "such a tunnel does not look at them: ours makes each resource once, for both kinds of tunnels",
        apply: without_aliases,
    },
    Difference {
        what: "pods without a label",
        reason: "every policy with a selector selects them, at Istio's: its filter takes no labels for no filter. \
            A selector that names a label does not mean them",
        apply: |all| {
            for name in WITHOUT_LABEL {
                let pod = all.get_mut(&format!("Kubernetes//Pod/demo/{name}")).expect(name);
                pod["workload"]["authorization_policies"] =
                    json!(["adit-system/selects-everywhere", "demo/selects"]);
            }
        },
    },
    Difference {
        what: "policies with istio.io/dry-run",
        reason: "Istio's sends them only where it is asked to, by a variable. A tunnel that is told reports what \
            they would refuse, and refuses nothing",
        apply: |all| drop(all.remove("demo/dry")),
    },
    Difference {
        what: "a port of UDP with the number of one of TCP",
        reason: "tunnels keep one target for a number, and carry TCP: with both it would depend on their order",
        apply: |all| {
            let service = all.get_mut("demo/datagrams.demo.svc.cluster.local").expect("the service");
            let ports = service["service"]["ports"].as_array_mut().expect("ports");
            ports.insert(0, json!({"service_port": 53, "target_port": 5353}));
        },
    },
];

/// Below a strict `PeerAuthentication`, one without a mode whose ports are `DISABLE` changes nothing: Istio's
/// makes a policy of it, which no workload names.
pub fn without_unnamed(all: &mut BTreeMap<String, Value>) {
    let named: BTreeSet<String> = all
        .values()
        .filter_map(|resource| resource.pointer("/workload/authorization_policies")?.as_array())
        .flatten()
        .filter_map(|name| name.as_str().map(str::to_owned))
        .collect();
    all.retain(|name, _| !name.contains("/converted_peer_authentication_") || named.contains(name));
}

/// Where a strict `PeerAuthentication` is below one that is strict, Istio's says twice that whoever has no
/// identity is denied.
pub fn without_repetition(all: &mut BTreeMap<String, Value>) {
    for rule in all.values_mut().filter_map(|policy| policy.get_mut("rules")?.as_array_mut()).flatten() {
        if let Some(clauses) =
            rule.get_mut("clauses").and_then(Value::as_array_mut).filter(|clauses| clauses.len() > 1)
            && clauses.first() == clauses.last()
        {
            clauses.pop();
        }
    }
}

pub fn without_aliases(all: &mut BTreeMap<String, Value>) {
    for resource in all.values_mut() {
        resource["aliases"] = json!([]);
    }
}

const WITHOUT_LABEL: &[&str] = &[
    "account",
    "agent-x4",
    "backup-28000001-x2",
    "captured",
    "db-0",
    "dual",
    "host",
    "left",
    "nowhere",
    "once-x3",
    "plain",
    "starting",
    "unready",
];

/// What Istio's sends where ours sends `ours`.
pub fn of_istio(ours: &BTreeMap<String, Value>) -> BTreeMap<String, Value> {
    let mut theirs = ours.clone();
    for difference in DIFFERENCES {
        (difference.apply)(&mut theirs);
        assert_ne!(theirs, *ours, "no difference is left: {}", difference.what);
    }
    theirs
}
