//! The DNS sockets of one pod, all in its netns.

use std::{
    io,
    net::{Ipv6Addr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

use crate::{pod::ServedPod, socket::SocketOptions};

const BACKLOG: i32 = 256;

/// The sockets of one address. Either both exist or neither.
#[derive(Debug)]
pub(crate) struct DnsSockets {
    pub udp: std::net::UdpSocket,
    /// The listener. Our watcher's kernel programs take it as the sign that the tunnel serves DNS
    /// here, so it is opened after the UDP socket.
    pub tcp: std::net::TcpListener,
}

/// Listens on `address`, and on `::1` beside `127.0.0.1` where the netns has it. Call inside the
/// pod's netns.
pub(crate) fn listen(
    address: SocketAddr,
    ipv6: bool,
    options: &SocketOptions,
) -> io::Result<Vec<DnsSockets>> {
    let mut pairs = vec![pair(address, options)?];
    if ipv6 && address.is_ipv4() && address.ip().is_loopback() {
        match pair(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), address.port()), options) {
            Ok(second) => pairs.push(second),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(pairs)
}

fn pair(address: SocketAddr, options: &SocketOptions) -> io::Result<DnsSockets> {
    let bound = |kind, protocol| {
        let socket = new(address, kind, protocol, options)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_port(options.port_reuse)?;
        if kind == Type::STREAM {
            socket.set_reuse_address(true)?;
        }
        socket.bind(&address.into())?;
        io::Result::Ok(socket)
    };
    let udp = bound(Type::DGRAM, Protocol::UDP)?;
    let tcp = bound(Type::STREAM, Protocol::TCP)?;
    tcp.listen(BACKLOG)?;
    Ok(DnsSockets { udp: udp.into(), tcp: tcp.into() })
}

/// A socket in `pod`'s netns that receives datagrams only from `to`. The kernel chooses its port,
/// as random as the port range allows (RFC 5452 §9.2).
pub(crate) fn connected(pod: &ServedPod, to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = pod.netns.enter(|| {
        let socket = new(to, Type::DGRAM, Protocol::UDP, &pod.socket)?;
        socket.connect(&to.into())?;
        Ok(socket)
    })?;
    UdpSocket::from_std(socket.into())
}

/// Finds the resolver that `client`, a socket of the pod that sent a datagram here, asked. Our
/// watcher's kernel programs know it: they turn the tunnel's connection to a captured client into
/// one to that resolver. `None` without them, or where the client is gone.
pub(crate) fn asked(pod: &ServedPod, client: SocketAddr) -> Option<(SocketAddr, UdpSocket)> {
    let socket = connected(pod, client).ok()?;
    let peer = socket.peer_addr().ok()?;
    let same = (peer.ip().to_canonical(), peer.port()) == (client.ip().to_canonical(), client.port());
    (!same).then_some((peer, socket))
}

fn new(family_of: SocketAddr, kind: Type, protocol: Protocol, options: &SocketOptions) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(family_of), kind.nonblocking(), Some(protocol))?;
    if options.mark != 0 {
        socket.set_mark(options.mark)?;
    }
    Ok(socket)
}
