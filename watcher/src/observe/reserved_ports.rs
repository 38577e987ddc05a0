//! Who uses the tunnel's ports in a pod's netns.

use std::{
    collections::BTreeMap,
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_UDP, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
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

/// The UDP sockets of the calling thread's netns that are bound to `port`.
///
/// # Errors
/// The kernel refuses the dump, or the socket cannot be created.
pub(crate) fn bound_udp(port: u16) -> io::Result<Vec<PortSocket>> {
    let socket = netlink::socket(NETLINK_SOCK_DIAG)?;
    let mut found = Vec::new();
    for (family, any) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let request = InetRequest {
            family,
            protocol: IPPROTO_UDP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::all(),
            socket_id: any,
        };
        netlink::dump(&socket, SockDiagMessage::InetRequest(request), |answer| {
            if let SockDiagMessage::InetResponse(response) = answer
                && response.header.socket_id.source_port == port
            {
                let (inode, cgroup_id) = (response.header.inode, connections::cgroup_of(&response));
                let uid = response.header.uid;
                found.push(PortSocket { port, is_udp: true, uid, inode, cgroup_id });
            }
            ControlFlow::Continue(())
        })?;
    }
    Ok(found)
}

/// A process of the cgroup `dir` that has the socket `inode`: its number and name, as far as the first
/// processes and descriptors show it.
pub(crate) fn holder(dir: &Path, inode: u32) -> Option<(i32, String)> {
    let pids = cgroups::processes(dir, PROCESSES).ok()?;
    pids.into_iter().find_map(|pid| {
        let process = Process::new(pid).ok()?;
        let mut descriptors = process.fd().ok()?.take(DESCRIPTORS).filter_map(Result::ok);
        let is_it = descriptors.any(|fd| fd.target == FDTarget::Socket(u64::from(inode)));
        // It may have ended meanwhile, and another one have its number: then it has not the socket.
        is_it.then(|| Some((pid, process.stat().ok()?.comm)))?
    })
}

/// The directory of the cgroup `id` among `known`.
pub(crate) fn dir_of(known: &BTreeMap<PathBuf, CgroupId>, id: CgroupId) -> Option<&Path> {
    known.iter().find(|(_, known)| **known == id).map(|(dir, _)| dir.as_path())
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn a_socket_is_found_with_its_process() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let found = bound_udp(port).unwrap();
        let [only] = found.as_slice() else { panic!("{found:?}") };
        assert!(only.cgroup_id.is_some(), "{only:?}");
        let Some(root) = cgroups::find_root() else { return };
        let own = i32::try_from(std::process::id()).unwrap();
        let dir = cgroups::of_process(&root, own).unwrap();
        assert_eq!(Some(cgroups::id(&dir).unwrap()), only.cgroup_id);
        assert_eq!(dir_of(&[(dir.clone(), 7)].into(), 7), Some(dir.as_path()));
        if cgroups::has_process(&dir, own, PROCESSES).unwrap() {
            assert_eq!(holder(&dir, only.inode).map(|(pid, _)| pid), Some(own));
        }
        drop(socket);
        assert!(bound_udp(port).unwrap().is_empty());
    }
}
