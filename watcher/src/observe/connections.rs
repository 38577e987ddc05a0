//! The TCP connections of a netns, as the kernel lists them (sock_diag(7)), and cutting them.

use std::{collections::BTreeSet, io, net::SocketAddr, ops::ControlFlow};

use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, SockDiagDestroy, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags},
};
use nix::errno::Errno;
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, Nla as _},
    sys::protocols::NETLINK_SOCK_DIAG,
};

use super::{cgroups::CgroupId, netlink};

/// The attribute with the id of a socket's cgroup (Linux 5.9).
const INET_DIAG_CGROUP_ID: u16 = 21;

/// The state of an established connection, as the kernel numbers them.
const TCP_ESTABLISHED: u8 = 1;

/// A connection. Addresses are in their own family, also of a socket of IPv6 that carries IPv4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Connection {
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// The cgroup that its socket was made in; `None`: the kernel does not say.
    pub cgroup_id: Option<CgroupId>,
    /// Who made its socket, as this process numbers users.
    pub uid: u32,
    /// Whether both ends have agreed on it, and neither has closed it.
    pub is_established: bool,
    /// As `/proc/PID/fd` names its socket.
    pub inode: u32,
    family: u8,
    id: SocketId,
}

impl Connection {
    fn of(response: &InetResponse) -> Self {
        let id = response.header.socket_id.clone();
        let cgroup_id = cgroup_of(response);
        Self {
            local: SocketAddr::new(id.source_address.to_canonical(), id.source_port),
            remote: SocketAddr::new(id.destination_address.to_canonical(), id.destination_port),
            cgroup_id,
            uid: response.header.uid,
            is_established: response.header.state == TCP_ESTABLISHED,
            inode: response.header.inode,
            family: response.header.family,
            id,
        }
    }

    /// What the kernel calls its socket: no other one ever has this number.
    pub(crate) fn cookie(&self) -> [u8; 8] {
        self.id.cookie
    }

    /// The number of the interface that its socket is bound to; 0: to none.
    pub(crate) fn device(&self) -> u32 {
        self.id.interface_id
    }

    /// One that exists nowhere, for tests of rules.
    #[cfg(test)]
    pub(crate) fn between(local: &str, remote: &str, cgroup_id: CgroupId) -> Self {
        let (local, remote) = (local.parse().expect("an address"), remote.parse().expect("an address"));
        let id = SocketId::new_v4();
        Self {
            local,
            remote,
            cgroup_id: Some(cgroup_id),
            uid: 0,
            is_established: true,
            inode: 0,
            family: AF_INET,
            id,
        }
    }

    /// The same with another socket.
    #[cfg(test)]
    pub(crate) fn with_cookie(mut self, cookie: [u8; 8]) -> Self {
        self.id.cookie = cookie;
        self
    }
}

/// The cgroup that a socket was made in; `None`: the kernel does not say.
pub(super) fn cgroup_of(response: &InetResponse) -> Option<CgroupId> {
    let nla = response.nlas.iter().find(|nla| nla.kind() == INET_DIAG_CGROUP_ID)?;
    let mut value = [0; 8];
    (nla.value_len() == value.len()).then(|| nla.emit_value(&mut value))?;
    Some(CgroupId::from_ne_bytes(value))
}

/// The connections of the calling thread's netns, from the first SYN until neither end sends any
/// more.
///
/// # Errors
/// The kernel refuses the dump, or the socket cannot be created.
pub(crate) fn connections() -> io::Result<Vec<Connection>> {
    let socket = netlink::socket(NETLINK_SOCK_DIAG)?;
    let mut found = Vec::new();
    for (family, any) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let request = InetRequest {
            family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::all() - StateFlags::LISTEN - StateFlags::TIME_WAIT - StateFlags::CLOSE,
            socket_id: any,
        };
        netlink::dump(&socket, SockDiagMessage::InetRequest(request), |answer| {
            if let SockDiagMessage::InetResponse(response) = answer {
                found.push(Connection::of(&response));
            }
            ControlFlow::Continue(())
        })?;
    }
    Ok(found)
}

