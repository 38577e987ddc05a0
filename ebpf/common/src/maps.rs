//! One table of all maps. The loader pins and checks maps by it, a test compares it with the
//! compiled programs, and `docs/maps.md` is made from it.

use crate::{
    address::Address,
    enrolment::{CgroupInfo, NetnsInfo, PodRecord},
    exclusions::{ExcludedCidr, ExcludedId, ExcludedPorts, Listed},
    flows::{Flow, Original, SocketState, TunnelFlow},
    lifecycle::{Name, PathEvent, ProcessEvent, Scope},
    listeners::{AppListenerState, ListenerKey},
    reserved_ports::{ReservedBind, ReservedPort},
    sealed::Sealed,
    settings::Settings,
    trace::TraceRecord,
    verdicts::Verdicts,
};

/// A key or a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Its type, or what the number means.
    pub what: &'static str,
    /// In bytes; 0 for ring buffers, which have neither keys nor values.
    pub size: usize,
}

/// What becomes of a map's contents when another version of the watcher takes over, whose map has
/// another ABI number, type, layout or size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeps {
    /// The watcher writes each entry from what it observes. The other version fills a map of its
    /// own before any program of its own reads it.
    Entries,
    /// The programs write it, of connections that are being made. The other version's map begins
    /// empty, which costs those.
    Flights,
    /// It holds the tunnel's sockets, which nobody can copy: its type and layout never change, and
    /// a larger or smaller one is adopted as it is.
    Sockets,
    /// Nothing that anybody misses: the other version's map begins empty.
    Records,
    /// It is not pinned, and ends with the programs that use it.
    Nothing,
}

impl Keeps {
    /// Whether the map is pinned, so that it outlives the watcher.
    #[must_use]
    pub const fn is_pinned(self) -> bool {
        !matches!(self, Self::Nothing)
    }
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
    /// What becomes of its contents when another version of the watcher takes over.
    pub keeps: Keeps,
    /// Grows with every change of its type, layout or meaning, also one that keeps all sizes: the
    /// name of its pin contains it, so that no version takes another's map for its own.
    pub abi: u32,
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
        written by $writers:literal, read by $readers:literal, keeps $keeps:ident, abi $abi:literal, formerly $formerly:expr,
        $purpose:literal;)+) => {
        $(
            #[doc = $purpose]
            pub const $constant: MapSpec = MapSpec {
                name: $name, kind: $kind, key: layout::<$key>($key_is), value: layout::<$value>($value_is),
                writers: $writers, readers: $readers, keeps: Keeps::$keeps, abi: $abi, formerly: $formerly, purpose: $purpose,
            };
        )+
        /// All of them.
        pub const ALL: &[MapSpec] = &[$($constant),+];
    };
}

