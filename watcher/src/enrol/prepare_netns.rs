//! What a pod's netns needs so that the application sees the client's address.
//!
//! The tunnel dials the application from the client's address, with mark 0x539. Packets with that mark
//! are delivered locally although the address is not ours (one rule and one `local` route for each
//! family), and the application's accepted socket inherits the mark (`tcp_fwmark_accept`), so that its
//! answers come back the same way. Without any one of the three such a connection times out.
//!
//! Taken back, all three, when the pod leaves *and no connection needs them any more*: see
//! [`transparent_sockets`].

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::BorrowedFd,
};

use rtnetlink::{
    Error as NetlinkError, Handle, RouteMessageBuilder,
    packet_route::{
        route::{RouteMessage, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

use crate::observed::netns::{all_own_addresses, run_in};

/// The mark of the tunnel's packets (Istio's number).
const MARK: u32 = 0x539;
/// Our routing table in the pod's netns: the mark, in decimal 1337.
const TABLE: u32 = MARK;
/// Before everything but the kernel's own `local` rule (0).
const PRIORITY: u32 = 1337;
/// One sysctl for both families.
const FWMARK_ACCEPT: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";
/// The interface index of `lo`, which is the first one of every netns.
const LO: u32 = 1;

/// The sysctl's present value.
pub fn fwmark_accept(netns: BorrowedFd<'_>) -> io::Result<String> {
    run_in(netns, || {
        fs::read_to_string(FWMARK_ACCEPT)
            .map(|text| text.trim().to_owned())
            .map_err(|error| at(FWMARK_ACCEPT, &error))
    })
}

/// Prepares `netns`. Done again it changes nothing. `v6`: whether IPv6 has to work there.
pub fn prepare(netns: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    run_in(netns, move || {
        with_netlink(async |handle| {
            for family in [Family::V4, Family::V6] {
                match family.add(&handle).await {
                    // A node may have no IPv6 at all.
                    Err(_) if family == Family::V6 && !v6 => {}
                    result => result?,
                }
            }
            Ok(())
        })?;
        fs::write(FWMARK_ACCEPT, "1").map_err(|error| at(FWMARK_ACCEPT, &error))
    })
}

/// Takes the preparation back; `fwmark_accept` is the value to put back. What is gone already is fine.
pub fn restore(netns: BorrowedFd<'_>, fwmark_accept: String) -> io::Result<()> {
    run_in(netns, move || {
        with_netlink(async |handle| {
            for family in [Family::V4, Family::V6] {
                family.remove(&handle).await?;
            }
            Ok(())
        })?;
        fs::write(FWMARK_ACCEPT, fwmark_accept).map_err(|error| at(FWMARK_ACCEPT, &error))
    })
}

/// How many TCP sockets in `netns` are bound to an address that the netns does not hold. Only the
/// tunnel's connections to the application are (it dials from the client's address), so while there is
/// one, a connection that began before the pod left still rests on the rule and the route.
pub fn transparent_sockets(netns: BorrowedFd<'_>) -> io::Result<usize> {
    run_in(netns, || {
        let own = all_own_addresses()?;
        let mut count = 0;
        for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
            let text = match fs::read_to_string(table) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(at(table, &error)),
            };
            count += text.lines().skip(1).filter_map(local_end).filter(|local| !own.contains(local)).count();
        }
        Ok(count)
    })
}

/// The local address of a line of `/proc/net/tcp{,6}` that is an open connection.
fn local_end(line: &str) -> Option<IpAddr> {
    const TIME_WAIT: &str = "06";
    const LISTEN: &str = "0A";
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, _remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    if state == TIME_WAIT || state == LISTEN {
        return None;
    }
    let (address, _port) = local.split_once(':')?;
    // Words of 32 bits as the machine reads them, of an address in network byte order.
    let mut bytes = Vec::with_capacity(16);
    for word in address.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    let address = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
    };
    (!address.is_unspecified() && !address.is_loopback()).then_some(address)
}