/// Cuts connections of the calling thread's netns: both ends see a reset. How many there were; one
/// that has ended meanwhile is no error.
///
/// # Errors
/// `EOPNOTSUPP`: the kernel was built without `CONFIG_INET_DIAG_DESTROY`. Or it refuses.
pub(crate) fn cut(connections: &[Connection]) -> io::Result<usize> {
    let socket = netlink::socket(NETLINK_SOCK_DIAG)?;
    let (mut count, mut answers) = (0, Vec::with_capacity(1024));
    for connection in connections {
        let request = InetRequest {
            family: connection.family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::all(),
            socket_id: connection.id.clone(),
        };
        let destroy = SockDiagDestroy::new(SockDiagMessage::InetRequest(request));
        let mut message = NetlinkMessage::from(destroy);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        message.finalize();
        let mut packet = vec![0; message.buffer_len()];
        message.serialize(&mut packet);
        socket.send(&packet, 0)?;
        for answer in netlink::receive::<SockDiagMessage>(&socket, &mut answers)? {
            if let NetlinkPayload::Error(error) = answer?.payload {
                match error.to_io().raw_os_error() {
                    None | Some(0) => count += 1,
                    Some(errno) if Errno::from_raw(errno) == Errno::ENOENT => {}
                    Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
    }
    Ok(count)
}

/// Whether this kernel can cut connections.
///
/// # Errors
/// As of [`cut`].
pub fn can_cut() -> io::Result<()> {
    // Nothing has this end.
    let nobody = Connection {
        local: SocketAddr::from(([127, 0, 0, 1], 0)),
        remote: SocketAddr::from(([127, 0, 0, 1], 0)),
        cgroup_id: None,
        uid: 0,
        is_established: false,
        inode: 0,
        family: AF_INET,
        id: SocketId { cookie: [0xff; 8], ..SocketId::new_v4() },
    };
    cut(&[nobody]).map(drop)
}

/// Whether a connection stays inside the netns whose connections are `all`, as (local, remote).
pub(crate) fn is_local(connection: &Connection, all: &BTreeSet<(SocketAddr, SocketAddr)>) -> bool {
    connection.local.ip().is_loopback()
        || connection.remote.ip().is_loopback()
        || all.contains(&(connection.remote, connection.local))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn connections_are_listed() {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let near = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let ends = (near.local_addr().unwrap(), near.peer_addr().unwrap());
        let found = connections().unwrap();
        let both = [ends, (ends.1, ends.0)];
        for (local, remote) in both {
            let connection = found.iter().find(|found| (found.local, found.remote) == (local, remote));
            let connection = connection.unwrap_or_else(|| panic!("{local} to {remote} in {found:?}"));
            assert!(connection.cgroup_id.is_some_and(|id| id != 0), "{connection:?}");
            assert!(is_local(connection, &both.into()));
        }
        assert!(!found.iter().any(|found| found.local.port() == 0 || found.remote.port() == 0));
    }

    #[test]
    #[ignore = "needs root: make test"]
    fn a_connection_that_is_cut_is_reset_and_the_others_stay() {
        can_cut().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let [mut cut_one, mut kept] =
            [(); 2].map(|()| (TcpStream::connect(to).unwrap(), listener.accept().unwrap().0));
        let local = cut_one.0.local_addr().unwrap();
        let found: Vec<_> = connections().unwrap().into_iter().filter(|found| found.local == local).collect();
        assert_eq!(cut(&found).unwrap(), 1);
        assert_eq!(cut(&found).unwrap(), 0, "it has ended");
        assert!(cut_one.0.read(&mut [0]).is_err() && cut_one.1.read(&mut [0]).is_err());
        io::Write::write_all(&mut kept.0, b"x").unwrap();
        kept.1.read_exact(&mut [0]).unwrap();
    }
}
