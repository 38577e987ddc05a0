//! One table of all maps. The loader pins and checks maps by it, a test compares it with the
//! compiled programs, and `docs/maps.md` is made from it.

use crate::{
    address::Address,
    enrolment::{CgroupInfo, NetnsInfo, PodRecord},
    exclusions::{ExcludedCidr, ExcludedPorts},
    flows::{Destination, Flow, SocketState, TunnelFlow},
    lifecycle::{Name, PathEvent, ProcessEvent, Scope},
    listeners::{AppListenerState, ListenerKey},
    settings::Settings,
    trace::TraceRecord,
};

/// A key or a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Its type, or what the number means.
    pub what: &'static str,
    /// In bytes; 0 for ring buffers, which have neither keys nor values.
    pub size: usize,
}

/// A map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// Its name in the object, and that of its pin. The kernel keeps the first 15 bytes.
    pub name: &'static str,
    /// The kernel's type of map.
    pub kind: &'static str,
    /// Its key.
    pub key: Layout,
    /// Its value.
    pub value: Layout,
    /// Who writes it.
    pub writers: &'static str,
    /// Who reads it.
    pub readers: &'static str,
    /// Whether it is pinned, so that it and its contents outlive the watcher. The others end with
    /// it.
    pub pinned: bool,
    /// The name that earlier builds gave to the same map, with the same key, value and meaning: its
    /// pin is adopted.
    pub formerly: Option<&'static str>,
    /// What it is for.
    pub purpose: &'static str,
}

const fn layout<T>(what: &'static str) -> Layout {
    Layout { what, size: size_of::<T>() }
}

/// The prefix length in front of the data of an LPM trie's key.
#[repr(C)]
struct Lpm<T>(u32, T);

macro_rules! maps {
    ($($constant:ident = $name:literal, $kind:literal, $key:ty: $key_is:literal, $value:ty: $value_is:literal,
        written by $writers:literal, read by $readers:literal, pinned $pinned:literal, formerly $formerly:expr,
        $purpose:literal;)+) => {
        $(
            #[doc = $purpose]
            pub const $constant: MapSpec = MapSpec {
                name: $name, kind: $kind, key: layout::<$key>($key_is), value: layout::<$value>($value_is),
                writers: $writers, readers: $readers, pinned: $pinned, formerly: $formerly, purpose: $purpose,
            };
        )+
        /// All of them.
        pub const ALL: &[MapSpec] = &[$($constant),+];
    };
}

