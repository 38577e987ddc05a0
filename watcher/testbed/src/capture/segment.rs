//! One TCP segment, read from the bytes of a packet.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const TCP: u8 = 6;

/// What a segment says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its sender.
    pub from: SocketAddr,
    /// Its receiver.
    pub to: SocketAddr,
    /// The traffic class of its packet.
    pub class: u8,
    /// The flags of TCP.
    pub flags: u8,
    /// Its sequence number.
    pub number: u32,
    /// Bytes of data.
    pub payload: u16,
}

impl Segment {
    /// Whether it asks for a new connection.
    pub fn opens(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// Whether it asks for a connection, or accepts one.
    pub fn is_first(&self) -> bool {
        self.flags & SYN != 0
    }

    /// Whether it only acknowledges.
    pub fn is_bare_acknowledgement(&self) -> bool {
        self.flags & (SYN | FIN | RST | ACK) == ACK && self.payload == 0
    }

    /// Whether it ends a connection that the sender does not want.
    pub fn is_reset(&self) -> bool {
        self.flags & RST != 0
    }
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {} [", self.from, self.to)?;
        for (flag, name) in [(SYN, 'S'), (FIN, 'F'), (RST, 'R'), (ACK, '.')] {
            if self.flags & flag != 0 {
                write!(f, "{name}")?;
            }
        }
        write!(f, "] {} bytes, class {:#x}", self.payload, self.class)
    }
}

/// The segment in a packet that begins with its network header. `None`: it is no TCP, or only a
/// later fragment of it.
pub fn parse(packet: &[u8]) -> Option<Segment> {
    match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 15) * 4;
            let fragment = u16_at(packet, 6)? & 0x1fff;
            if *packet.get(9)? != TCP || fragment != 0 {
                return None;
            }
            let address = |at: usize| -> Option<IpAddr> {
                let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
                Some(Ipv4Addr::from(bytes).into())
            };
            let payload = usize::from(u16_at(packet, 2)?).checked_sub(header)?;
            tcp(packet.get(header..)?, payload, *packet.get(1)?, [address(12)?, address(16)?])
        }
        // No sender here makes extension headers.
        6 => {
            if *packet.get(6)? != TCP {
                return None;
            }
            let class = (packet[0] & 15) << 4 | packet.get(1)? >> 4;
            let address = |at: usize| -> Option<IpAddr> {
                let bytes: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
                Some(Ipv6Addr::from(bytes).into())
            };
            let payload = usize::from(u16_at(packet, 4)?);
            tcp(packet.get(40..)?, payload, class, [address(8)?, address(24)?])
        }
        _ => None,
    }
}

fn tcp(bytes: &[u8], length: usize, class: u8, [from, to]: [IpAddr; 2]) -> Option<Segment> {
    let header = usize::from(bytes.get(12)? >> 4) * 4;
    Some(Segment {
        from: (from, u16_at(bytes, 0)?).into(),
        to: (to, u16_at(bytes, 2)?).into(),
        class,
        flags: *bytes.get(13)?,
        number: u32::from_be_bytes(bytes.get(4..8)?.try_into().ok()?),
        payload: u16::try_from(length.checked_sub(header)?).ok()?,
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp_header(flags: u8, data: &[u8]) -> Vec<u8> {
        let mut bytes = [[0x12, 0x34], [0x1f, 0x90]].concat();
        bytes.extend([0, 0, 0, 7, 0, 0, 0, 0, 5 << 4, flags, 0, 0, 0, 0, 0, 0]);
        bytes.extend(data);
        bytes
    }

    #[test]
    fn both_families_are_read() {
        let segment = tcp_header(SYN, b"");
        let mut v4 = vec![0x45, 0xb8, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        v4.extend(&segment);
        let read = parse(&v4).unwrap();
        assert_eq!(read.to_string(), "10.0.0.1:4660 > 10.0.0.2:8080 [S] 0 bytes, class 0xb8");
        assert!(read.opens() && read.number == 7);
        let segment = tcp_header(ACK, b"hello");
        let mut v6 = vec![0x6b, 0x80, 0, 0, 0, 25, 6, 64];
        v6.extend("fd00::1".parse::<Ipv6Addr>().unwrap().octets());
        v6.extend("fd00::2".parse::<Ipv6Addr>().unwrap().octets());
        v6.extend(&segment);
        let read = parse(&v6).unwrap();
        assert_eq!(read.to_string(), "[fd00::1]:4660 > [fd00::2]:8080 [.] 5 bytes, class 0xb8");
        // What is cut off is no reason to misjudge the rest.
        assert_eq!(parse(&v6[..60]).unwrap().payload, 5);
        assert_eq!(parse(&v6[..50]), None);
    }

    #[test]
    fn what_is_no_segment_is_none() {
        let udp =
            [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 0, 0, 0, 0, 8, 0, 0];
        assert_eq!(parse(&udp), None);
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&[0, 1, 8, 0]), None);
    }
}
