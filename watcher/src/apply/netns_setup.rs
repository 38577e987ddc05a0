//! What a pod's netns needs so that the application sees the client's address.
//!
//! The tunnel dials the application from the client's address, with mark 0x539. Packets with that
//! mark are delivered locally although the address is not the pod's (one rule and one `local` route
//! for each family). The application's accepted socket inherits the mark (`tcp_fwmark_accept`), so
//! that its answers return the same way; so does the kernel's refusal when no application listens
//! (`fwmark_reflect`). Without any one of them such a connection times out.
//!
//! The answers of an application that listens on a device (`SO_BINDTODEVICE`) take routes of that
//! device only. So there is a `local` route for each device: it decides about the look-up alone, and
//! the packets use the loopback all the same.
//!
//! `tcp_migrate_req` is for tunnels that replace each other: when a listener closes, a connection
//! that waits there, or whose handshake is under way, moves to the listener of the successor and is
//! not reset (Linux 5.14).
//!
//! `tcp_tw_reuse` gives source ports back a second after their connections ended, also where both
//! ends have the pod's own address: a pod that opens many connections to one destination does not
//! run out of them.
//!
//! All of it is undone when the pod has left *and no connection needs it any more*.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _},
    net::{Ipv4Addr, Ipv6Addr},
    ops::ControlFlow,
    os::{fd::BorrowedFd, unix::fs::FileExt as _},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use rtnetlink::{
    RouteMessageBuilder,
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        link::{LinkFlags, LinkMessage},
        route::{RouteAttribute, RouteMessage, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
    sys::protocols::NETLINK_ROUTE,
};

use crate::{
    observe::{
        netlink,
        netlink::LO,
        netns::{Visitor, run_in},
    },
    plan::PodNetns,
};

/// The mark of the tunnel's packets (Istio's number).
const MARK: u32 = 0x539;
/// Our routing table in the pod's netns: the mark, in decimal 1337.
const TABLE: u32 = MARK;
/// Before everything but the kernel's own `local` rule (0).
const PRIORITY: u32 = 1337;
/// Below the metrics of devices' routes, and above that of `lo`.
const FIRST_METRIC: u32 = 2048;
/// More devices of a netns are not looked at.
const MOST_DEVICES: usize = 16;
/// Directories, and the sysctls in them that are set to 1. Those of TCP hold for both families.
const SYSCTLS: [(&str, &[&str]); 2] = [
    ("/proc/sys/net/ipv4", &["tcp_fwmark_accept", "tcp_migrate_req", "tcp_tw_reuse", "fwmark_reflect"]),
    ("/proc/sys/net/ipv6", &["fwmark_reflect"]),
];

/// The sysctls that we set, of one netns, each with its value.
///
/// They stay open from reading to writing, and are opened by their directory: every netns has its
/// own `net/ipv4`, and the kernel goes through all of that name to find one (`proc_sys_compare`).
/// With many pods that takes longer than everything else.
#[derive(Debug)]
pub(crate) struct Sysctls(Vec<Sysctl>);

#[derive(Debug)]
struct Sysctl {
    path: String,
    file: File,
    value: String,
}

impl Sysctls {
    /// Those of `netns`, as they are now.
    ///
    /// # Errors
    /// The netns cannot be entered, or a sysctl cannot be read.
    pub(crate) fn of(visitor: &Visitor, netns: BorrowedFd<'_>) -> io::Result<Self> {
        visitor.enter(netns, Self::own)
    }

    /// Those of the calling thread's netns. A node may have no IPv6, and an older kernel lacks
    /// some.
    fn own() -> io::Result<Self> {
        let mut found = Vec::new();
        for (dir, names) in SYSCTLS {
            let open =
                |path: &str, flags: OFlag| nix::fcntl::open(path, flags | OFlag::O_CLOEXEC, Mode::empty());
            let folder = match open(dir, OFlag::O_PATH | OFlag::O_DIRECTORY) {
                Err(Errno::ENOENT) => continue,
                folder => folder.map_err(|error| at(dir, &error.into()))?,
            };
            for name in names {
                let path = format!("{dir}/{name}");
                match openat(&folder, *name, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()) {
                    Err(Errno::ENOENT) => {}
                    Err(error) => return Err(at(&path, &error.into())),
                    Ok(file) => {
                        let mut sysctl = Sysctl { path, file: file.into(), value: String::new() };
                        sysctl.read().map_err(|error| at(&sysctl.path, &error))?;
                        found.push(sysctl);
                    }
                }
            }
        }
        Ok(Self(found))
    }

    /// Their values, by path.
    #[must_use]
    pub(crate) fn values(&self) -> BTreeMap<String, String> {
        self.0.iter().map(|sysctl| (sysctl.path.clone(), sysctl.value.clone())).collect()
    }

    /// Sets those for which `value` gives another value.
    fn set<'a>(&self, value: impl Fn(&str) -> Option<&'a str>) -> io::Result<()> {
        let others = |sysctl: &&Sysctl| value(&sysctl.path).is_some_and(|value| sysctl.value != value);
        self.0.iter().filter(others).try_for_each(|sysctl| {
            let value = value(&sysctl.path).unwrap_or_default();
            // The kernel takes a sysctl only as a whole, from offset 0.
            sysctl.file.write_all_at(value.as_bytes(), 0).map_err(|error| at(&sysctl.path, &error))
        })
    }
}