maps! {
    CGROUP_INFO = "cgroup_info_map", "hash", u64: "cgroup id", CgroupInfo: "CgroupInfo",
        written by "watcher; `cgroup_mkdir` program", read by "connect, sendmsg, exec programs; watcher",
        pinned true, formerly None,
        "Which cgroup is which pod or tunnel, and what happens to its traffic.";
    POD_BY_ADDR = "pod_by_addr", "hash", Address: "Address", PodRecord: "PodRecord",
        written by "watcher", read by "connect, sendmsg, tunnel's sock_ops programs; watcher",
        pinned true, formerly None,
        "The enrolled pod that has an address: which addresses are a pod's own.";
    POD_BY_NETNS = "pod_by_netns", "hash", u64: "netns cookie", NetnsInfo: "NetnsInfo",
        written by "watcher", read by "connect, sendmsg, sk_lookup programs; watcher",
        pinned true, formerly None,
        "Which netns is which pod's, and what happens to what arrives there, at any address.";
    SETTINGS = "settings", "array of 1", u32: "0", Settings: "Settings",
        written by "watcher", read by "all programs of traffic; watcher", pinned true, formerly None,
        "What applies to the whole node: ports, whether a tunnel is connected, tracing.";
    EXCLUSION_PORTS = "exclusion_ports", "LPM trie", Lpm<ExcludedPorts>: "ExcludedPorts", u8: "1",
        written by "watcher", read by "connect, sendmsg, sk_lookup programs; watcher", pinned true, formerly None,
        "Ports that pods exclude from the mesh. Lists have ids, and pods with equal lists share one.";
    EXCLUSION_CIDRS = "exclusion_cidrs", "LPM trie", Lpm<ExcludedCidr>: "ExcludedCidr", u8: "1",
        written by "watcher", read by "connect, sendmsg programs; watcher", pinned true, formerly None,
        "Address ranges that pods exclude from the mesh, each of one address family.";
    ORIGINAL_DST = "original_dst", "LRU hash", Flow: "Flow", Destination: "Destination",
        written by "pods' sock_ops program", read by "sk_lookup, tunnel's sock_ops programs",
        pinned true, formerly None,
        "Where the opener of a redirected connection wanted to go, until the tunnel accepts it.";
    TUNNEL_FLOWS = "tunnel_flows", "LRU hash", Flow: "Flow", TunnelFlow: "TunnelFlow",
        written by "tunnel's sock_ops program", read by "sk_lookup program", pinned true, formerly None,
        "Connections that the tunnel opens, which pass to the application during their handshake, in the netns \
         they came from.";
    PINNED_CONNECTIONS = "pinned_connections", "hash", u64: "netns cookie", u64: "count",
        written by "tunnel's sock_ops program; watcher removes", read by "watcher",
        pinned true, formerly Some("deliveries"),
        "How many of the tunnel's connections need the netns prepared: those that use another address than the pod's, \
         and those that the tunnel accepted for the pod.";
    TUNNEL_LISTENERS = "tunnel_listeners", "socket hash", ListenerKey: "ListenerKey", u32: "socket",
        written by "tunnel's sock_ops program; the kernel removes closed sockets",
        read by "sk_lookup, connect, sendmsg programs; watcher (keys)",
        pinned true, formerly Some("listeners"),
        "The tunnel's listening sockets, which arrivals are steered to.";
    APP_LISTENERS = "app_listeners", "hash", ListenerKey: "ListenerKey", u32: "1",
        written by "pods' sock_ops program; watcher", read by "sk_lookup program; watcher",
        pinned true, formerly None,
        "Ports that applications listen on. The tunnel's own listeners may be among them.";
    APP_LISTENER_STATE = "app_listener_state", "hash", u64: "netns cookie", AppListenerState: "AppListenerState",
        written by "watcher; pods' sock_ops program", read by "sk_lookup, pods' sock_ops programs; watcher",
        pinned true, formerly None,
        "Whether `app_listeners` has every listener of a netns, and how many the programs added.";
    SOCKET_STATE = "socket_state", "socket storage", u32: "socket", SocketState: "SocketState",
        written by "connect, sendmsg, sock_ops, post_bind, sock_create programs",
        read by "the same; getsockopt, getpeername, recvmsg programs", pinned true, formerly None,
        "What the programs remember of one socket.";
    TRACE = "trace", "ring buffer", (): "–", (): "–",
        written by "connect, sendmsg, sk_lookup programs", read by "watcher", pinned true, formerly None,
        "One `TraceRecord` per verdict, while tracing is on.";
    TRACE_WATCHED = "trace_watched", "hash", Address: "Address, or as `watched_cgroup`", u32: "1",
        written by "watcher", read by "connect, sendmsg, sk_lookup programs", pinned false, formerly None,
        "Addresses, cgroups and netns of the pods that somebody traces.";
    TRACE_LEFT_OUT = "trace_left_out", "LPM trie", Lpm<Address>: "Address", u8: "1",
        written by "watcher", read by "connect, sendmsg, sk_lookup programs", pinned false, formerly None,
        "Address ranges that nobody who traces wants to see.";
    LIFECYCLE = "lifecycle", "ring buffer", (): "–", (): "–",
        written by "tracepoint programs", read by "watcher", pinned false, formerly None,
        "One `PathEvent` or `ProcessEvent` per event of a cgroup or a process.";
    LIFECYCLE_SCOPE = "lifecycle_scope", "array of 1", u32: "0", Scope: "Scope",
        written by "watcher", read by "tracepoint programs", pinned false, formerly None,
        "Which cgroups are of interest, and where the running kernel has the fields that name them.";
    LIFECYCLE_BASE = "lifecycle_base", "cgroup array of 1", u32: "0", u32: "cgroup",
        written by "watcher", read by "exec program", pinned false, formerly None,
        "The cgroup whose processes are of interest.";
    LIFECYCLE_LOST = "lifecycle_lost", "per-CPU array of 1", u32: "0", u64: "count",
        written by "tracepoint programs", read by "watcher", pinned false, formerly None,
        "How many events found no room in `lifecycle`.";
    LIFECYCLE_EVENT = "lifecycle_event", "per-CPU array of 1", u32: "0", PathEvent: "PathEvent",
        written by "tracepoint programs", read by "the same", pinned false, formerly None,
        "Room for an event, which is too long for the stack.";
    LIFECYCLE_EXECS = "lifecycle_execs", "LRU hash", u64: "cgroup id", u64: "ns since boot",
        written by "exec program", read by "the same", pinned false, formerly None,
        "When an exec in a cgroup was last reported.";
    EXPECTED_PODS = "expected_pods", "hash", Name: "Name", CgroupInfo: "CgroupInfo",
        written by "watcher", read by "`cgroup_mkdir` program", pinned false, formerly None,
        "The entry that a new cgroup of this name gets before `mkdir(2)` returns.";
}

/// The records of ring buffers; the kernel does not know their sizes.
pub const RECORDS: &[Layout] = &[
    layout::<TraceRecord>("TraceRecord"),
    layout::<PathEvent>("PathEvent"),
    layout::<ProcessEvent>("ProcessEvent"),
];

#[cfg(test)]
mod tests {
    use alloc::{format, string::String, vec::Vec};
    use core::fmt::Write as _;

    use super::*;

    fn table() -> String {
        let mut table = String::from(
            "| map | type | key | value | written by | read by | pinned | purpose |\n|---|---|---|---|---|---|---|---|\n",
        );
        let layout = |layout: Layout| match layout.size {
            0 => String::from("–"),
            size => format!("{} ({size})", layout.what),
        };
        for map in ALL {
            let pinned = match (map.pinned, map.formerly) {
                (false, _) => String::from("no"),
                (true, None) => String::from("yes"),
                (true, Some(name)) => format!("yes, adopts `{name}`"),
            };
            let _ = writeln!(
                table,
                "| `{}` | {} | {} | {} | {} | {} | {pinned} | {} |",
                map.name,
                map.kind,
                layout(map.key),
                layout(map.value),
                map.writers,
                map.readers,
                map.purpose
            );
        }
        table += "\nRecords of the ring buffers:\n\n";
        for record in RECORDS {
            let _ = writeln!(table, "* `{}` ({} bytes)", record.what, record.size);
        }
        table
    }

    #[test]
    fn documentation_of_maps_is_made_from_the_table() {
        testbed::doc_table::assert_current("docs/maps.md", "made from ebpf/common/src/maps.rs", &table());
    }

    #[test]
    fn names_are_unique_in_what_the_kernel_keeps_of_them() {
        for (at, map) in ALL.iter().enumerate() {
            let kept = |map: &MapSpec| map.name.bytes().take(15).collect::<Vec<_>>();
            assert!(ALL[..at].iter().all(|other| kept(other) != kept(map)), "{}", map.name);
        }
    }
}
