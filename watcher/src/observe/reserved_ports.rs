//! Who uses the tunnel's ports in a pod's netns.

use std::{
    collections::BTreeMap,
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags},
};
use procfs::process::{FDTarget, Process};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;

use super::{
    cgroups::{self, CgroupId},
    connections, netlink,
};

/// Processes of one cgroup that are asked for a socket, and descriptors of each.
const PROCESSES: usize = 64;
const DESCRIPTORS: usize = 1024;
/// Descriptors that are read for all sockets of one pod together.
const ALL_DESCRIPTORS: usize = 2048;
/// Sockets of one port that are told: those of different cgroups or users.
const OF_ONE_PORT: usize = 8;
/// Sockets of one family and protocol that are read.
const READ: usize = 4096;

/// A socket on one of the tunnel's ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortSocket {
    /// Which port.
    pub port: u16,
    /// Whether it is of UDP.
    pub is_udp: bool,
    /// Who made it, as this process numbers users.
    pub uid: u32,
    /// As `/proc/PID/fd` names it.
    pub inode: u32,
    /// The cgroup that it was made in; `None`: the kernel does not say.
    pub cgroup_id: Option<CgroupId>,
}

/// Sockets on ports, of which a pod may have any number: one of each port, cgroup and user, and a few of
/// each port.
#[derive(Clone, Debug, Default)]
pub(crate) struct PortSockets(Vec<PortSocket>);

impl PortSockets {
    /// Takes `socket` in if it tells something.
    pub(crate) fn add(&mut self, socket: PortSocket) {
        let of_port = || self.0.iter().filter(|other| other.port_of() == socket.port_of());
        let is_known = of_port().any(|other| (other.cgroup_id, other.uid) == (socket.cgroup_id, socket.uid));
        if !is_known && of_port().count() < OF_ONE_PORT {
            self.0.push(socket);
        }
    }

    /// What was taken in.
    pub(crate) fn into_vec(self) -> Vec<PortSocket> {
        self.0
    }
}

impl PortSocket {
    /// The port, and whether it is of UDP.
    pub(crate) fn port_of(&self) -> (u16, bool) {
        (self.port, self.is_udp)
    }
}

/// What of the calling thread's netns listens on TCP ports `tcp`, and is bound to the UDP port `udp`.
/// Where a netns has very many sockets, of the first ones.
///
/// # Errors
/// The kernel refuses the dump, or the socket cannot be created.
pub(crate) fn on_ports(tcp: &[u16], udp: u16) -> io::Result<Vec<PortSocket>> {
    let mut found = PortSockets::default();
    for (family, any) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        read(&mut found, family, IPPROTO_TCP, any.clone(), tcp)?;
        // The kernel sends those of one port only, if one is named.
        read(&mut found, family, IPPROTO_UDP, SocketId { source_port: udp, ..any }, &[udp])?;
    }
    Ok(found.into_vec())
}

