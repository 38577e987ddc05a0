//! Ports and address ranges that bypass the tunnel.
//!
//! An invalid item is noted and ignored, the others stay active: a typing error in one port must not take a
//! pod out of the mesh, nor put the other ports into it.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use serde_json::Value;

/// Traffic of a pod that bypasses the tunnel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclusions {
    /// Destination ports of its connections.
    pub outbound_ports: BTreeSet<u16>,
    /// Destination addresses of its connections.
    pub outbound_cidrs: BTreeSet<IpNet>,
    /// Its own ports, for connections to it.
    pub inbound_ports: BTreeSet<u16>,
}

impl Exclusions {
    /// Whether all of its traffic goes through the tunnel.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.outbound_ports.is_empty() && self.outbound_cidrs.is_empty() && self.inbound_ports.is_empty()
    }
}

/// The single items of `value`: a number, a text with commas between items, or a list of both.
fn items(value: &Value) -> Vec<String> {
    match value {
        Value::Array(list) => list.iter().flat_map(items).collect(),
        Value::String(text) => {
            text.split(',').map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect()
        }
        Value::Null => Vec::new(),
        other => vec![other.to_string()],
    }
}

/// Reads ports (`6379`, `"6379, 7070"`, `"7000-7010"`); invalid items go to `notes`, named by `key`.
pub fn ports(key: &str, value: &Value, notes: &mut Vec<String>) -> BTreeSet<u16> {
    let mut ports = BTreeSet::new();
    for item in items(value) {
        match range(&item) {
            Some(range) => ports.extend(range),
            None => notes.push(format!(
                "{key}: \"{item}\" ignored, expected a port from 1 to 65535 or a range such as 7000-7010"
            )),
        }
    }
    ports
}

fn range(item: &str) -> Option<std::ops::RangeInclusive<u16>> {
    let (first, last) = item.split_once('-').unwrap_or((item, item));
    let (first, last) = (first.trim().parse::<u16>().ok()?, last.trim().parse::<u16>().ok()?);
    (first != 0 && first <= last).then_some(first..=last)
}

/// Reads CIDRs or single addresses; invalid items go to `notes`, named by `key`.
pub fn cidrs(key: &str, value: &Value, notes: &mut Vec<String>) -> BTreeSet<IpNet> {
    let mut cidrs = BTreeSet::new();
    for item in items(value) {
        match item.parse::<IpNet>().or_else(|_| item.parse::<IpAddr>().map(IpNet::from)) {
            Ok(cidr) => drop(cidrs.insert(cidr.trunc())),
            Err(_) => {
                notes.push(format!(
                    "{key}: \"{item}\" ignored, expected a CIDR such as 10.0.0.0/8 or fd00::/8"
                ));
            }
        }
    }
    cidrs
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read_ports(value: &Value) -> (Vec<u16>, usize) {
        let mut notes = Vec::new();
        (ports("excludeOutboundPorts", value, &mut notes).into_iter().collect(), notes.len())
    }

    #[test]
    fn ports_are_read_as_numbers_texts_and_ranges() {
        assert_eq!(read_ports(&json!([6379, "7000-7002", 65535])), (vec![6379, 7000, 7001, 7002, 65535], 0));
        assert_eq!(read_ports(&json!("6379, 7070")), (vec![6379, 7070], 0));
        assert_eq!(read_ports(&json!(80)), (vec![80], 0));
        assert_eq!(read_ports(&json!(null)), (vec![], 0));
    }

    #[test]
    fn an_invalid_item_is_noted_and_the_others_stay() {
        for bad in [
            json!(0),
            json!(65536),
            json!(-1),
            json!("9-8"),
            json!("http"),
            json!("1-"),
            json!(1.5),
            json!(true),
        ] {
            assert_eq!(read_ports(&json!([bad, 80])), (vec![80], 1), "{bad}");
        }
    }

    #[test]
    fn cidrs_may_be_everything_or_one_address() {
        let mut notes = Vec::new();
        let read = cidrs(
            "excludeOutboundCidrs",
            &json!(["0.0.0.0/0", "::/0", "10.1.2.3/8", "fd00::1", "10/8"]),
            &mut notes,
        );
        let texts: Vec<String> = read.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["0.0.0.0/0", "10.0.0.0/8", "::/0", "fd00::1/128"]);
        assert_eq!(notes.len(), 1);
        assert!(notes[0].contains("\"10/8\""), "{notes:?}");
    }
}