impl Sysctl {
    fn read(&mut self) -> io::Result<()> {
        let mut text = [0; 64];
        let length = self.file.read(&mut text)?;
        String::from_utf8_lossy(&text[..length]).trim().clone_into(&mut self.value);
        Ok(())
    }
}

/// Whether this process may write the sysctls that a pod's netns needs.
///
/// # Errors
/// It may not; with the path.
pub(crate) fn are_writable() -> io::Result<()> {
    Sysctls::own().map(drop)
}

/// Prepares the netns `fd` as `wanted` needs it; its sysctls are `sysctls`. Repeating it changes
/// nothing.
///
/// # Errors
/// The netns cannot be entered, or the kernel refused a change.
pub(crate) fn prepare(
    visitor: &Visitor,
    fd: BorrowedFd<'_>,
    sysctls: &Sysctls,
    wanted: &PodNetns,
) -> io::Result<()> {
    visitor.enter(fd, || {
        let mut requests = Vec::new();
        for family in [Family::V4, Family::V6] {
            // A node may have no IPv6.
            let optional = family == Family::V6 && !wanted.v6;
            requests.push(Request::new(
                "rule for mark 0x539",
                RouteNetlinkMessage::NewRule(family.rule()),
                optional,
            ));
            requests.push(Request::new(
                "route for mark 0x539",
                RouteNetlinkMessage::NewRoute(family.route(LO)),
                optional,
            ));
            // A device may have gone, or have no such family.
            requests.extend(wanted.devices.iter().take(MOST_DEVICES).map(|device| {
                Request::new(
                    "route for mark 0x539",
                    RouteNetlinkMessage::NewRoute(family.route(*device)),
                    true,
                )
            }));
        }
        send_all(&requests, NLM_F_CREATE | NLM_F_EXCL, &[libc::EEXIST])?;
        sysctls.set(|_| Some("1"))
    })
}

/// Undoes the preparation; `sysctls` are the values from before. What is gone already is fine.
///
/// # Errors
/// The netns cannot be entered, or the kernel refused a change.
pub(crate) fn restore(netns: BorrowedFd<'_>, sysctls: &BTreeMap<String, String>) -> io::Result<()> {
    run_in(netns, || {
        let devices = devices()?;
        let mut requests = Vec::new();
        for family in [Family::V4, Family::V6] {
            requests.push(Request::new(
                "rule for mark 0x539",
                RouteNetlinkMessage::DelRule(family.rule()),
                false,
            ));
            requests.push(Request::new(
                "route for mark 0x539",
                RouteNetlinkMessage::DelRoute(family.route(LO)),
                false,
            ));
            requests.extend(devices.iter().map(|device| {
                Request::new(
                    "route for mark 0x539",
                    RouteNetlinkMessage::DelRoute(family.route(*device)),
                    false,
                )
            }));
        }
        // No rule, no table, or no IPv6.
        let absent = [libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::EAFNOSUPPORT, libc::EOPNOTSUPP];
        send_all(&requests, 0, &absent)?;
        // Only those that are ours: the record comes from a file.
        Sysctls::own()?.set(|path| sysctls.get(path).map(String::as_str))
    })
}

