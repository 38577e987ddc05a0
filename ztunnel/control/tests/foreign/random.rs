//! Objects at random, of which Istio's control plane and ours make the same.
//!
//! Only what both mean the same by: see `differences`, and docs/control-plane.md for policies that
//! layer 4 cannot enforce.

use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};
use serde_json::{Map, Value, json};

/// The namespaces of the objects; policies are in the root namespace too.
pub const NAMESPACES: [&str; 6] = ["red", "blue", "green", "black", "white", "brown"];
const ROOT: &str = "adit-system";
const LABELS: [(&str, &[&str]); 3] =
    [("app", &["web", "db"]), ("tier", &["front", "back"]), ("version", &["v1", "v2"])];

/// Where a port is strict in a mesh that is strict, Istio's control plane leaves out what it says of the port,
/// also for pods that are not strict otherwise. If nothing else is left, their workloads name a policy that is
/// never sent; ours sends it. The names of such policies.
pub fn forgotten(objects: &[Value]) -> Vec<String> {
    let mode = |spec: &Value| spec["mtls"]["mode"].as_str().unwrap_or("UNSET").to_owned();
    let general = |namespace: &str| {
        let is_it = |object: &&Value| {
            object["kind"] == "PeerAuthentication"
                && object["metadata"]["namespace"] == namespace
                && object["spec"]["selector"].is_null()
        };
        objects.iter().find(is_it).map_or_else(|| "UNSET".to_owned(), |object| mode(&object["spec"]))
    };
    let is_forgotten = |object: &&Value| {
        let namespace = object["metadata"]["namespace"].as_str().expect("a namespace");
        object["kind"] == "PeerAuthentication"
            && ["PERMISSIVE", "DISABLE"].contains(&mode(&object["spec"]).as_str())
            && general(namespace) == "UNSET"
            && general(ROOT) == "STRICT"
    };
    let name = |object: &Value| {
        let namespace = object["metadata"]["namespace"].as_str().expect("a namespace");
        format!("{namespace}/converted_peer_authentication_some")
    };
    objects.iter().filter(is_forgotten).map(name).collect()
}