maps! {
    CGROUP_INFO = "cgroup_info_map", "hash", u64: "cgroup id", Sealed<CgroupInfo>: "Sealed<CgroupInfo>",
        written by "watcher; `cgroup_mkdir` program", read by "connect, sendmsg, exec programs; watcher",
        keeps Entries, abi 2, formerly None,
        "Which cgroup is which pod or tunnel, and what happens to its traffic.";
    POD_BY_ADDR = "pod_by_addr", "hash", Address: "Address", Sealed<PodRecord>: "Sealed<PodRecord>",
        written by "watcher", read by "connect, sendmsg, tunnel's sock_ops programs; watcher",
        keeps Entries, abi 3, formerly None,
        "The enrolled pod that has an address: which addresses are a pod's own, and of which interface.";
    POD_BY_NETNS = "pod_by_netns", "hash", u64: "netns cookie", Sealed<NetnsInfo>: "Sealed<NetnsInfo>",
        written by "watcher", read by "connect, sendmsg, sk_lookup programs; watcher",
        keeps Entries, abi 2, formerly None,
        "Which netns is which pod's, and what happens to what arrives there, at any address.";
    SETTINGS = "settings", "array of 1", u32: "0", Settings: "Settings",
        written by "watcher", read by "all programs of traffic; watcher", keeps Entries, abi 1, formerly None,
        "What applies to the whole node: ports, whether a tunnel is connected, tracing.";
    EXCLUSION_PORTS = "exclusion_ports", "LPM trie", Lpm<ExcludedPorts>: "ExcludedPorts", Listed: "Listed",
        written by "watcher", read by "connect, sendmsg, sk_lookup programs; watcher", keeps Entries, abi 2, formerly None,
        "Ports that pods exclude from the mesh, or include. Lists have ids, and pods with equal lists share one.";
    EXCLUSION_CIDRS = "exclusion_cidrs", "LPM trie", Lpm<ExcludedCidr>: "ExcludedCidr", Listed: "Listed",
        written by "watcher", read by "connect, sendmsg programs; watcher", keeps Entries, abi 3, formerly None,
        "Address ranges that pods exclude from the mesh, or include, each of one address family.";
    EXCLUSION_IDS = "exclusion_ids", "hash", ExcludedId: "ExcludedId", u8: "1",
        written by "watcher", read by "connect, sendmsg programs; watcher", keeps Entries, abi 1, formerly None,
        "Users and groups whose processes are left alone, and interfaces to which sockets are bound that are, by list.";
    ORIGINAL_DST = "original_dst", "LRU hash", Flow: "Flow", Sealed<Original>: "Sealed<Original>",
        written by "pods' sock_ops program", read by "sk_lookup, tunnel's sock_ops programs",
        keeps Flights, abi 2, formerly None,
        "Where the opener of a redirected connection wanted to go, until the tunnel accepts it.";
    TUNNEL_FLOWS = "tunnel_flows", "LRU hash", Flow: "Flow", Sealed<TunnelFlow>: "Sealed<TunnelFlow>",
        written by "tunnel's sock_ops program", read by "sk_lookup program", keeps Flights, abi 2, formerly None,
        "Connections that the tunnel opens, which pass to the application during their handshake, in the netns \
         they came from.";
    KUBELET_FLOWS = "kubelet_flows", "LRU hash", Flow: "Flow", Sealed<TunnelFlow>: "Sealed<TunnelFlow>",
        written by "kubelet's sock_ops program", read by "sk_lookup program", keeps Flights, abi 1, formerly None,
        "Connections that the kubelet opens, such as its probes, which pass to the application during their \
         handshake.";
    PINNED_CONNECTIONS = "pinned_connections", "hash", u64: "netns cookie", u64: "count",
        written by "tunnel's sock_ops program; watcher removes", read by "watcher",
        keeps Flights, abi 1, formerly Some("deliveries"),
        "How many of the tunnel's connections need the netns prepared: those that use another address than the pod's, \
         and those that the tunnel accepted for the pod.";
    TUNNEL_LISTENERS = "tunnel_listeners", "socket hash", ListenerKey: "ListenerKey", u32: "socket",
        written by "tunnel's sock_ops program; the kernel removes closed sockets",
        read by "sk_lookup, connect, sendmsg programs; watcher (keys)",
        keeps Sockets, abi 1, formerly Some("listeners"),
        "The tunnel's listening sockets, which arrivals are steered to.";
    APP_LISTENERS = "app_listeners", "hash", ListenerKey: "ListenerKey", u32: "1",
        written by "pods' sock_ops program; watcher", read by "sk_lookup program; watcher",
        keeps Entries, abi 1, formerly None,
        "Ports that applications listen on. The tunnel's own listeners may be among them.";
    APP_LISTENER_STATE = "app_listener_state", "hash", u64: "netns cookie", AppListenerState: "AppListenerState",
        written by "watcher; pods' sock_ops program", read by "sk_lookup, pods' sock_ops programs; watcher",
        keeps Entries, abi 1, formerly None,
        "Whether `app_listeners` has every listener of a netns, and how many the programs added.";
    SOCKET_STATE = "socket_state", "socket storage", u32: "socket", SocketState: "SocketState",
        written by "connect, sendmsg, sock_ops, post_bind, sock_create programs",
        read by "the same; getsockopt, getpeername, recvmsg programs", keeps Flights, abi 1, formerly None,
        "What the programs remember of one socket.";
    VERDICTS = "verdicts", "per-CPU hash", u64: "netns cookie", Verdicts: "Verdicts",
        written by "connect, sendmsg, sk_lookup programs; watcher adds and removes", read by "watcher",
        keeps Records, abi 1, formerly None,
        "How often each rule decided about connections of a pod, of all others together (key 0), and of pods that are gone \
         (the last key).";
    TRACE = "trace", "ring buffer", (): "–", (): "–",
        written by "connect, sendmsg, sk_lookup programs", read by "watcher", keeps Records, abi 1, formerly None,
        "One `TraceRecord` per verdict, while tracing is on.";
    TRACE_WATCHED = "trace_watched", "hash", Address: "Address, or as `watched_cgroup`", u32: "1",
        written by "watcher", read by "connect, sendmsg, sk_lookup programs", keeps Nothing, abi 1, formerly None,
        "Addresses, cgroups and netns of the pods that somebody traces.";
    TRACE_LEFT_OUT = "trace_left_out", "LPM trie", Lpm<Address>: "Address", u8: "1",
        written by "watcher", read by "connect, sendmsg, sk_lookup programs", keeps Nothing, abi 1, formerly None,
        "Address ranges that nobody who traces wants to see.";
    LIFECYCLE = "lifecycle", "ring buffer", (): "–", (): "–",
        written by "tracepoint programs, bind programs", read by "watcher", keeps Nothing, abi 1, formerly None,
        "One `PathEvent` or `ProcessEvent` per event of a cgroup or a process.";
    LIFECYCLE_SCOPE = "lifecycle_scope", "array of 1", u32: "0", Scope: "Scope",
        written by "watcher", read by "tracepoint programs", keeps Nothing, abi 1, formerly None,
        "Which cgroups are of interest, and where the running kernel has the fields that name them.";
    LIFECYCLE_BASE = "lifecycle_base", "cgroup array of 1", u32: "0", u32: "cgroup",
        written by "watcher", read by "exec program", keeps Nothing, abi 1, formerly None,
        "The cgroup whose processes are of interest.";
    LIFECYCLE_LOST = "lifecycle_lost", "per-CPU array of 1", u32: "0", u64: "count",
        written by "tracepoint programs", read by "watcher", keeps Nothing, abi 1, formerly None,
        "How many events found no room in `lifecycle`.";
    LIFECYCLE_EVENT = "lifecycle_event", "per-CPU array of 5", u32: "a Kind", PathEvent: "PathEvent",
        written by "tracepoint programs", read by "the same", keeps Nothing, abi 1, formerly None,
        "Room for an event, which is too long for the stack: one for each program.";
    LIFECYCLE_EXECS = "lifecycle_execs", "LRU hash", u64: "cgroup id", u64: "ns since boot",
        written by "exec program", read by "the same", keeps Nothing, abi 1, formerly None,
        "When an exec in a cgroup was last reported.";
    RESERVED_BINDS = "reserved_binds", "LRU hash", ReservedPort: "ReservedPort", ReservedBind: "ReservedBind",
        written by "bind programs", read by "watcher", keeps Nothing, abi 1, formerly None,
        "Which application of a pod last wanted a port that is the tunnel's there.";
    EXPECTED_PODS = "expected_pods", "hash", Name: "Name", Sealed<CgroupInfo>: "Sealed<CgroupInfo>",
        written by "watcher", read by "`cgroup_mkdir` program", keeps Entries, abi 2, formerly None,
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
            "| map | ABI | type | key | value | written by | read by | pinned | purpose |\n|---|---|---|---|---|---|---|---|---|\n",
        );
        let layout = |layout: Layout| match layout.size {
            0 => String::from("–"),
            size => format!("{} ({size})", layout.what),
        };
        for map in ALL {
            let pinned = match (map.keeps, map.formerly) {
                (Keeps::Nothing, _) => String::from("no"),
                (keeps, None) => format!("{keeps:?}").to_lowercase(),
                (keeps, Some(name)) => format!("{keeps:?}, adopts `{name}`").to_lowercase(),
            };
            let _ = writeln!(
                table,
                "| `{}` | {} | {} | {} | {} | {} | {} | {pinned} | {} |",
                map.name,
                map.abi,
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

    /// Where the keys and values are defined.
    const SOURCES: [&str; 9] = [
        include_str!("address.rs"),
        include_str!("enrolment.rs"),
        include_str!("exclusions.rs"),
        include_str!("flows.rs"),
        include_str!("lifecycle.rs"),
        include_str!("listeners.rs"),
        include_str!("sealed.rs"),
        include_str!("settings.rs"),
        include_str!("verdicts.rs"),
    ];

    /// The fields of the type `name`, or what it stands for; empty: it is a number.
    fn definition(name: &str) -> String {
        if let Some(value) = name.strip_prefix("Sealed<").and_then(|rest| rest.strip_suffix('>')) {
            return format!("{} seal: u64,", definition(value));
        }
        let (structure, alias) = (format!("pub struct {name} {{"), format!("pub type {name} = "));
        for source in SOURCES {
            if let Some((_, rest)) = source.split_once(&*structure) {
                let body = rest.split_once("\n}").map_or(rest, |(body, _)| body);
                let fields = body.lines().map(str::trim).filter(|line| line.starts_with("pub "));
                return fields.map(|line| line.trim_start_matches("pub ")).collect::<Vec<_>>().join(" ");
            }
            if let Some((_, rest)) = source.split_once(&*alias) {
                return rest.split_once(";\n").map_or(rest, |(body, _)| body).into();
            }
        }
        String::new()
    }

    /// The ABI of each map that another version may find: its number, and what it stands for.
    fn layouts() -> String {
        let mut text = String::new();
        for map in ALL.iter().filter(|map| map.keeps.is_pinned()) {
            let _ = writeln!(text, "{} {}: {} that keeps {:?}", map.name, map.abi, map.kind, map.keeps);
            for (what, layout) in [("key", map.key), ("value", map.value)] {
                let _ =
                    writeln!(text, "  {what}: {} ({}) {}", layout.what, layout.size, definition(layout.what));
            }
        }
        let flags = SOURCES[1].lines().map(str::trim).filter(|line| line.starts_with("pub const "));
        for flag in flags.filter(|line| line.contains(": u32 = ")) {
            let _ = writeln!(text, "{}", flag.trim_start_matches("pub const "));
        }
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        lines.join("\n") + "\n"
    }

    /// A map that another version may take for its own must not change without a new number. The
    /// meaning of a field or a flag is not seen here: whoever changes it counts up by hand.
    #[test]
    fn a_map_that_changes_gets_another_abi_number() {
        extern crate std;
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/layouts.txt");
        let (known, now) = (std::fs::read_to_string(path).unwrap_or_default(), layouts());
        if known == now {
            return;
        }
        for before in
            known.split_inclusive('\n').collect::<Vec<_>>().chunk_by(|_, next| next.starts_with(' '))
        {
            let (title, before) = (before[0].split(':').next().unwrap_or_default(), before.concat());
            let same_number = now.lines().any(|line| line.split(':').next() == Some(title));
            assert!(
                !same_number || now.contains(&before),
                "{title} is not what it was; give the map another ABI number, unless no version \
                 was ever run with it; before:\n{before}now:\n{now}"
            );
        }
        assert!(testbed::doc_table::is_updating(), "{path} is old; UPDATE_DOCS=1 writes it again");
        std::fs::write(path, now).unwrap();
    }

    #[test]
    fn the_tunnels_sockets_are_in_one_map_that_never_changes() {
        let sockets: Vec<_> = ALL.iter().filter(|map| map.keeps == Keeps::Sockets).collect();
        let [map] = sockets.as_slice() else { panic!("{sockets:?}") };
        let (key, value) = (map.key.size, map.value.size);
        assert_eq!((map.name, map.abi, map.kind, key, value), ("tunnel_listeners", 1, "socket hash", 16, 4));
    }

    #[test]
    fn names_are_unique_in_what_the_kernel_keeps_of_them() {
        for (at, map) in ALL.iter().enumerate() {
            let kept = |map: &MapSpec| map.name.bytes().take(15).collect::<Vec<_>>();
            assert!(ALL[..at].iter().all(|other| kept(other) != kept(map)), "{}", map.name);
        }
    }
}
