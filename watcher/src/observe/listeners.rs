//! The listening TCP sockets of a netns, as the kernel lists them (sock_diag(7)).

use std::{collections::BTreeSet, io, ops::ControlFlow};

use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags},
};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;

use super::{
    cgroups::CgroupId,
    connections, netlink,
    reserved_ports::{PortSocket, PortSockets},
};

/// A port that others can dial, and 4 or 6: the family of the socket. An IPv6 socket may serve IPv4
/// too.
pub(crate) type Listening = (u16, u32);

/// The listeners of the calling thread's netns that others can dial: not those on loopback. For
/// MPTCP sockets the kernel lists their TCP subflows.
///
/// # Errors
/// The kernel refuses the dump, or the socket cannot be created.
pub(crate) fn listening() -> io::Result<BTreeSet<Listening>> {
    listeners(&[]).map(|listeners| listeners.dialled)
}

/// The listeners of a netns.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    /// Those that others can dial, as of [`listening`].
    pub dialled: BTreeSet<Listening>,
    /// Those on certain ports, on loopback too: one of each port, cgroup and user, and a few of each port.
    pub on_ports: Vec<PortSocket>,
}

/// The listeners of the calling thread's netns, and which of them are on `ports`.
///
/// # Errors
/// As of [`listening`].
pub(crate) fn listeners(ports: &[u16]) -> io::Result<Listeners> {
    let (mut dialled, mut on_ports) = (BTreeSet::new(), PortSockets::default());
    each_listener(|response| {
        dialled.extend(dialled_from_outside(response));
        if ports.contains(&response.header.socket_id.source_port) {
            on_ports.add(PortSocket::of(response, false));
        }
    })?;
    Ok(Listeners { dialled, on_ports: on_ports.into_vec() })
}

/// The ids of the cgroups in which the listeners on `port` were made that others can dial. Before
/// Linux 5.9 the kernel does not say.
///
/// # Errors
/// As of [`listening`].
pub(crate) fn cgroups_listening(port: u16) -> io::Result<BTreeSet<CgroupId>> {
    let mut found = BTreeSet::new();
    each_listener(|response| {
        if dialled_from_outside(response).is_some_and(|(listening, _)| listening == port) {
            found.extend(connections::cgroup_of(response));
        }
    })?;
    Ok(found)
}

fn each_listener(mut visit: impl FnMut(&InetResponse)) -> io::Result<()> {
    let socket = netlink::socket(NETLINK_SOCK_DIAG)?;
    for (family, any) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let request = InetRequest {
            family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::LISTEN,
            socket_id: any,
        };
        netlink::dump(&socket, SockDiagMessage::InetRequest(request), |answer| {
            if let SockDiagMessage::InetResponse(response) = answer {
                visit(&response);
            }
            ControlFlow::Continue(())
        })?;
    }
    Ok(())
}

fn dialled_from_outside(response: &InetResponse) -> Option<Listening> {
    let id = &response.header.socket_id;
    let family = if response.header.family == AF_INET { 4 } else { 6 };
    (!id.source_address.to_canonical().is_loopback()).then_some((id.source_port, family))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn listeners_are_found_but_those_on_loopback() {
        let (any, any6, loopback) = (
            TcpListener::bind("0.0.0.0:0").unwrap(),
            TcpListener::bind("[::]:0").unwrap(),
            TcpListener::bind("127.0.0.1:0").unwrap(),
        );
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let found = listening().unwrap();
        assert!(found.contains(&(port(&any), 4)) && found.contains(&(port(&any6), 6)), "{found:?}");
        assert!(!found.contains(&(port(&loopback), 4)), "{found:?}");
        let on_ports = listeners(&[port(&any), port(&loopback)]).unwrap().on_ports;
        assert!(on_ports.len() == 2 && on_ports.iter().all(|found| found.inode != 0), "{on_ports:?}");
        let own = cgroups_listening(port(&any)).unwrap();
        assert!(own.len() == 1 && own == cgroups_listening(port(&any6)).unwrap(), "{own:?}");
        let gone = port(&any);
        drop(any);
        assert!(!listening().unwrap().contains(&(gone, 4)));
    }
}
