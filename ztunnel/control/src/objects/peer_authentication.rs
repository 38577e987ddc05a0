//! Istio's `PeerAuthentication`, as written: whether plaintext may reach pods.

use std::collections::BTreeMap;

use kube::core::DynamicObject;
use serde::Deserialize;
use serde_json::Value;

use super::{
    Labels, Reported, api_version, conditions,
    policy::{Selector, labels},
};
use crate::report::PolicyKind;

/// Whether plaintext may reach some pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PeerAuthentication {
    /// Of the API.
    pub version: String,
    pub name: String,
    /// Of its spec.
    pub generation: i64,
    /// What its status says.
    pub conditions: Vec<Value>,
    /// Seconds since 1970: of several, the oldest counts.
    pub created: i64,
    /// `None`: all pods of its namespace.
    pub selector: Option<Labels>,
    pub mode: Mode,
    pub ports: BTreeMap<u16, Mode>,
    /// Why it cannot be read, if it cannot. Then it is strict where it could be meant so.
    pub unreadable: Option<String>,
}

/// Whether plaintext may arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) enum Mode {
    /// Whoever stands above decides.
    #[default]
    #[serde(rename = "UNSET")]
    Unset,
    #[serde(rename = "PERMISSIVE")]
    Permissive,
    /// A tunnel accepts both in any case: like permissive, but for a port below strictness that comes
    /// from above.
    #[serde(rename = "DISABLE")]
    Disable,
    #[serde(rename = "STRICT")]
    Strict,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Spec {
    selector: Option<Selector>,
    mtls: Option<Mtls>,
    /// By port, in decimal.
    port_level_mtls: BTreeMap<String, Mtls>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Mtls {
    mode: Mode,
}

impl Reported for PeerAuthentication {
    fn conditions(&mut self) -> &mut Vec<Value> {
        &mut self.conditions
    }
}

impl PeerAuthentication {
    /// Always something: what cannot be read is strict.
    pub(crate) fn read(object: &DynamicObject) -> Self {
        let created = object.metadata.creation_timestamp.as_ref();
        let mut read = Self {
            version: api_version(object, PolicyKind::Peer),
            name: object.metadata.name.clone().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            conditions: conditions(object),
            created: created.map_or(0, |created| created.0.as_second()),
            ..Self::default()
        };
        let spec = object.data.get("spec").unwrap_or(&Value::Null);
        if spec.is_null() {
            return read;
        }
        let selector = spec.get("selector").filter(|selector| !selector.is_null());
        read.selector = selector.and_then(|selector| labels(Selector::deserialize(selector).ok()?));
        let parsed = Spec::deserialize(spec).map_err(|error| format!("spec: {error}")).and_then(|spec| {
            let port = |(port, mtls): (String, Mtls)| match port.parse() {
                Ok(number) => Ok((number, mtls.mode)),
                Err(_) => Err(format!("spec.portLevelMtls: {port} is not a port")),
            };
            let ports: BTreeMap<u16, Mode> =
                spec.port_level_mtls.into_iter().map(port).collect::<Result<_, _>>()?;
            Ok((spec.mtls.unwrap_or_default().mode, ports))
        });
        match parsed {
            // Istio does not take such a one. Ports of all pods cannot be told apart: all are like the strictest.
            Ok((mode, ports)) if read.selector.is_none() && !ports.is_empty() => {
                let is_strict = ports.values().any(|port| *port == Mode::Strict);
                read.mode = if is_strict { Mode::Strict } else { mode };
                read.unreadable = Some("spec.portLevelMtls needs a selector".to_owned());
            }
            Ok((mode, ports)) => (read.mode, read.ports) = (mode, ports),
            Err(reason) => (read.mode, read.unreadable) = (Mode::Strict, Some(reason)),
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(spec: &Value) -> PeerAuthentication {
        let object = json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "p", "namespace": "demo", "creationTimestamp": "1970-01-01T00:01:00Z"},
            "spec": spec});
        PeerAuthentication::read(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn modes_are_of_the_whole_and_of_ports() {
        let spec = json!({"selector": {"matchLabels": {"app": "web"}}, "mtls": {"mode": "STRICT"},
            "portLevelMtls": {"8080": {"mode": "DISABLE"}, "81": {}}});
        let read = read(&spec);
        assert_eq!((read.created, read.mode, read.unreadable), (60, Mode::Strict, None));
        assert_eq!(read.ports, [(8080, Mode::Disable), (81, Mode::Unset)].into());
        assert!(read.selector.is_some());
    }

    #[test]
    fn what_cannot_be_read_is_strict() {
        for spec in [
            json!({"portLevelMtls": {"80": {"mode": "STRICT"}}}),
            json!({"mtls": {"mode": "MAYBE"}}),
            json!({"portLevelMtls": {"x": {"mode": "PERMISSIVE"}}}),
            json!({"mtls": {"mode": "PERMISSIVE"}, "surprise": 1}),
        ] {
            let read = read(&spec);
            assert!(read.mode == Mode::Strict && read.unreadable.is_some(), "{read:?}");
        }
        assert_eq!(read(&json!(null)).mode, Mode::Unset);
        let open =
            read(&json!({"mtls": {"mode": "PERMISSIVE"}, "portLevelMtls": {"80": {"mode": "DISABLE"}}}));
        assert!(open.mode == Mode::Permissive && open.ports.is_empty() && open.unreadable.is_some());
    }
}
