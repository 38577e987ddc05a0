//! A resolver of the outer world, which remembers who log it what.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    sync::{Arc, Mutex},
    thread,
};

use hickory_proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{RData, Record, RecordType, rdata::A},
};

use crate::netns::TestNetns;

/// Its addresses: those of the router, which every pod reaches.
pub const RESOLVER_ADDRESSES: [&str; 2] = ["169.254.1.1", "fd77::ffff"];

/// One query as it came in.
#[derive(Clone, Debug)]
pub struct Query {
    /// The name, without the last dot.
    pub name: String,
    /// Where it came from.
    pub client: SocketAddr,
    /// The id of the message.
    pub id: u16,
    /// Whether it came over TCP.
    pub by_tcp: bool,
}

/// A resolver with these names:
///
/// * `*.outside.test` has one IPv4 address, `large.outside.test` fifty
/// * `silent.test` is never answered, `broken.test` with SERVFAIL
/// * all else does not exist
#[derive(Debug)]
pub struct FakeResolver(Arc<Mutex<Vec<Query>>>);

impl FakeResolver {
    /// The threads end with the test process.
    pub fn start(netns: &TestNetns) -> Self {
        let log = Arc::new(Mutex::new(Vec::new()));
        for address in RESOLVER_ADDRESSES {
            let address = SocketAddr::new(address.parse().expect("address"), 53);
            let udp = netns.enter(|| UdpSocket::bind(address)).expect("bind");
            let tcp = netns.enter(|| TcpListener::bind(address)).expect("bind");
            let (by_udp, by_tcp) = (Arc::clone(&log), Arc::clone(&log));
            thread::spawn(move || serve_udp(&udp, &by_udp));
            thread::spawn(move || serve_tcp(&tcp, &by_tcp));
        }
        Self(log)
    }

    /// The queries for `name` so far.
    pub fn queries(&self, name: &str) -> Vec<Query> {
        let all = self.0.lock().expect("lock");
        all.iter().filter(|query| query.name == name).cloned().collect()
    }
}

fn serve_udp(socket: &UdpSocket, log: &Mutex<Vec<Query>>) {
    let mut buffer = [0; 4096];
    while let Ok((length, client)) = socket.recv_from(&mut buffer) {
        if let Some(reply) = reply(&buffer[..length], client, false, log) {
            let _ = socket.send_to(&reply, client);
        }
    }
}

fn serve_tcp(listener: &TcpListener, log: &Mutex<Vec<Query>>) {
    for mut stream in listener.incoming().flatten() {
        let mut length = [0; 2];
        let Ok(client) = stream.peer_addr() else { continue };
        if stream.read_exact(&mut length).is_err() {
            continue;
        }
        let mut query = vec![0; u16::from_be_bytes(length).into()];
        if stream.read_exact(&mut query).is_ok()
            && let Some(reply) = reply(&query, client, true, log)
        {
            let length = u16::try_from(reply.len()).expect("short").to_be_bytes();
            let _ = stream.write_all(&[&length, &reply[..]].concat());
        }
    }
}

fn reply(query: &[u8], client: SocketAddr, by_tcp: bool, log: &Mutex<Vec<Query>>) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).ok()?;
    let question = query.queries.first()?.clone();
    let name = question.name().to_ascii().trim_end_matches('.').to_owned();
    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
    log.lock().expect("lock").push(Query { name: name.clone(), client, id: query.metadata.id, by_tcp });
    let mut reply = Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    let addresses = match name.as_str() {
        "silent.test" => return None,
        "broken.test" => {
            reply.metadata.response_code = ResponseCode::ServFail;
            0
        }
        "large.outside.test" if by_tcp => 50,
        "large.outside.test" => {
            reply.metadata.truncation = true;
            0
        }
        name if name.ends_with(".outside.test") => 1,
        _ => {
            reply.metadata.response_code = ResponseCode::NXDomain;
            0
        }
    };
    if question.query_type() == RecordType::A {
        for number in 0..addresses {
            let IpAddr::V4(ip) = IpAddr::from([192, 0, 2, number]) else { continue };
            reply.add_answer(Record::from_rdata(question.name().clone(), 60, RData::A(A(ip))));
        }
    }
    reply.add_query(question);
    reply.to_vec().ok()
}
