//! Which connections of an enrolled pod no tunnel carries, though one should.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
};

use crate::{
    model::exclusions::Exclusions,
    observe::{
        cgroups::CgroupId,
        connections::{self, Connection},
        listeners::Listening,
    },
    plan::{DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT},
};

/// A pod whose connections are looked at.
#[derive(Debug)]
pub(crate) struct PodSockets {
    /// Its uid.
    pub uid: String,
    /// The cookie of its netns.
    pub cookie: u64,
    /// Its netns, open.
    pub netns: Arc<OwnedFd>,
    /// What may pass in clear.
    pub exclusions: Arc<Exclusions>,
    /// Those of its cgroups whose processes are left alone.
    pub guarded: BTreeSet<CgroupId>,
    /// Its cgroups.
    pub cgroups: BTreeSet<CgroupId>,
    /// Their directories.
    pub dirs: BTreeMap<PathBuf, CgroupId>,
}

/// Those of `found`, all connections of the pod's netns, that left the pod, or came to it, in
/// clear. Not so:
///
/// * those that stay in the netns, as the application's end of what a tunnel carries
/// * a tunnel's own
/// * those of processes that the pod guards, as far as a list of sockets tells
/// * what the pod excludes from the mesh, and what it opened to a link-local address of IPv6
pub(super) fn in_clear(
    found: Vec<Connection>,
    listeners: &BTreeSet<Listening>,
    pod: &PodSockets,
    tunnels: &BTreeSet<CgroupId>,
) -> Vec<Connection> {
    let all: BTreeSet<_> = found.iter().map(|connection| (connection.local, connection.remote)).collect();
    let tunnel_ports = [OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT];
    let of_tunnel = |connection: &Connection| match connection.cgroup_id {
        Some(id) if pod.cgroups.contains(&id) => false,
        Some(id) if tunnels.contains(&id) => true,
        // A tunnel that is not connected yet may have served the pod before.
        _ => [connection.local, connection.remote].iter().any(|end| tunnel_ports.contains(&end.port())),
    };
    let excluded = |connection: &Connection| {
        let (local, remote) = (connection.local.port(), connection.remote);
        if listeners.iter().any(|(port, _)| *port == local) {
            return pod.exclusions.leaves_outside_at(local);
        }
        pod.exclusions.leaves_outside(remote, connection.device() != 0)
            || matches!(remote.ip(), IpAddr::V6(v6) if v6.is_unicast_link_local())
    };
    let guarded = |connection: &Connection| {
        pod.exclusions.guards.users.contains(&connection.uid)
            || connection.cgroup_id.is_some_and(|id| pod.guarded.contains(&id))
            || pod.exclusions.devices.contains(&connection.device())
    };
    let passes = |connection: &Connection| {
        connections::is_local(connection, &all)
            || of_tunnel(connection)
            || guarded(connection)
            || excluded(connection)
    };
    let mut found = found;
    found.retain(|connection| !passes(connection));
    found
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn only_what_is_in_clear_and_leaves_the_netns_is_cut() {
        let (pod_cgroup, tunnel, unknown) = (1, 2, 3);
        let exclusions = Exclusions {
            outbound_ports: vec![6379..=6379],
            outbound_cidrs: vec!["10.9.0.0/16".parse().unwrap()],
            inbound_ports: vec![9000..=9000],
            ..Exclusions::default()
        };
        let pod = PodSockets {
            uid: "u".to_owned(),
            cookie: 1,
            netns: Arc::new(File::open("/proc/self/ns/net").unwrap().into()),
            exclusions: Arc::new(exclusions),
            guarded: BTreeSet::new(),
            cgroups: [pod_cgroup].into(),
            dirs: BTreeMap::new(),
        };
        let listeners = [(8080, 6), (9000, 4)].into();
        let cut = [
            ("10.0.0.2:40000", "10.0.1.1:80", pod_cgroup),
            ("[fd00::2]:40000", "[fd00::9]:80", pod_cgroup),
            // Somebody else's client.
            ("10.0.0.2:8080", "10.0.1.7:50000", pod_cgroup),
            // In the pod's netns, and not in its cgroup.
            ("10.0.0.2:40001", "10.0.1.1:80", unknown),
            // The port of the excluded list is the other end's.
            ("10.0.0.2:8080", "10.0.1.7:6379", pod_cgroup),
            ("10.0.0.2:40005", "10.0.1.1:9000", pod_cgroup),
            // The pod itself dials the port of HBONE.
            ("10.0.0.2:40002", "10.0.1.1:15008", pod_cgroup),
            ("[fe80::2]:8080", "[fe80::9]:50000", pod_cgroup),
        ];
        let stays = [
            ("127.0.0.1:40000", "127.0.0.1:80", pod_cgroup),
            // Both ends are here.
            ("10.0.0.2:40003", "10.0.0.2:15001", pod_cgroup),
            ("10.0.0.2:15001", "10.0.0.2:40003", tunnel),
            ("10.0.1.7:40004", "10.0.0.2:8080", tunnel),
            ("10.0.0.2:8080", "10.0.1.7:40004", pod_cgroup),
            ("10.0.0.2:41000", "10.0.1.1:15008", tunnel),
            ("10.0.0.2:15008", "10.0.1.1:41000", unknown),
            ("10.0.0.2:41001", "10.0.1.1:15008", unknown),
            ("10.0.0.2:40006", "10.0.1.1:6379", pod_cgroup),
            ("10.0.0.2:40007", "10.9.1.1:80", pod_cgroup),
            ("10.0.0.2:9000", "10.0.1.1:50000", pod_cgroup),
            ("[fe80::2]:40008", "[fe80::9]:80", pod_cgroup),
        ];
        let connection =
            |(local, remote, cgroup): &(&str, &str, u64)| Connection::between(local, remote, *cgroup);
        let all = cut.iter().chain(&stays).map(connection).collect();
        let expected: Vec<_> = cut.iter().map(connection).collect();
        assert_eq!(in_clear(all, &listeners, &pod, &[tunnel].into()), expected);
    }
}