fn at(path: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{path}: {error}"))
}

/// Runs `work` with a netlink socket of the calling thread's netns.
fn with_netlink<T>(work: impl AsyncFnOnce(Handle) -> io::Result<T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let driver = tokio::spawn(connection);
        let result = work(handle).await;
        driver.abort();
        result
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    async fn add(self, handle: &Handle) -> io::Result<()> {
        let rule =
            handle.rule().add().action(RuleAction::ToTable).table_id(TABLE).priority(PRIORITY).fw_mark(MARK);
        let rule = match self {
            Self::V4 => rule.v4().execute().await,
            Self::V6 => rule.v6().execute().await,
        };
        unless(libc::EEXIST, "rule", rule)?;
        unless(libc::EEXIST, "route", handle.route().add(self.route()).execute().await)
    }

    async fn remove(self, handle: &Handle) -> io::Result<()> {
        // No rule, no table, or no IPv6 at all.
        let absent = [libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT, libc::EOPNOTSUPP];
        let rule = unless_any(&absent, "rule", handle.rule().del(self.rule()).execute().await);
        let route = unless_any(&absent, "route", handle.route().del(self.route()).execute().await);
        rule.and(route)
    }

    fn rule(self) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.family = match self {
            Self::V4 => rtnetlink::packet_route::AddressFamily::Inet,
            Self::V6 => rtnetlink::packet_route::AddressFamily::Inet6,
        };
        rule.header.action = RuleAction::ToTable;
        rule.attributes =
            vec![RuleAttribute::Priority(PRIORITY), RuleAttribute::FwMark(MARK), RuleAttribute::Table(TABLE)];
        rule
    }

    /// `local default dev lo`.
    fn route(self) -> RouteMessage {
        match self {
            Self::V4 => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
                .table_id(TABLE)
                .kind(RouteType::Local)
                .scope(RouteScope::Host)
                .output_interface(LO)
                .build(),
            Self::V6 => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(Ipv6Addr::UNSPECIFIED, 0)
                .table_id(TABLE)
                .kind(RouteType::Local)
                .output_interface(LO)
                .build(),
        }
    }
}

fn unless(expected: i32, what: &str, result: Result<(), NetlinkError>) -> io::Result<()> {
    unless_any(&[expected], what, result)
}

/// Takes an error for success if its number is one of `expected`.
fn unless_any(expected: &[i32], what: &str, result: Result<(), NetlinkError>) -> io::Result<()> {
    match result {
        Ok(()) => Ok(()),
        Err(NetlinkError::NetlinkError(message)) if expected.contains(&-message.raw_code()) => Ok(()),
        Err(NetlinkError::NetlinkError(message)) => {
            let error = message.to_io();
            Err(io::Error::new(error.kind(), format!("{what} for mark {MARK:#x}: {error}")))
        }
        Err(error) => Err(io::Error::other(format!("{what} for mark {MARK:#x}: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_of_sockets_is_read() {
        let line =
            |local: &str, state: &str| format!("   0: {local}:1F90 0202000A:D431 {state} 00000000:00000000");
        let read = |local: &str, state: &str| local_end(&line(local, state)).map(|ip| ip.to_string());
        // As x86 and ARM in little endian print them.
        if cfg!(target_endian = "little") {
            assert_eq!(read("0102000A", "01").as_deref(), Some("10.0.2.1"));
            assert_eq!(read("000000FD000000000000000002000000", "08").as_deref(), Some("fd00::2"));
            assert_eq!(read("0000000000000000FFFF00000102000A", "01").as_deref(), Some("10.0.2.1"));
        }
        assert_eq!(read("0102000A", "0A"), None, "a listener");
        assert_eq!(read("0102000A", "06"), None, "TIME_WAIT");
        assert_eq!(read("0100007F", "01"), None, "loopback");
        assert_eq!(local_end("nonsense"), None);
    }
}
