use std::{collections::HashSet, net::Ipv4Addr};

use hickory_proto::op::Query;

use super::*;
use crate::mesh::{
    Service,
    tests::{ip, service},
};

fn mesh() -> Mesh {
    let six = Service { vips: vec![("".into(), ip("fd00::1"))], ..service("six", "10.1.0.1") };
    let vips = (0..100).map(|n| ("".into(), Ipv4Addr::new(10, 2, 0, n).into())).collect();
    let many = Service { vips, ..service("many", "10.1.0.1") };
    let far_too_many = (0..5000u32).map(|n| ("".into(), Ipv4Addr::from(0x0a03_0000 + n).into())).collect();
    let far_too_many = Service { vips: far_too_many, ..service("most", "10.1.0.1") };
    Mesh::new([], [service("web", "10.1.0.1"), six, many, far_too_many], [])
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn handle(bytes: &[u8], transport: Transport) -> HandledQuery {
    let zone = DnsZone::new("cluster.local", None, true);
    answer(&mesh(), &zone, DnsClient { namespace: "default", network: "" }, transport, bytes)
}

fn replied(message: &Message, transport: Transport) -> Message {
    match handle(&message.to_vec().unwrap(), transport).step {
        QueryOutcome::Reply(bytes) => Message::from_vec(&bytes).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn addresses(message: &Message) -> Vec<IpAddr> {
    let address = |record: &Record| match &record.data {
        RData::A(ip) => Some(ip.0.into()),
        RData::AAAA(ip) => Some(ip.0.into()),
        _ => None,
    };
    message.answers.iter().filter_map(address).collect()
}

#[test]
fn a_service_is_answered_in_the_case_in_which_it_was_asked_for() {
    let reply = replied(&query("WeB.default.SVC.cluster.local.", RecordType::A), Transport::Udp);
    assert_eq!(reply.metadata.id, 4711);
    assert!(
        reply.metadata.authoritative
            && reply.metadata.recursion_available
            && reply.metadata.recursion_desired
    );
    assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
    assert_eq!(reply.queries[0].name().to_ascii(), "WeB.default.SVC.cluster.local.");
    assert_eq!(addresses(&reply), [ip("10.1.0.1")]);
    assert_eq!(reply.answers[0].ttl, 30);
}

#[test]
fn a_name_without_an_address_of_the_family_exists_all_the_same() {
    let reply = replied(&query("web.default.svc.cluster.local.", RecordType::AAAA), Transport::Udp);
    assert_eq!((reply.metadata.response_code, reply.answers.len()), (ResponseCode::NoError, 0));
    let reply = replied(&query("six.", RecordType::AAAA), Transport::Udp);
    assert_eq!(addresses(&reply), [ip("fd00::1")]);
}

#[test]
fn an_alias_leads_to_the_name_without_the_search_domain() {
    let reply = replied(&query("web.default.default.svc.cluster.local.", RecordType::A), Transport::Udp);
    let alias = &reply.answers[0];
    assert_eq!(alias.data, RData::CNAME(CNAME(Name::from_ascii("web.default.").unwrap())));
    assert_eq!(reply.answers[1].name.to_ascii(), "web.default.");
    assert_eq!(addresses(&reply), [ip("10.1.0.1")]);
}

#[test]
fn other_names_and_other_types_are_forwarded() {
    for (name, kind, label) in [
        ("www.example.org.", RecordType::A, "A"),
        ("nosuch.default.svc.cluster.local.", RecordType::AAAA, "AAAA"),
        ("web.default.svc.cluster.local.", RecordType::SRV, "SRV"),
        ("web.", RecordType::TXT, "TXT"),
        ("web.", RecordType::Unknown(4242), "other"),
        (".", RecordType::A, "A"),
        ("we\\.b.", RecordType::A, "A"),
    ] {
        let handled = handle(&query(name, kind).to_vec().unwrap(), Transport::Udp);
        assert_eq!(handled, HandledQuery { query_type: label, step: QueryOutcome::Forward }, "{name} {kind}");
    }
    let mut other_class = query("web.", RecordType::A);
    other_class.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(handle(&other_class.to_vec().unwrap(), Transport::Udp).step, QueryOutcome::Forward);
}

#[test]
fn an_answer_too_long_for_udp_sends_the_client_to_tcp() {
    let mut query = query("many.", RecordType::A);
    let reply = replied(&query, Transport::Udp);
    assert!(reply.metadata.truncation && reply.answers.is_empty());
    let reply = replied(&query, Transport::Tcp);
    assert!(!reply.metadata.truncation);
    assert_eq!(addresses(&reply).len(), 100);

    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    query.set_edns(edns);
    let reply = replied(&query, Transport::Udp);
    assert!(!reply.metadata.truncation && reply.edns.is_some());
    assert_eq!(addresses(&reply).len(), 100);
}

#[test]
fn addresses_come_in_any_order_and_not_without_limit() {
    let orders: HashSet<_> =
        (0..10).map(|_| addresses(&replied(&query("many.", RecordType::A), Transport::Tcp))).collect();
    assert!(orders.len() > 1);
    let reply = replied(&query("most.", RecordType::A), Transport::Tcp);
    assert_eq!(addresses(&reply).len(), 1000);
}

#[test]
fn what_is_no_query_is_refused_and_what_is_an_answer_is_ignored() {
    let mut two = query("web.", RecordType::A);
    two.add_query(Query::query(Name::from_ascii("six.").unwrap(), RecordType::A));
    assert_eq!(replied(&two, Transport::Udp).metadata.response_code, ResponseCode::FormErr);

    let mut later = query("web.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_version(1);
    later.set_edns(edns);
    // 16 is BADSIG too, where a signature is the matter.
    assert_eq!(
        u16::from(replied(&later, Transport::Udp).metadata.response_code),
        u16::from(ResponseCode::BADVERS)
    );

    let mut response = query("web.", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    assert_eq!(handle(&response.to_vec().unwrap(), Transport::Udp).step, QueryOutcome::Ignore);
    assert_eq!(handle(b"short", Transport::Udp).step, QueryOutcome::Ignore);
}

#[test]
fn no_bytes_are_too_strange() {
    let valid = query("web.default.svc.cluster.local.", RecordType::A).to_vec().unwrap();
    for end in 0..valid.len() {
        handle(&valid[..end], Transport::Udp);
    }
    for at in 0..valid.len() {
        for value in [0, 1, 0x3f, 0x40, 0x7f, 0x80, 0xc0, 0xff] {
            let mut bytes = valid.clone();
            bytes[at] = value;
            let handled = handle(&bytes, Transport::Tcp);
            if let QueryOutcome::Reply(reply) = handled.step {
                assert!(reply.len() >= HEADER && is_response(&reply), "{bytes:?}");
                assert_eq!(reply[..2], bytes[..2]);
            }
            let _ = error(&bytes, ResponseCode::ServFail);
            let _ = answers(&valid, &bytes);
            let _ = answers(&bytes, &valid);
        }
    }
    let cut = handle(&valid[..HEADER + 3], Transport::Udp).step;
    let QueryOutcome::Reply(reply) = cut else { panic!("{cut:?}") };
    assert_eq!(Message::from_vec(&reply).unwrap().metadata.response_code, ResponseCode::FormErr);
}

#[test]
fn only_the_answer_to_the_same_question_counts() {
    let sent = query("www.Example.org.", RecordType::A);
    let bytes = sent.to_vec().unwrap();
    let encoded = |message: Message| message.to_vec().unwrap();
    let good = reply(&query("www.eXample.org.", RecordType::A), ResponseCode::NoError);
    assert!(answers(&bytes, &encoded(good.clone())));
    assert!(!answers(&bytes, &bytes), "a query");
    let mut other = good.clone();
    other.metadata.id = 1;
    assert!(!answers(&bytes, &encoded(other)));
    assert!(!answers(
        &bytes,
        &encoded(reply(&query("www.example.com.", RecordType::A), ResponseCode::NoError))
    ));
    assert!(!answers(
        &bytes,
        &encoded(reply(&query("www.example.org.", RecordType::AAAA), ResponseCode::NoError))
    ));
    let mut bare = good;
    bare.queries.clear();
    assert!(!answers(&bytes, &encoded(bare.clone())), "no question, and no error");
    bare.metadata.response_code = ResponseCode::FormErr;
    assert!(answers(&bytes, &encoded(bare)));
}

#[test]
fn an_error_repeats_the_question() {
    let sent = query("www.example.org.", RecordType::A);
    let failed = Message::from_vec(&error(&sent.to_vec().unwrap(), ResponseCode::ServFail).unwrap()).unwrap();
    assert_eq!(failed.metadata.response_code, ResponseCode::ServFail);
    assert_eq!((failed.metadata.id, failed.queries), (4711, sent.queries.clone()));
    assert_eq!(
        code(&error(&sent.to_vec().unwrap(), ResponseCode::ServFail).unwrap()),
        ResponseCode::ServFail
    );
}

#[test]
fn other_operations_and_what_only_the_resolver_understands_are_forwarded() {
    let mut update = query("web.", RecordType::SOA);
    update.metadata.op_code = OpCode::Update;
    let mut unread = query("web.", RecordType::A).to_vec().unwrap();
    // One additional record, of which there is only half.
    unread[11] = 1;
    unread.extend([0, 0, 41]);
    for (what, bytes) in [
        ("update", update.to_vec().unwrap()),
        ("notify", {
            update.metadata.op_code = OpCode::Notify;
            update.to_vec().unwrap()
        }),
        ("no question", Message::new(1, MessageType::Query, OpCode::Query).to_vec().unwrap()),
        ("half a record", unread),
    ] {
        assert_eq!(handle(&bytes, Transport::Udp).step, QueryOutcome::Forward, "{what}");
    }
    update.metadata.op_code = OpCode::Update;
    let (update, mut reply) = (update.to_vec().unwrap(), update.to_vec().unwrap()[..HEADER].to_vec());
    reply[2] |= 0x80;
    reply[4..HEADER].fill(0);
    assert!(answers(&update, &reply), "an answer to an update may be a header alone");
}

#[test]
fn a_name_of_the_mesh_exists_for_every_type_of_record() {
    let zone = DnsZone::new("cluster.local", None, true);
    let instead = |name: &str, kind| {
        let bytes = query(name, kind).to_vec().unwrap();
        let client = DnsClient { namespace: "default", network: "" };
        answer_instead(&mesh(), &zone, client, Transport::Udp, &bytes)
            .map(|reply| Message::from_vec(&reply).unwrap())
    };
    for kind in [RecordType::TXT, RecordType::HTTPS, RecordType::MX, RecordType::Unknown(4242)] {
        let reply = instead("web.default.svc.cluster.local.", kind).unwrap();
        assert_eq!((reply.metadata.response_code, reply.answers.len()), (ResponseCode::NoError, 0), "{kind}");
        assert_eq!(instead("nosuch.default.svc.cluster.local.", kind), None);
    }
}

#[test]
fn two_labels_are_a_name_of_the_outside_world_first() {
    let bytes = query("web.default.", RecordType::A).to_vec().unwrap();
    assert_eq!(handle(&bytes, Transport::Udp).step, QueryOutcome::Forward);
    let zone = DnsZone::new("cluster.local", None, true);
    let client = DnsClient { namespace: "default", network: "" };
    let reply = answer_instead(&mesh(), &zone, client, Transport::Udp, &bytes).unwrap();
    assert_eq!(addresses(&Message::from_vec(&reply).unwrap()), [ip("10.1.0.1")]);
}

#[test]
fn a_reply_that_is_too_long_to_keep_is_cut_to_its_question() {
    let long = replied(&query("many.", RecordType::A), Transport::Tcp).to_vec().unwrap();
    let short = Message::from_vec(&truncated(&long).unwrap()).unwrap();
    assert!(short.metadata.truncation && short.answers.is_empty());
    assert_eq!(short.queries[0].name().to_ascii(), "many.");
}
