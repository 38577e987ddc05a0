//! Which rule decides about a connection: the kernel programs' lists (`decide.rs`), read from the same
//! map contents, for people who ask why something is captured, or not.

use std::net::{IpAddr, SocketAddr};

use adit_ebpf_common::{
    pods::{CgroupInfo, PodRecord, flag},
    trace::Rule,
};
use serde::{Deserialize, Serialize};

use crate::{
    model::exclusions::Exclusions,
    plan::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT},
};

const DNS: u16 = 53;

/// The rules that decide about a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    pub pod: String,
    pub destination: SocketAddr,
    /// What happens when the pod connects.
    pub outbound: String,
    /// What happens where the connection arrives, if that is a pod of this node and it arrives in clear.
    pub inbound: Option<String>,
}

/// The rule of `connect4/6` for a caller in a cgroup of `info` (`None`: no entry). `resolvers`: whose DNS queries are
/// captured, where the pod wants that; empty: all. That the tunnel has its listeners is taken for granted.
pub fn outbound(
    info: Option<&CgroupInfo>,
    own: &[IpAddr],
    exclusions: &Exclusions,
    resolvers: &[IpAddr],
    tunnel_up: bool,
    destination: SocketAddr,
) -> Rule {
    let address = destination.ip().to_canonical();
    let local = address.is_loopback() || address.is_unspecified();
    let reserved = matches!(destination.port(), OUTBOUND_PORT | INBOUND_PORT | HBONE_PORT);
    if local && !reserved {
        return Rule::Loopback;
    }
    let Some(info) = info else { return if local { Rule::Loopback } else { Rule::NotEnrolled } };
    if info.flags & flag::TUNNEL != 0 {
        return Rule::Tunnel;
    }
    if info.flags & flag::IN_MESH == 0 || (info.flags | info.detected) & flag::SIDECAR != 0 {
        return Rule::NotEnrolled;
    }
    let ready = tunnel_up && info.flags & flag::READY != 0;
    if local || own.contains(&address) {
        return match (ready && reserved, local) {
            (true, _) => Rule::DropReserved,
            (false, true) => Rule::Loopback,
            (false, false) => Rule::OwnAddress,
        };
    }
    if exclusions.outbound_ports.contains(&destination.port()) {
        return Rule::ExcludedPort;
    }
    if exclusions.outbound_cidrs.iter().any(|cidr| cidr.contains(&address)) {
        return Rule::ExcludedCidr;
    }
    if !ready {
        return if info.flags & flag::FAIL_OPEN == 0 { Rule::FailClosed } else { Rule::FailOpen };
    }
    if destination.port() == DNS && info.flags & flag::NAMES != 0 && is_captured(resolvers, address) {
        return Rule::Names;
    }
    if !own.iter().any(|held| held.is_ipv4() == address.is_ipv4()) {
        return Rule::NoAddress;
    }
    Rule::Redirect
}

fn is_captured(resolvers: &[IpAddr], resolver: IpAddr) -> bool {
    let on_link = matches!(resolver, IpAddr::V6(v6) if v6.is_unicast_link_local());
    !on_link && (resolvers.is_empty() || resolvers.contains(&resolver))
}

/// The rule of `sk_lookup` for a connection from another pod or node to `port` of a pod of this node.
/// `listens`: whether somebody may listen there.
pub fn inbound(
    record: Option<&PodRecord>,
    exclusions: &Exclusions,
    tunnel_up: bool,
    listens: bool,
    port: u16,
) -> Rule {
    let Some(record) = record else { return Rule::Unknown };
    if matches!(port, OUTBOUND_PORT | INBOUND_PORT) {
        return Rule::DropReserved;
    }
    if exclusions.inbound_ports.contains(&port) {
        return Rule::ExcludedPort;
    }
    if !tunnel_up || record.flags & flag::READY == 0 {
        return if record.flags & flag::FAIL_OPEN == 0 { Rule::FailClosed } else { Rule::FailOpen };
    }
    match (port, listens) {
        (HBONE_PORT, _) => Rule::SteerHbone,
        (_, false) => Rule::NotListening,
        (_, true) => Rule::SteerPlain,
    }
}

