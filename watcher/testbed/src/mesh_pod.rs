//! A pod of a [`TunnelMesh`](crate::tunnel_mesh::TunnelMesh), and small helpers for its
//! connections.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
};

use crate::netns::TestNetns;

/// A pod: a netns on the network of all pods.
#[derive(Debug)]
pub struct MeshPod {
    /// Its netns.
    pub netns: TestNetns,
    /// Its name, also of its service account.
    pub name: String,
    /// Its IPv4 address.
    pub ip: Ipv4Addr,
    /// Its IPv6 address.
    pub ip6: Ipv6Addr,
    /// Its node.
    pub(crate) node: String,
}

impl MeshPod {
    /// Its IPv4 address with a port.
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.ip, port).into()
    }

    /// See [`TestNetns::serve`].
    pub fn serve(&self, port: u16, each: impl Fn(TcpStream, IpAddr) + Send + Clone + 'static) {
        self.netns.serve(port, each);
    }

    /// Sends every byte back twice, after the client's address in a line of its own.
    pub fn serve_double_echo(&self, port: u16) {
        self.serve(port, |mut stream, peer| {
            let mut buffer = [0; 16 << 10];
            if writeln!(stream, "{peer}").is_err() {
                return;
            }
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..n].repeat(2)).is_err() {
                    return;
                }
            }
        });
    }
}

/// The bytes until the end.
///
/// # Errors
/// When the connection is reset.
pub fn read_all(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).map(|_| all)
}

/// The next line, without its end.
///
/// # Errors
/// When the connection ends or is reset before the end of the line.
pub fn read_line(stream: &mut TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            return String::from_utf8(line).map_err(io::Error::other);
        }
        line.push(byte[0]);
    }
}
