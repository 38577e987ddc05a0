//! Whether something lies behind a pod's netns whose traffic the programs do not see: a virtual
//! machine, or containers of its own.
//!
//! What such a guest sends, or receives, is forwarded: it belongs to no socket of the pod's netns, so
//! nothing redirects it and no policy applies. It shows by what carries it there: a tap device, a
//! bridge with ports, or address translation between two devices.

use std::{collections::BTreeMap, fs, io, ops::ControlFlow};

use netlink_sys::Socket;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
};

use super::{
    netlink::{self, LO},
    nftables,
};

/// At most so many devices are looked at.
const MOST: usize = 1024;

/// A device.
#[derive(Debug, Default)]
struct Device {
    name: String,
    kind: Option<InfoKind>,
    is_ethernet: bool,
    is_up: bool,
    /// The index of the bridge that it is a port of.
    bridge: Option<u32>,
}

/// What shows that the calling thread's netns has a guest; a phrase. `route` is a socket of that
/// netns.
///
/// # Errors
/// The netns cannot be queried.
pub(crate) fn find(route: &Socket) -> io::Result<Option<String>> {
    let devices = devices(route)?;
    if let Some(found) = by_devices(&devices) {
        return Ok(Some(found));
    }
    let up: Vec<&str> = devices.values().filter(|device| device.is_up).map(|device| &*device.name).collect();
    if up.len() < 2 || !is_forwarding() || !translates_addresses()? {
        return Ok(None);
    }
    Ok(Some(format!("forwarding with address translation between {}", up.join(", "))))
}

fn by_devices(devices: &BTreeMap<u32, Device>) -> Option<String> {
    devices.iter().find_map(|(index, Device { name, kind, is_ethernet, .. })| match kind {
        // One of layer 3 is an application's own way out, a VPN for example.
        Some(InfoKind::Tun) if *is_ethernet => Some(format!("tap device {name}")),
        Some(InfoKind::MacVtap | InfoKind::IpVtap) => Some(format!("tap device {name}")),
        Some(InfoKind::Bridge) if devices.values().any(|device| device.bridge == Some(*index)) => {
            Some(format!("bridge {name}"))
        }
        _ => None,
    })
}

fn devices(route: &Socket) -> io::Result<BTreeMap<u32, Device>> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let mut devices = BTreeMap::new();
    netlink::dump(route, RouteNetlinkMessage::GetLink(request), |answer| {
        if let RouteNetlinkMessage::NewLink(link) = answer
            && link.header.index != LO
        {
            devices.insert(link.header.index, device(&link));
        }
        if devices.len() < MOST { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(devices)
}

fn device(link: &LinkMessage) -> Device {
    let mut device = Device {
        is_ethernet: link.header.link_layer_type == LinkLayerType::Ether,
        is_up: link.header.flags.contains(LinkFlags::Up),
        ..Device::default()
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name.clone_from(name),
            LinkAttribute::Controller(index) => device.bridge = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                device.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    device
}

fn is_forwarding() -> bool {
    ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"]
        .iter()
        .any(|path| fs::read_to_string(path).is_ok_and(|value| value.trim() != "0"))
}

/// Whether the netns has rules that translate addresses, of iptables or of nftables.
fn translates_addresses() -> io::Result<bool> {
    let legacy = ["ip_tables_names", "ip6_tables_names"].iter().any(|file| {
        let names = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        names.lines().any(|name| name == "nat")
    });
    Ok(legacy || nftables::chains()?.iter().any(|chain| chain.kind.as_deref() == Some("nat")))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd as _, process::Command, thread};

    use netlink_sys::protocols::NETLINK_ROUTE;

    use crate::observe::netns::run_in;

    use super::*;

    /// What is found in a new netns after these shell commands.
    fn found(script: &str) -> Option<String> {
        let made = thread::scope(|scope| {
            let netns = scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
                let done = Command::new("sh").args(["-ec", script]).status()?;
                assert!(done.success(), "{script}");
                File::open("/proc/thread-self/ns/net")
            });
            netns.join().unwrap().unwrap()
        });
        run_in(made.as_fd(), || find(&netlink::socket(NETLINK_ROUTE)?)).unwrap()
    }

    #[test]
    #[ignore = "makes a netns, needs root: make test"]
    fn guests_are_found_by_what_carries_their_traffic() {
        const POD: &str = "ip link set lo up; ip link add eth0 type veth peer name far; ip link set eth0 up;
            ip link set far up; ip addr add 10.0.0.2/24 dev eth0; echo 1 > /proc/sys/net/ipv4/ip_forward;";
        let rules = "nft add table ip t; nft 'add chain ip t c { type nat hook postrouting priority 100; }'";
        for (more, expected) in [
            (String::new(), None),
            ("ip tuntap add tun0 mode tun; ip link set tun0 up".to_owned(), None),
            ("ip link add br0 type bridge; ip link set br0 up".to_owned(), None),
            ("ip tuntap add tap0 mode tap".to_owned(), Some("tap device tap0")),
            ("ip link add br0 type bridge; ip link set far master br0".to_owned(), Some("bridge br0")),
            (rules.to_owned(), Some("forwarding with address translation between")),
            (format!("{rules}; echo 0 > /proc/sys/net/ipv4/ip_forward"), None),
            (
                "nft add table ip t; nft 'add chain ip t c { type filter hook input priority 0; }'"
                    .to_owned(),
                None,
            ),
        ] {
            let found = found(&format!("{POD} {more}"));
            assert_eq!(found.is_some(), expected.is_some(), "{more}: {found:?}");
            assert!(found.unwrap_or_default().starts_with(expected.unwrap_or_default()), "{more}");
        }
    }
}