#[cfg(test)]
mod tests {
    use adit_ebpf_common::pods::flag::{FAIL_OPEN, IN_MESH, NAMES, READY};

    use crate::plan::cgroup_info;

    use super::*;

    #[test]
    fn the_first_rule_that_holds_wins() {
        let own = ["10.0.0.1".parse().unwrap()];
        let exclusions = Exclusions {
            outbound_ports: [6379].into(),
            outbound_cidrs: ["192.168.0.0/16".parse().unwrap()].into(),
            inbound_ports: [9090].into(),
        };
        let rule = |flags: Option<u32>, up: bool, to: &str| {
            let info = flags.map(|flags| cgroup_info(flags, 0, &own));
            let resolvers = ["10.96.0.10".parse().unwrap()];
            outbound(info.as_ref(), &own, &exclusions, &resolvers, up, to.parse().unwrap())
        };
        let ready = Some(IN_MESH | READY);
        for (flags, up, to, expected) in [
            (ready, true, "127.0.0.2:80", Rule::Loopback),
            (ready, true, "[::1]:80", Rule::Loopback),
            (ready, true, "0.0.0.0:80", Rule::Loopback),
            (ready, true, "127.0.0.1:15001", Rule::DropReserved),
            (ready, true, "10.0.0.1:15008", Rule::DropReserved),
            (ready, false, "127.0.0.1:15001", Rule::Loopback),
            (None, true, "127.0.0.1:15001", Rule::Loopback),
            (Some(IN_MESH | READY | flag::SIDECAR), true, "10.0.0.2:80", Rule::NotEnrolled),
            (None, true, "10.0.0.2:80", Rule::NotEnrolled),
            (Some(flag::TUNNEL), true, "10.0.0.2:80", Rule::Tunnel),
            (ready, true, "10.0.0.1:80", Rule::OwnAddress),
            (ready, true, "[::ffff:10.0.0.1]:80", Rule::OwnAddress),
            (ready, true, "10.0.0.2:6379", Rule::ExcludedPort),
            (ready, true, "192.168.4.4:80", Rule::ExcludedCidr),
            (Some(IN_MESH), true, "10.0.0.2:80", Rule::FailClosed),
            (ready, false, "10.0.0.2:80", Rule::FailClosed),
            (Some(IN_MESH | FAIL_OPEN), true, "10.0.0.2:80", Rule::FailOpen),
            (ready, true, "[fd00::2]:80", Rule::NoAddress),
            (ready, true, "10.0.0.2:80", Rule::Redirect),
            (ready, true, "10.96.0.10:53", Rule::Redirect),
            (Some(IN_MESH | READY | NAMES), true, "10.96.0.10:53", Rule::Names),
            (Some(IN_MESH | READY | NAMES), true, "10.96.0.11:53", Rule::Redirect),
            (Some(IN_MESH | READY | NAMES), true, "10.96.0.10:54", Rule::Redirect),
        ] {
            assert_eq!(rule(flags, up, to), expected, "{flags:?} {up} {to}");
        }
        let record = PodRecord { netns_cookie: 1, flags: IN_MESH | READY, policy_id: 1 };
        for (port, expected) in [
            (80, Rule::SteerPlain),
            (9090, Rule::ExcludedPort),
            (15001, Rule::DropReserved),
            (15006, Rule::DropReserved),
            (15008, Rule::SteerHbone),
            (81, Rule::NotListening),
        ] {
            let listens = port == 80;
            assert_eq!(inbound(Some(&record), &exclusions, true, listens, port), expected, "{port}");
        }
        assert_eq!(inbound(None, &exclusions, true, true, 80), Rule::Unknown);
        assert_eq!(inbound(Some(&record), &exclusions, false, true, 80), Rule::FailClosed);
    }
}
