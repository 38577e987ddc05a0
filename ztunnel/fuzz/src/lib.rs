//! Every parser of the tunnel that a pod, a peer, the node agent or the control plane can reach, and
//! those of our control plane that tunnels can, as a function from any bytes. It must return, in little time, and what it says must agree with
//! itself: that is asserted here.
//!
//! `make fuzz` looks for bytes that break this (libFuzzer, by `src/main.rs`); the tests run what is
//! known, `seeds/TARGET/*`.

use std::{io::Cursor, sync::OnceLock};

use prost_types::Any;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use ztunnel::{
    discovery::{
        ADDRESS, AUTHORIZATION, ResourceDecoder,
        delta::Subscription,
        last_state::{KeptState, Origin, Piece, file_of},
    },
    dns::{
        message::{self, QueryOutcome, Transport},
        names::{DnsClient, DnsZone},
    },
    hbone::{ConnectTarget, forwarded_host},
    identity::{self, Identity, TlsParameters},
    mesh::{
        Mesh, baggage,
        local_file::{self, ResourceDefaults},
    },
    pods::zds,
};
use ztunnel_control::{callers::claimed_account, certificates::csr};

/// A parser and its name.
pub type Fuzzed = (&'static str, fn(&[u8]));

/// Every parser of input that others can reach.
pub const TARGETS: &[Fuzzed] = &[
    ("authority", authority),
    ("baggage", header_baggage),
    ("ca_answer", ca_answer),
    ("certificate", certificate),
    ("control_csr", control_csr),
    ("control_token", control_token),
    ("dns_query", dns_query),
    ("dns_reply", dns_reply),
    ("forwarded", forwarded),
    ("identity", spiffe_id),
    ("last_state", last_state),
    ("mesh_file", mesh_file),
    ("xds_address", address_resource),
    ("xds_policy", policy_resource),
    ("zds", node_agent),
];

/// `:authority` of a peer's CONNECT.
fn authority(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(target) = text.parse::<ConnectTarget>() else { return };
    let (port, written) = match &target {
        ConnectTarget::Address(address) => (address.port(), address.to_string()),
        ConnectTarget::Host { name, port } => (*port, format!("{name}:{port}")),
    };
    assert_ne!(port, 0, "port 0 is nobody's");
    assert_eq!(written.parse(), Ok(target), "what is written is read as the same");
}

/// The lines of a peer's `baggage`.
fn header_baggage(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let parsed = baggage::parse(text.split('\n'));
    for value in [&parsed.cluster_id, &parsed.namespace, &parsed.workload_name, &parsed.service_name] {
        assert!(value.as_ref().is_none_or(|value| !value.is_empty()), "an empty value is none");
    }
}

/// A peer's `forwarded`.
fn forwarded(data: &[u8]) {
    // As the header's value comes: what is no header is refused before.
    let Ok(value) = http::HeaderValue::from_bytes(data) else { return };
    let Ok(text) = value.to_str() else { return };
    if let Some(host) = forwarded_host(text) {
        assert!(text.contains(host), "the host is a part of the header");
    }
}

/// A SPIFFE id, as it stands in certificates.
fn spiffe_id(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(id) = text.parse::<Identity>() {
        assert_eq!(id.to_string(), text, "two texts are two identities");
    }
}

/// A peer's certificate, after TLS has checked who signed it.
fn certificate(data: &[u8]) {
    let leaf = [CertificateDer::from(data)];
    if let Ok(id) = identity::peer_identity(Some(&leaf)) {
        assert_eq!(id.to_string().parse::<Identity>().as_ref(), Ok(&id));
    }
}

/// What a tunnel asks our control plane to sign: PEM, or what is in it.
fn control_csr(data: &[u8]) {
    static ASKED: OnceLock<Identity> = OnceLock::new();
    let asked = ASKED.get_or_init(|| "spiffe://cluster.local/ns/demo/sa/web".parse().expect("an identity"));
    let pem = match std::str::from_utf8(data) {
        Ok(text) if text.starts_with("-----") => text.to_owned(),
        _ => pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", data)),
    };
    if let Ok(key) = csr::key_for(&pem, asked) {
        assert!(matches!(key.der_bytes(), [4, point @ ..] if point.len() == 64), "a point of P-256");
    }
}

/// The token of whoever calls our control plane, before the API server is asked.
fn control_token(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(account) = claimed_account(text) {
        assert_eq!(text.split('.').count(), 3, "header, claims and signature");
        assert!(account.to_string().contains('/'));
    }
}

/// The certificate service's answer: texts, here parted by NUL.
fn ca_answer(data: &[u8]) {
    static OURS: OnceLock<(PrivateKeyDer<'static>, TlsParameters)> = OnceLock::new();
    let (key, tls) = OURS.get_or_init(|| {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("PKCS#8");
        (key, TlsParameters::default())
    });
    let Ok(text) = std::str::from_utf8(data) else { return };
    let asked = "spiffe://cluster.local/ns/default/sa/web".parse().expect("an identity");
    let answer: Vec<String> = text.split('\0').map(str::to_owned).collect();
    assert!(
        identity::credentials_from_response(&asked, key, &answer, tls).is_err(),
        "nobody else has a certificate for our key"
    );
}

/// What a pod asks, against a mesh that has something to answer.
fn dns_query(data: &[u8]) {
    static MESH: OnceLock<(Mesh, DnsZone)> = OnceLock::new();
    let (mesh, zone) = MESH.get_or_init(|| {
        let document = include_str!("../seeds/mesh_file/full");
        let mesh = local_file::parse(document, &defaults()).expect("the seed is good");
        (mesh, DnsZone::new("cluster.local", None, true))
    });
    for transport in [Transport::Udp, Transport::Tcp] {
        let client = DnsClient { namespace: "demo", network: "" };
        let reply = match message::answer(mesh, zone, client, transport, data).step {
            QueryOutcome::Reply(reply) => Some(reply),
            QueryOutcome::Forward => message::answer_instead(mesh, zone, client, transport, data),
            QueryOutcome::Ignore => None,
        };
        let Some(reply) = reply else { continue };
        assert_eq!(reply[..2], data[..2], "the id");
        assert_ne!(reply[2] & 0x80, 0, "a reply says that it is one");
        assert!(transport == Transport::Tcp || reply.len() <= 4096, "a datagram of {} bytes", reply.len());
    }
}

/// What the resolver of the outer world, or whoever speaks in its name, sends back: for what we
/// asked, and for itself.
fn dns_reply(data: &[u8]) {
    let asked = include_bytes!("../seeds/dns_query/a");
    if message::answers(asked, data) {
        assert_eq!(asked[..2], data[..2], "another id answers another question");
    }
    let _ = (message::answers(data, data), message::code(data));
    if message::answers(asked, data) {
        let short = message::truncated(data).expect("its question was read");
        assert!(short.len() <= 300, "a question and no more");
    }
}

fn defaults() -> ResourceDefaults {
    ResourceDefaults { cluster_id: "Kubernetes".into(), trust_domain: "cluster.local".into() }
}

/// The mesh file, which may come from a config map that others edit.
fn mesh_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = local_file::parse(text, &defaults());
}

/// A workload or service of the control plane.
fn address_resource(data: &[u8]) {
    resource(ADDRESS, data);
}

/// A policy of the control plane.
fn policy_resource(data: &[u8]) {
    resource(AUTHORIZATION, data);
}

fn resource(type_url: &str, data: &[u8]) {
    let sent = Any { type_url: type_url.to_owned(), value: data.to_vec() };
    if let Ok(change) = ResourceDecoder::new(defaults()).decode(&sent) {
        // What was taken can be part of a mesh.
        let _ = Mesh::default().with([change]);
    }
}

/// What a tunnel has kept of the control plane's state: a file, or, where its first byte is zero,
/// the records of one, each behind its length in one byte.
fn last_state(data: &[u8]) {
    let file = match data {
        [0, rest @ ..] => {
            let mut rest = rest;
            let records = std::iter::from_fn(|| {
                let (length, behind) = rest.split_first()?;
                let (record, others) = behind.split_at_checked(usize::from(*length))?;
                rest = others;
                Some(record)
            });
            file_of(records).expect("short records")
        }
        file => file.to_vec(),
    };
    // Also without its end.
    for end in [file.len(), file.len().saturating_sub(1), file.len() / 2] {
        read_state(&file[..end]);
    }
}

fn read_state(file: &[u8]) {
    let Ok(mut state) = KeptState::open(Cursor::new(file), &Origin::default()) else { return };
    let decoder = ResourceDecoder::new(defaults());
    let mut told = [ADDRESS, AUTHORIZATION].map(Subscription::new);
    let mut mesh = Mesh::default();
    let replayed = state.replay(|piece| {
        let Piece::Response(response) = piece else { return };
        let subscription = told.iter_mut().find(|told| told.type_url() == response.type_url);
        mesh = mesh.with(subscription.expect("a known type").apply(&decoder, response).changes);
    });
    replayed.expect("what was found whole is read");
}

/// A packet of the node agent.
fn node_agent(data: &[u8]) {
    if let Ok(zds::ZdsMessage::Add { uid, info }) = zds::decode(data) {
        assert!(!uid.is_empty() && !info.name.is_empty() && !info.service_account.is_empty());
    }
}