fn read(
    found: &mut PortSockets,
    family: u8,
    protocol: u8,
    socket_id: SocketId,
    ports: &[u16],
) -> io::Result<()> {
    let is_udp = protocol == IPPROTO_UDP;
    let states = if is_udp { StateFlags::all() } else { StateFlags::LISTEN };
    let request = InetRequest { family, protocol, extensions: ExtensionFlags::empty(), states, socket_id };
    let mut left = READ;
    netlink::dump(&netlink::socket(NETLINK_SOCK_DIAG)?, SockDiagMessage::InetRequest(request), |answer| {
        if let SockDiagMessage::InetResponse(response) = answer
            && ports.contains(&response.header.socket_id.source_port)
        {
            found.add(PortSocket::of(&response, is_udp));
        }
        left -= 1;
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}

impl PortSocket {
    /// As the kernel tells of it.
    pub(super) fn of(response: &InetResponse, is_udp: bool) -> Self {
        let (port, uid) = (response.header.socket_id.source_port, response.header.uid);
        let (inode, cgroup_id) = (response.header.inode, connections::cgroup_of(response));
        Self { port, is_udp, uid, inode, cgroup_id }
    }
}

/// Looks for the processes that have sockets of one pod. How many descriptors it reads has a limit, for
/// all of them together.
#[derive(Debug)]
pub(crate) struct Holders {
    left: usize,
}

impl Holders {
    /// A new search.
    pub(crate) const fn new() -> Self {
        Self { left: ALL_DESCRIPTORS }
    }

    /// A process that has the socket `inode`, its number and name, as far as the first processes and
    /// descriptors show it: `likely`, or one of the cgroup `dir`.
    pub(crate) fn find(&mut self, dir: &Path, likely: Option<i32>, inode: u32) -> Option<(i32, String)> {
        likely.and_then(|pid| self.has(pid, inode)).or_else(|| {
            let pids = cgroups::processes(dir, PROCESSES).ok()?;
            pids.into_iter().find_map(|pid| self.has(pid, inode))
        })
    }

    /// The real group of a process of the cgroup `dir` that has the socket `inode`; `None`: none is found.
    pub(crate) fn group(&mut self, dir: &Path, inode: u32) -> Option<u32> {
        let (pid, _) = self.find(dir, None, inode)?;
        Some(Process::new(pid).ok()?.status().ok()?.rgid)
    }

    fn has(&mut self, pid: i32, inode: u32) -> Option<(i32, String)> {
        if self.left == 0 {
            return None;
        }
        let process = Process::new(pid).ok()?;
        let mut descriptors = process.fd().ok()?.take(DESCRIPTORS.min(self.left));
        let is_it = descriptors.any(|fd| {
            self.left -= 1;
            fd.is_ok_and(|fd| fd.target == FDTarget::Socket(u64::from(inode)))
        });
        // It may have ended meanwhile, and another one have its number: then it has not the socket.
        is_it.then(|| Some((pid, process.stat().ok()?.comm)))?
    }
}

/// The directory of the cgroup `id` among `known`.
pub(crate) fn dir_of(known: &BTreeMap<PathBuf, CgroupId>, id: CgroupId) -> Option<&Path> {
    known.iter().find(|(_, known)| **known == id).map(|(dir, _)| dir.as_path())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn a_socket_is_found_with_its_process() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let found = on_ports(&[], port).unwrap();
        let [only] = found.as_slice() else { panic!("{found:?}") };
        assert!(only.cgroup_id.is_some(), "{only:?}");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let listens = listener.local_addr().unwrap().port();
        assert_eq!(on_ports(&[listens], 1).unwrap().len(), 1);
        let Some(root) = cgroups::find_root() else { return };
        let own = i32::try_from(std::process::id()).unwrap();
        let dir = cgroups::of_process(&root, own).unwrap();
        assert_eq!(Some(cgroups::id(&dir).unwrap()), only.cgroup_id);
        assert_eq!(dir_of(&[(dir.clone(), 7)].into(), 7), Some(dir.as_path()));
        let find = |dir: &Path, likely| Holders::new().find(dir, likely, only.inode).map(|(pid, _)| pid);
        assert_eq!(find(Path::new("/nowhere"), Some(own)), Some(own));
        if cgroups::has_process(&dir, own, PROCESSES).unwrap() {
            assert_eq!(find(&dir, None), Some(own));
        }
        assert_eq!(Holders::new().group(Path::new("/nowhere"), only.inode), None);
        let mut spent = Holders { left: 1 };
        assert_eq!(spent.find(&dir, Some(own), only.inode), None);
        assert_eq!(spent.left, 0);
        drop(socket);
        assert!(on_ports(&[], port).unwrap().is_empty());
    }

    #[test]
    fn any_number_of_sockets_tells_a_few_things() {
        let mut found = PortSockets::default();
        let socket = |inode, uid, cgroup| PortSocket {
            port: 15053,
            is_udp: inode % 2 == 0,
            uid,
            inode,
            cgroup_id: Some(cgroup),
        };
        for inode in 0..10_000 {
            found.add(socket(inode, 0, 1));
        }
        assert_eq!(found.0.len(), 2, "one of each protocol");
        for other in 0..10_000 {
            found.add(socket(other, other, 2));
        }
        assert_eq!(found.into_vec().len(), 2 * OF_ONE_PORT);
    }

    /// Each of a pod's sockets may share its port with any number of others.
    #[test]
    fn a_port_that_many_sockets_share_is_one_result() {
        use nix::sys::socket::{
            AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt,
        };
        let bound = |port| {
            let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).unwrap();
            setsockopt(&fd, sockopt::ReusePort, &true).unwrap();
            bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrIn::new(127, 0, 0, 2, port)).unwrap();
            UdpSocket::from(fd)
        };
        let first = bound(0);
        let port = first.local_addr().unwrap().port();
        let _others: Vec<UdpSocket> = (0..300).map(|_| bound(port)).collect();
        assert_eq!(on_ports(&[], port).unwrap().len(), 1);
    }
}
