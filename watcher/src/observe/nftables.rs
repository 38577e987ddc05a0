//! The nftables of the calling thread's netns, iptables' among them where that is of the nft kind.
//!
//! Netlink by hand: no crate that we use knows these messages (`linux/netfilter/nf_tables.h`).

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;

use super::netlink;

/// At most so many answers are read, each of up to [`netlink::LARGEST`] bytes: a few thousand rules.
/// A pod that may change its nftables must not make whoever lists them work without end.
const MOST: usize = 64;
/// `nlmsghdr`.
const HEADER: usize = 16;
/// `nfgenmsg`, which begins with the family.
const GENERIC: usize = 4;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// The upper two bits of an attribute's type are flags.
const TYPE_MASK: u16 = 0x3fff;

/// `NFT_MSG_…`.
#[derive(Clone, Copy)]
enum Message {
    DelTable = 2,
    GetChain = 4,
    DelChain = 5,
    GetRule = 7,
    DelRule = 8,
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// `NFPROTO_…`: 1 inet, 2 ip, 10 ip6.
    pub family: u8,
    pub table: String,
    pub name: String,
    /// Of a chain that the kernel calls itself: `filter`, `nat` or `route`.
    pub kind: Option<String>,
}

/// A rule whose only effect is to go on in another chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Jump {
    pub family: u8,
    pub table: String,
    pub chain: String,
    pub handle: u64,
    /// The other chain.
    pub to: String,
}

/// What is to be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// A table with all that is in it.
    Table { family: u8, table: String },
    /// One rule.
    Rule { family: u8, table: String, chain: String, handle: u64 },
    /// A chain that no rule leads to, with its rules.
    Chain { family: u8, table: String, chain: String },
}

impl Removal {
    /// The table that it is in.
    pub(crate) fn table(&self) -> &str {
        let (Self::Table { table, .. } | Self::Rule { table, .. } | Self::Chain { table, .. }) = self;
        table
    }
}

/// All chains. A kernel without nftables has none.
///
/// # Errors
/// There are no netlink sockets of this kind, or there are too many objects.
pub(crate) fn chains() -> io::Result<Vec<Chain>> {
    const TABLE: u16 = 1;
    const NAME: u16 = 3;
    const KIND: u16 = 7;
    let mut chains = Vec::new();
    dump(Message::GetChain, |family, attributes| {
        if let (Some(table), Some(name)) = (text(attributes, TABLE), text(attributes, NAME)) {
            chains.push(Chain { family, table, name, kind: text(attributes, KIND) });
        }
    })?;
    Ok(chains)
}

/// All rules that lead to another chain and restrict nothing.
///
/// # Errors
/// As of [`chains`].
pub(crate) fn jumps() -> io::Result<Vec<Jump>> {
    const TABLE: u16 = 1;
    const CHAIN: u16 = 2;
    const HANDLE: u16 = 3;
    const EXPRESSIONS: u16 = 4;
    let mut jumps = Vec::new();
    dump(Message::GetRule, |family, attributes| {
        let handle = attribute(attributes, HANDLE).and_then(|bytes| bytes.try_into().ok());
        if let (Some(table), Some(chain), Some(handle), Some(to)) = (
            text(attributes, TABLE),
            text(attributes, CHAIN),
            handle.map(u64::from_be_bytes),
            attribute(attributes, EXPRESSIONS).and_then(destination),
        ) {
            jumps.push(Jump { family, table, chain, handle, to });
        }
    })?;
    Ok(jumps)
}

/// Where a rule of these expressions leads, if it does nothing else but count.
fn destination(expressions: &[u8]) -> Option<String> {
    const NAME: u16 = 1;
    const DATA: u16 = 2;
    /// Below the data of `immediate`: the value, in it a verdict, in it a chain.
    const PATH: [u16; 3] = [2, 2, 2];
    let mut found = None;
    for (_, expression) in Attributes(expressions) {
        let data = attribute(expression, DATA)?;
        match text(expression, NAME)?.as_str() {
            "counter" => {}
            "immediate" => {
                let chain =
                    PATH.iter().try_fold(data, |bytes, kind| attribute(bytes, *kind)).and_then(as_text);
                found = Some(chain?);
            }
            _ => return None,
        }
    }
    found
}