/// What makes them.
pub struct Random(SmallRng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(SmallRng::seed_from_u64(seed))
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        *of.choose(&mut self.0).expect("some")
    }

    fn yes(&mut self, percent: u32) -> bool {
        self.0.random_ratio(percent, 100)
    }

    /// One to three of them, each once, in their order.
    fn some<T: Copy>(&mut self, of: &[T]) -> Vec<T> {
        let mut chosen: Vec<T> = of.iter().copied().filter(|_| self.0.random_ratio(1, 3)).take(3).collect();
        if chosen.is_empty() {
            chosen.push(self.one(of));
        }
        chosen
    }

    /// At least one label: one without is a difference of its own.
    fn labels(&mut self) -> Map<String, Value> {
        self.some(&LABELS)
            .into_iter()
            .map(|(key, values)| (key.to_owned(), json!(self.one(values))))
            .collect()
    }

    fn namespace(&mut self, root: bool) -> &'static str {
        if root && self.yes(20) { ROOT } else { self.one(&NAMESPACES) }
    }

    fn object(kind: &str, version: &str, namespace: &str, name: &str) -> Value {
        json!({"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": namespace}})
    }

    /// A pod, and what its kubelet says of it.
    pub fn pod(&mut self, number: u8) -> (Value, Value) {
        let mut pod = Self::object("Pod", "v1", self.namespace(false), &format!("pod-{number}"));
        pod["metadata"]["labels"] = Value::Object(self.labels());
        if self.yes(60) {
            pod["metadata"]["annotations"] = json!({"ambient.istio.io/redirection": "enabled"});
        }
        let mut ports = vec![json!({"containerPort": 8080, "name": "http"})];
        if self.yes(50) {
            ports.push(json!({"containerPort": self.one(&[9000, 9001]), "name": "admin"}));
        }
        pod["spec"] =
            json!({"nodeName": "n1", "containers": [{"name": "main", "image": "none", "ports": ports}]});
        if self.yes(10) {
            pod["spec"]["hostNetwork"] = json!(true);
        }
        let mut addresses = vec![json!({"ip": format!("10.2.0.{number}")})];
        if self.yes(20) {
            addresses.push(json!({"ip": format!("fd00:2::{number:x}")}));
        }
        let phase = self.one(&["Running", "Running", "Running", "Running", "Pending", "Succeeded"]);
        let ready = if self.yes(80) { "True" } else { "False" };
        let status = json!({"phase": phase, "podIP": addresses[0]["ip"], "podIPs": addresses,
            "conditions": [{"type": "Ready", "status": ready}]});
        (pod, status)
    }

    pub fn service(&mut self, number: u8) -> Value {
        let mut service = Self::object("Service", "v1", self.namespace(false), &format!("service-{number}"));
        let mut ports = vec![json!({"name": self.one(&["http", "web", "tcp-x", "grpc"]), "port": 80,
            "targetPort": self.one(&[json!(8080), json!("http"), json!("admin"), json!("absent")].each_ref())})];
        if self.yes(40) {
            ports.push(json!({"name": "second", "port": self.one(&[53, 443, 3306]),
                "targetPort": self.one(&[json!(9000), json!("admin")].each_ref())}));
        }
        let ip = if self.yes(20) { "None".to_owned() } else { format!("10.96.8.{number}") };
        service["spec"] = json!({"clusterIP": ip, "ports": ports, "selector": self.labels()});
        for (field, percent, values) in [
            ("publishNotReadyAddresses", 20, &[json!(true)][..]),
            ("internalTrafficPolicy", 20, &[json!("Local")]),
            (
                "trafficDistribution",
                30,
                &[json!("PreferClose"), json!("PreferSameZone"), json!("PreferSameNode")],
            ),
        ] {
            if self.yes(percent) {
                service["spec"][field] = values.choose(&mut self.0).expect("some").clone();
            }
        }
        service
    }

    /// In each namespace one for all pods or none, and one for some of them or none. Of two the older one
    /// counts, and Istio's control plane does not always take the same one of two of the same second.
    pub fn peer_authentications(&mut self) -> Vec<Value> {
        let mut made = Vec::new();
        for namespace in [&NAMESPACES[..], &[ROOT]].concat() {
            for selects in [false, true] {
                if self.yes(80) && !(selects && namespace == ROOT) {
                    made.push(self.peer_authentication(namespace, selects));
                }
            }
        }
        made
    }

    fn peer_authentication(&mut self, namespace: &str, selects: bool) -> Value {
        const MODES: [&str; 4] = ["STRICT", "PERMISSIVE", "DISABLE", "UNSET"];
        let name = if selects { "some" } else { "all" };
        let mut object = Self::object("PeerAuthentication", "security.istio.io/v1", namespace, name);
        let mut spec = json!({});
        if selects {
            spec["selector"] = json!({"matchLabels": self.labels()});
        }
        if self.yes(80) {
            spec["mtls"] = json!({"mode": self.one(&MODES)});
        }
        if selects && self.yes(80) {
            let ports = self.some(&["80", "8080", "9000", "9001"]);
            let ports = ports.into_iter().map(|port| (port.to_owned(), json!({"mode": self.one(&MODES)})));
            spec["portLevelMtls"] = Value::Object(ports.collect());
        }
        object["spec"] = spec;
        object
    }

    pub fn policy(&mut self, number: u8) -> Value {
        let namespace = self.namespace(true);
        let mut object = Self::object(
            "AuthorizationPolicy",
            "security.istio.io/v1",
            namespace,
            &format!("policy-{number}"),
        );
        let action = self.one(&["ALLOW", "ALLOW", "DENY", "AUDIT"]);
        let mut spec = json!({"action": action});
        if self.yes(60) {
            spec["selector"] = json!({"matchLabels": self.labels()});
        }
        // A rule that denies nothing in particular is refused by Istio's schema.
        let rules: Vec<Value> = (0..self.0.random_range(1..3)).map(|_| self.rule(action)).collect();
        spec["rules"] = json!(rules);
        object["spec"] = spec;
        object
    }

    fn rule(&mut self, action: &str) -> Value {
        let mut rule = json!({});
        let parts = self.some(&["from", "to", "when"]);
        if parts.contains(&"from") {
            rule["from"] = json!([{"source": self.source()}]);
            if self.yes(30) {
                rule["from"] = json!([{"source": self.source()}, {"source": self.source()}]);
            }
        }
        if parts.contains(&"to") {
            let mut operation = json!({});
            operation[self.one(&["ports", "notPorts"])] = json!(self.some(&["80", "8080", "9000"]));
            // In a rule that denies it is a difference.
            if action == "ALLOW" && self.yes(15) {
                operation["methods"] = json!(["GET"]);
            }
            rule["to"] = json!([{"operation": operation}]);
        }
        if parts.contains(&"when") {
            rule["when"] = json!([self.condition()]);
        }
        rule
    }

    fn source(&mut self) -> Value {
        let values: [(&str, &[&str]); 4] = [
            ("rincipals", &["cluster.local/ns/red/sa/a", "*", "cluster.local/*", "*/sa/b"]),
            ("amespaces", &["red", "blue", "r*", "*d", "*"]),
            ("pBlocks", &["10.0.0.0/8", "192.0.2.1", "fd00::/64", "10.2.0.0/16"]),
            ("rviceAccounts", &["a", "red/a", "blue/b"]),
        ];
        let mut source = json!({});
        for (field, values) in self.some(&values) {
            // Accounts beside principals or namespaces are refused.
            if field == "rviceAccounts" && source.as_object().is_some_and(|source| !source.is_empty()) {
                continue;
            }
            let first = match field {
                "pBlocks" => ["i", "notI"],
                "rincipals" => ["p", "notP"],
                "amespaces" => ["n", "notN"],
                _ => ["se", "notSe"],
            };
            let field = format!("{}{field}", self.one(&first));
            source[field.as_str()] = json!(self.some(values));
        }
        source
    }

    fn condition(&mut self) -> Value {
        let keys: [(&str, &[&str]); 5] = [
            ("source.ip", &["10.0.0.0/8", "192.0.2.1"]),
            ("source.namespace", &["red", "b*"]),
            ("source.principal", &["cluster.local/ns/red/*", "*/sa/b"]),
            ("destination.ip", &["10.2.0.1", "10.2.0.0/24"]),
            ("destination.port", &["80", "8080"]),
        ];
        let (key, values) = self.one(&keys);
        let field = self.one(&["values", "notValues"]);
        let mut condition = json!({"key": key});
        condition[field] = json!(self.some(values));
        condition
    }
}
