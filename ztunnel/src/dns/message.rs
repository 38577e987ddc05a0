//! Bytes of a query → bytes of a reply, or the decision to forward it. Pure, and safe on any input.

use std::net::IpAddr;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME},
    },
};
use rand::seq::SliceRandom;

use super::names::{self, AddressFamily, DnsClient, DnsZone, FoundName};
use crate::mesh::Mesh;

/// The TTL of our answers, in seconds. Endpoints of headless services change often.
const TTL: u32 = 30;
/// Maximum reply size for a client that announces none (RFC 1035 §4.2.1).
const PLAIN_UDP: u16 = 512;
/// Maximum message size over UDP (RFC 6891 §6.2.5). Messages never leave the loopback.
const LARGEST_UDP: u16 = 4096;
/// Maximum number of addresses in a reply. More do not help a client; 65,535 bytes hold twice as
/// many IPv6 addresses.
const MOST_ADDRESSES: usize = 1000;
/// RFC 1035 §4.1.1.
pub const HEADER: usize = 12;

/// The transport of a query, which limits the size of the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A reply has at most 512 bytes, or what EDNS0 allows.
    Udp,
    /// A reply has at most 65,535 bytes (RFC 1035 §4.2.2).
    Tcp,
}

impl Transport {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// What to do with a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueryOutcome {
    /// Send this reply: the name is ours, or the query is invalid.
    Reply(Vec<u8>),
    /// Forward the query unchanged.
    Forward,
    /// Not a query. Answering replies would cause a loop.
    Ignore,
}

/// A query and what to do with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandledQuery {
    /// The query type as a metric label. Clients choose it, so rare types share `other`.
    pub query_type: &'static str,
    /// What the caller does next.
    pub step: QueryOutcome,
}

/// Answers `query` from `mesh`.
#[must_use]
pub fn answer(
    mesh: &Mesh,
    zone: &DnsZone,
    client: DnsClient<'_>,
    transport: Transport,
    query: &[u8],
) -> HandledQuery {
    let handled = |query_type, step| HandledQuery { query_type, step };
    let failed =
        |code| handled("other", error(query, code).map_or(QueryOutcome::Ignore, QueryOutcome::Reply));
    if query.len() < HEADER || is_response(query) {
        return handled("other", QueryOutcome::Ignore);
    }
    // Updates, notifications and whatever else there is are the resolver's matter.
    if query[2] & 0x78 != u8::from(OpCode::Query) << 3 {
        return handled("other", QueryOutcome::Forward);
    }
    // So is what only the resolver may understand, if it asks one question.
    let Ok(message) = Message::from_vec(query) else {
        let question = question_end(query).is_some_and(|end| end > HEADER);
        return if question {
            handled("other", QueryOutcome::Forward)
        } else {
            failed(ResponseCode::FormErr)
        };
    };
    let question = match &message.queries[..] {
        [question] => question,
        [] => return handled("other", QueryOutcome::Forward),
        _ => return failed(ResponseCode::FormErr),
    };
    let query_type = label(question.query_type());
    if message.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
        let reply = reply(&message, ResponseCode::BADVERS);
        return handled(query_type, encode(&reply, &message, transport));
    }
    if family(question) == AddressFamily::Neither {
        return handled(query_type, QueryOutcome::Forward);
    }
    match find(mesh, zone, client, question) {
        Some(found) if !found.outside_first => {
            handled(query_type, found_reply(found, &message, question, transport))
        }
        _ => handled(query_type, QueryOutcome::Forward),
    }
}

/// The reply to a query for which the resolver knows no such name, if the mesh does: its addresses,
/// or none where another type of record is asked for. Without it, a name with addresses would not
/// exist when it is asked for, say, TXT.
#[must_use]
pub fn answer_instead(
    mesh: &Mesh,
    zone: &DnsZone,
    client: DnsClient<'_>,
    transport: Transport,
    query: &[u8],
) -> Option<Vec<u8>> {
    let message = Message::from_vec(query).ok()?;
    let [question] = &message.queries[..] else { return None };
    let found = find(mesh, zone, client, question).filter(|_| message.metadata.op_code == OpCode::Query)?;
    match found_reply(found, &message, question, transport) {
        QueryOutcome::Reply(reply) => Some(reply),
        QueryOutcome::Forward | QueryOutcome::Ignore => None,
    }
}

fn family(question: &Query) -> AddressFamily {
    match question.query_type() {
        RecordType::A => AddressFamily::V4,
        RecordType::AAAA => AddressFamily::V6,
        _ => AddressFamily::Neither,
    }
}

fn find(mesh: &Mesh, zone: &DnsZone, client: DnsClient<'_>, question: &Query) -> Option<FoundName> {
    let name = text(question.name()).filter(|_| question.query_class() == DNSClass::IN)?;
    names::find(mesh, zone, client, &name, family(question))
}