/// Removes all of `removals`, or nothing.
///
/// # Errors
/// The kernel refuses one of them.
pub(crate) fn remove(removals: &[Removal]) -> io::Result<()> {
    let socket = netlink::socket(NETLINK_NETFILTER)?;
    let mut batch = Vec::new();
    push(&mut batch, BATCH_BEGIN, REQUEST, 0, &[]);
    let mut expected = 0;
    let mut add = |message, family, attributes: &[u8]| {
        push(&mut batch, kind(message), REQUEST | ACK, family, attributes);
        expected += 1;
    };
    for removal in removals {
        match removal {
            Removal::Table { family, table } => add(Message::DelTable, *family, &named(1, table)),
            Removal::Rule { family, table, chain, handle } => {
                let place = [named(1, table), named(2, chain), encoded(3, &handle.to_be_bytes())];
                add(Message::DelRule, *family, &place.concat());
            }
            Removal::Chain { family, table, chain } => {
                // Without a handle it is all rules of the chain.
                add(Message::DelRule, *family, &[named(1, table), named(2, chain)].concat());
                add(Message::DelChain, *family, &[named(1, table), named(3, chain)].concat());
            }
        }
    }
    push(&mut batch, BATCH_END, REQUEST, 0, &[]);
    socket.send(&batch, 0)?;
    let mut answers = Vec::with_capacity(netlink::LARGEST);
    let mut answered = 0;
    while answered < expected {
        answers.clear();
        socket.recv(&mut answers, 0)?;
        for (kind, body) in Messages(&answers) {
            let code = body.get(..4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
            match (kind, code) {
                (ERROR, Some(0)) => answered += 1,
                (ERROR, Some(code)) => return Err(io::Error::from_raw_os_error(-code)),
                _ => {}
            }
        }
    }
    Ok(())
}

fn kind(message: Message) -> u16 {
    SUBSYSTEM << 8 | message as u16
}

/// Passes family and attributes of each object that the kernel lists to `take`.
fn dump(message: Message, mut take: impl FnMut(u8, &[u8])) -> io::Result<()> {
    let socket = netlink::socket(NETLINK_NETFILTER)?;
    let mut request = Vec::new();
    push(&mut request, kind(message), REQUEST | DUMP, 0, &[]);
    socket.send(&request, 0)?;
    let mut answers = Vec::with_capacity(netlink::LARGEST);
    for _ in 0..MOST {
        answers.clear();
        socket.recv(&mut answers, 0)?;
        for (kind, body) in Messages(&answers) {
            match (kind, body.split_at_checked(GENERIC)) {
                // A kernel without nftables has none of these objects either.
                (DONE | ERROR, _) | (_, None) => return Ok(()),
                (_, Some((generic, attributes))) => take(generic[0], attributes),
            }
        }
    }
    Err(io::Error::other("the netns has more nftables rules than are looked through"))
}

/// Appends a message. Of a batch's first and last message the last two bytes of `nfgenmsg` say whose
/// it is; other messages do not use them.
fn push(packet: &mut Vec<u8>, kind: u16, flags: u16, family: u8, attributes: &[u8]) {
    let length = u32::try_from(HEADER + GENERIC + attributes.len()).unwrap_or(u32::MAX);
    packet.extend(length.to_ne_bytes());
    packet.extend(kind.to_ne_bytes());
    packet.extend(flags.to_ne_bytes());
    // Neither a number nor a sender: there is one request at a time.
    packet.extend([0; 8]);
    packet.extend([family, 0]);
    packet.extend(SUBSYSTEM.to_be_bytes());
    packet.extend(attributes);
}

fn encoded(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn named(kind: u16, name: &str) -> Vec<u8> {
    encoded(kind, &[name.as_bytes(), &[0]].concat())
}

fn text(attributes: &[u8], kind: u16) -> Option<String> {
    as_text(attribute(attributes, kind)?)
}

fn as_text(bytes: &[u8]) -> Option<String> {
    String::from_utf8(bytes.strip_suffix(&[0]).unwrap_or(bytes).to_vec()).ok()
}

fn attribute(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    Attributes(attributes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// Type and body of each message, up to one that is broken.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = u32::from_ne_bytes(self.0.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(self.0.get(4..6)?.try_into().ok()?);
        let body = self.0.get(HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    }
}

/// Type and value of each attribute, up to one that is broken.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?);
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & TYPE_MASK, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_bytes_are_nothing() {
        for bytes in [&[][..], &[1, 0], &[3, 0, 7, 0], &[200, 0, 7, 0, b'n'], &[0, 0, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(text(bytes, 7), None, "{bytes:?}");
            assert_eq!(Messages(bytes).next(), None, "{bytes:?}");
            assert_eq!(destination(bytes), None, "{bytes:?}");
        }
        assert_eq!(text(&named(7, "nat"), 7).as_deref(), Some("nat"));
        assert_eq!(text(&named(7 | 0x8000, "nat"), 7).as_deref(), Some("nat"));
        assert_eq!(text(&[named(6, "x"), named(7, "route")].concat(), 7).as_deref(), Some("route"));
    }

    #[test]
    fn a_rule_that_restricts_something_is_no_jump() {
        let expression = |name: &str, data: &[u8]| encoded(1, &[named(1, name), encoded(2, data)].concat());
        let jump = encoded(2, &encoded(2, &[encoded(1, &[0; 4]), named(2, "there")].concat()));
        let jump = expression("immediate", &jump);
        let counter = expression("counter", &[]);
        assert_eq!(destination(&jump).as_deref(), Some("there"));
        assert_eq!(destination(&[counter.clone(), jump.clone()].concat()).as_deref(), Some("there"));
        assert_eq!(destination(&[expression("meta", &[]), jump].concat()), None);
        assert_eq!(destination(&counter), None);
        // A verdict without a chain: accept, drop.
        let accept = encoded(2, &encoded(2, &encoded(1, &[0; 4])));
        assert_eq!(destination(&expression("immediate", &accept)), None);
    }
}