/// The devices of the calling thread's netns other than `lo`, as far as they are up.
fn devices() -> io::Result<Vec<u32>> {
    let mut devices = Vec::new();
    let all = RouteNetlinkMessage::GetLink(LinkMessage::default());
    netlink::dump(&netlink::socket(NETLINK_ROUTE)?, all, |answer| {
        if let RouteNetlinkMessage::NewLink(LinkMessage { header, .. }) = answer
            && header.index != LO
            && header.flags.contains(LinkFlags::Up)
        {
            devices.push(header.index);
        }
        if devices.len() < MOST_DEVICES { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(devices)
}

fn at(path: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{path}: {error}"))
}

/// A change, and whether it may fail.
pub(super) struct Request {
    what: &'static str,
    message: RouteNetlinkMessage,
    optional: bool,
}

impl Request {
    pub(super) fn new(what: &'static str, message: RouteNetlinkMessage, optional: bool) -> Self {
        Self { what, message, optional }
    }
}

/// Sends all `requests` to the calling thread's netns in one packet: one system call for all, when
/// many pods come at once. The kernel does them in order and has answered each when sending
/// returns. An error number in `expected` counts as done.
pub(super) fn send_all(requests: &[Request], flags: u16, expected: &[i32]) -> io::Result<()> {
    let socket = netlink::socket(NETLINK_ROUTE)?;
    let mut packet = Vec::with_capacity(512);
    for (i, request) in requests.iter().enumerate() {
        let mut message = NetlinkMessage::from(request.message.clone());
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        message.header.sequence_number = u32::try_from(i).unwrap_or(u32::MAX);
        message.finalize();
        let start = packet.len();
        packet.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut packet[start..]);
    }
    socket.send(&packet, 0)?;
    // An answer holds its request and nothing else.
    let mut answers = Vec::with_capacity(4096);
    let mut answered = 0;
    let mut problem = None;
    while answered < requests.len() {
        for answer in netlink::receive::<RouteNetlinkMessage>(&socket, &mut answers)? {
            let answer = answer?;
            let NetlinkPayload::Error(error) = answer.payload else { continue };
            answered += 1;
            let request = requests.get(answer.header.sequence_number as usize);
            let done = error.code.is_none() || expected.contains(&-error.raw_code());
            if let Some(request) = request.filter(|request| !done && !request.optional && problem.is_none()) {
                let error = error.to_io();
                let text = format!("{}: {error}", request.what);
                problem = Some(io::Error::new(error.kind(), text));
            }
        }
    }
    problem.map_or(Ok(()), Err)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn rule(self) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.family = match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        };
        rule.header.action = RuleAction::ToTable;
        rule.attributes =
            vec![RuleAttribute::Priority(PRIORITY), RuleAttribute::FwMark(MARK), RuleAttribute::Table(TABLE)];
        rule
    }

    /// `local default dev lo`, or the same of another device, which is less preferred.
    fn route(self, device: u32) -> RouteMessage {
        let mut route = local_route(self == Self::V4, TABLE, device);
        if device != LO {
            // The kernel's default is 0 for IPv4 and 1024 for IPv6. Each route has its own: the
            // kernel takes two of one for the same route, or for two ways of one.
            route.attributes.push(RouteAttribute::Priority(FIRST_METRIC.saturating_add(device)));
        }
        route
    }
}

/// The route of `table` by which every address is this netns's own, when a packet comes by `device`.
pub(super) fn local_route(v4: bool, table: u32, device: u32) -> RouteMessage {
    if v4 {
        return RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
            .table_id(table)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .output_interface(device)
            .build();
    }
    RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(Ipv6Addr::UNSPECIFIED, 0)
        .table_id(table)
        .kind(RouteType::Local)
        .output_interface(device)
        .build()
}