fn found_reply(
    mut found: FoundName,
    message: &Message,
    question: &Query,
    transport: Transport,
) -> QueryOutcome {
    // Clients use the first address.
    found.addresses.shuffle(&mut rand::rng());
    found.addresses.truncate(MOST_ADDRESSES);
    let mut reply = reply(message, ResponseCode::NoError);
    reply.metadata.authoritative = true;
    let mut owner = question.name().clone();
    if let Some(target) = found.alias_of.and_then(|name| Name::from_ascii(format!("{name}.")).ok())
        && !found.addresses.is_empty()
    {
        reply.add_answer(Record::from_rdata(owner, TTL, RData::CNAME(CNAME(target.clone()))));
        owner = target;
    }
    for ip in found.addresses {
        let data = match ip {
            IpAddr::V4(ip) => RData::A(A(ip)),
            IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
        };
        reply.add_answer(Record::from_rdata(owner.clone(), TTL, data));
    }
    encode(&reply, message, transport)
}

/// A reply with only `code`. `None` if the query has no header.
#[must_use]
pub fn error(query: &[u8], code: ResponseCode) -> Option<Vec<u8>> {
    let header = query.get(..HEADER)?;
    let mut reply = vec![0; HEADER];
    reply[..2].copy_from_slice(&header[..2]);
    // QR; opcode and RD from the query; RA; the code.
    reply[2] = 0x80 | header[2] & 0x79;
    reply[3] = 0x80 | code.low();
    // The reply contains the question if it can be parsed.
    if let Some(question) = question_end(query).and_then(|end| query.get(HEADER..end))
        && !question.is_empty()
    {
        reply[5] = 1;
        reply.extend_from_slice(question);
    }
    Some(reply)
}

/// `reply` without its records, and with the flag that makes the client ask again by TCP. `None` if
/// its question cannot be read.
#[must_use]
pub fn truncated(reply: &[u8]) -> Option<Vec<u8>> {
    let mut short = reply.get(..question_end(reply)?)?.to_vec();
    short[2] |= 0x02;
    short[6..HEADER].fill(0);
    Some(short)
}

/// Whether `reply` answers `query`: the question is the same, ignoring case (RFC 5452 §9.1). Errors
/// may omit it, and so may answers to other operations (RFC 2136 §3.8).
#[must_use]
pub fn answers(query: &[u8], reply: &[u8]) -> bool {
    let count = |message: &[u8]| message.get(4..6).map(|count| [count[0], count[1]]);
    if reply.len() < HEADER || !is_response(reply) || query.get(..2) != reply.get(..2) {
        return false;
    }
    let may_omit = reply[3] & 0x0f != 0 || query[2] & 0x78 != 0;
    match question_end(query) {
        Some(HEADER) => count(reply) == Some([0, 0]),
        Some(end) if count(reply) == Some([0, 1]) => {
            reply.get(HEADER..end).is_some_and(|question| question.eq_ignore_ascii_case(&query[HEADER..end]))
        }
        _ => may_omit && count(reply) == Some([0, 0]),
    }
}

/// The response code of a reply that has a header.
#[must_use]
pub fn code(reply: &[u8]) -> ResponseCode {
    ResponseCode::from(0, reply.get(3).copied().unwrap_or_default() & 0x0f)
}

/// Where the single question of `message` ends; the length of the header if it has none. `None` if
/// it cannot be parsed or has several.
fn question_end(message: &[u8]) -> Option<usize> {
    match message.get(4..6)? {
        [0, 0] => return Some(HEADER),
        [0, 1] => {}
        _ => return None,
    }
    let mut at = HEADER;
    loop {
        match *message.get(at)? {
            0 => break,
            // The question comes first, so there is nothing that a compressed name could point to.
            length @ 1..=63 => at += 1 + usize::from(length),
            64.. => return None,
        }
    }
    let end = at + 5;
    (end <= message.len() && at - HEADER < 255).then_some(end)
}

fn is_response(message: &[u8]) -> bool {
    message[2] & 0x80 != 0
}

fn reply(query: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.add_queries(query.queries.iter().cloned());
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(LARGEST_UDP);
        reply.set_edns(edns);
    }
    reply
}

/// A reply that is too long for UDP: empty, with the flag that makes the client use TCP (RFC 2181
/// §9).
fn encode(reply: &Message, query: &Message, transport: Transport) -> QueryOutcome {
    let announced = query.edns.as_ref().map_or(PLAIN_UDP, Edns::max_payload);
    let limit = match transport {
        Transport::Udp => announced.clamp(PLAIN_UDP, LARGEST_UDP),
        Transport::Tcp => u16::MAX,
    };
    let bytes = match reply.to_vec() {
        Ok(bytes) if bytes.len() <= usize::from(limit) => Ok(bytes),
        _ => reply.truncate().to_vec(),
    };
    bytes.map_or(QueryOutcome::Ignore, QueryOutcome::Reply)
}

/// The name in the form that the mesh uses. `None` if it is not a host name and so cannot be a
/// service.
fn text(name: &Name) -> Option<String> {
    let mut text = String::with_capacity(name.len());
    for label in name {
        if !label.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')) {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        text.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
    }
    (!text.is_empty()).then_some(text)
}

fn label(query_type: RecordType) -> &'static str {
    match query_type {
        RecordType::A => "A",
        RecordType::AAAA => "AAAA",
        RecordType::CNAME => "CNAME",
        RecordType::HTTPS => "HTTPS",
        RecordType::MX => "MX",
        RecordType::NS => "NS",
        RecordType::PTR => "PTR",
        RecordType::SOA => "SOA",
        RecordType::SRV => "SRV",
        RecordType::SVCB => "SVCB",
        RecordType::TXT => "TXT",
        _ => "other",
    }
}

#[cfg(test)]
mod tests;
