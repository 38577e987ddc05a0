//! The PROXY protocol header, version 2, which describes the client to an application (haproxy.org,
//! `proxy-protocol.txt` §2.2).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::identity::Identity;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
/// TCP over IPv4 and over IPv6.
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
/// Istio's type for the client's SPIFFE id. The specification gives 0xD0 no other meaning.
const CLIENT_IDENTITY: u8 = 0xD0;

/// Writes the header. `identity`: the one that the client proved. If the addresses have different
/// families, both are written as IPv6.
pub(super) fn header(client: SocketAddr, target: SocketAddr, identity: Option<&Identity>) -> Vec<u8> {
    let mut body = Vec::with_capacity(128);
    let family = match (client.ip().to_canonical(), target.ip().to_canonical()) {
        (IpAddr::V4(client), IpAddr::V4(target)) => {
            body.extend(client.octets());
            body.extend(target.octets());
            TCP4
        }
        (client, target) => {
            body.extend(v6(client).octets());
            body.extend(v6(target).octets());
            TCP6
        }
    };
    body.extend(client.port().to_be_bytes());
    body.extend(target.port().to_be_bytes());
    if let Some(identity) = identity {
        let identity = identity.to_string();
        // An identity has at most 2048 bytes, so nothing is cut.
        let length = u16::try_from(identity.len()).unwrap_or(u16::MAX);
        body.push(CLIENT_IDENTITY);
        body.extend(length.to_be_bytes());
        body.extend(&identity.as_bytes()[..usize::from(length)]);
    }
    let mut header = Vec::with_capacity(16 + body.len());
    header.extend(SIGNATURE);
    header.extend([VERSION_AND_COMMAND, family]);
    header.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
    header.extend(body);
    header
}

fn v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_laid_out_as_the_protocol_says() {
        let identity: Identity = "spiffe://td/ns/a/sa/b".parse().unwrap();
        let header =
            header("10.0.0.1:4660".parse().unwrap(), "10.96.0.1:80".parse().unwrap(), Some(&identity));
        let mut expected = vec![0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a];
        expected.extend([0x21, 0x11, 0, 12 + 3 + 21]);
        expected.extend([10, 0, 0, 1, 10, 96, 0, 1, 0x12, 0x34, 0, 80]);
        expected.extend([0xd0, 0, 21]);
        expected.extend(b"spiffe://td/ns/a/sa/b");
        assert_eq!(header, expected);
    }

    #[test]
    fn two_families_are_told_as_the_larger_one() {
        let header = header("10.0.0.1:1".parse().unwrap(), "[fd00::1]:2".parse().unwrap(), None);
        assert_eq!(header[13..16], [0x21, 0, 36]);
        let client: [u8; 16] = header[16..32].try_into().unwrap();
        assert_eq!(Ipv6Addr::from(client), "::ffff:10.0.0.1".parse::<Ipv6Addr>().unwrap());
        assert_eq!(header[48..], [0, 1, 0, 2]);
    }
}
