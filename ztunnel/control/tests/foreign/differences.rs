//! Where Istio's control plane sends something else than ours, and why it stays so.

use std::collections::BTreeMap;

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
        apply: |all| all.values_mut().for_each(|resource| resource["aliases"] = json!([])),
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
