use std::time::Duration;

use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, pki_types::PrivateKeyDer};

use super::*;
use crate::identity::{Credentials, development_ca::DevelopmentCa};

const HOUR: Duration = Duration::from_hours(1);

fn id(text: &str) -> Identity {
    text.parse().unwrap()
}

fn web() -> Identity {
    id("spiffe://cluster.local/ns/shop/sa/web")
}

fn client() -> Identity {
    id("spiffe://cluster.local/ns/shop/sa/client")
}

struct Ca {
    ca: DevelopmentCa,
    _folder: tempfile::TempDir,
}

impl Ca {
    fn new() -> Self {
        Self::living(HOUR)
    }

    fn living(life: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = DevelopmentCa::open(folder.path(), life, TlsParameters::default()).unwrap();
        Self { ca, _folder: folder }
    }

    fn sign(&self, identity: &Identity) -> Credentials {
        use crate::identity::authority::Authority;
        futures_util::FutureExt::now_or_never(self.ca.issue(identity)).unwrap().unwrap()
    }
}

struct Shaken {
    client: ClientConnection,
    server: ServerConnection,
}

/// Carries a handshake out in memory. The first error of either side ends it.
fn shake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Result<Shaken, Error> {
    let name = ServerName::IpAddress("10.0.0.1".parse::<std::net::IpAddr>().unwrap().into());
    let mut client = ClientConnection::new(client, name).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    for _ in 0..10 {
        let mut flight = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut flight).unwrap();
        }
        server.read_tls(&mut &flight[..]).unwrap();
        server.process_new_packets()?;
        let mut flight = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut flight).unwrap();
        }
        client.read_tls(&mut &flight[..]).unwrap();
        client.process_new_packets()?;
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok(Shaken { client, server })
}

#[test]
fn two_of_one_mesh_know_each_other() {
    let ca = Ca::new();
    let (server, client_side) = (ca.sign(&web()), ca.sign(&client()));
    let shaken = shake(client_side.client(&[web()]), server.server()).unwrap();
    assert_eq!(peer_identity(shaken.server.peer_certificates()), Ok(client()));
    assert_eq!(peer_identity(shaken.client.peer_certificates()), Ok(web()));
    assert_eq!(shaken.server.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(shaken.server.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(shaken.server.server_name(), None);
}

#[test]
fn a_second_handshake_is_resumed_and_keeps_the_identity() {
    let ca = Ca::new();
    let (server, client_side) = (ca.sign(&web()), ca.sign(&client()));
    shake(client_side.client(&[web()]), server.server()).unwrap();
    let again = shake(client_side.client(&[web()]), server.server()).unwrap();
    assert_eq!(again.server.handshake_kind(), Some(rustls::HandshakeKind::Resumed));
    assert_eq!(peer_identity(again.server.peer_certificates()), Ok(client()));
    // A client that expects another identity does not resume, and is refused.
    let error = shake(client_side.client(&[client()]), server.server()).err().unwrap();
    assert!(error.to_string().contains("expected SAN"), "{error}");
}

#[test]
fn a_server_with_another_identity_is_refused_by_name() {
    let ca = Ca::new();
    let (server, client_side) = (ca.sign(&web()), ca.sign(&client()));
    let expected =
        [id("spiffe://cluster.local/ns/shop/sa/db"), id("spiffe://cluster.local/ns/shop/sa/cache")];
    let error = shake(client_side.client(&expected), server.server()).err().unwrap().to_string();
    for name in ["sa/cache or spiffe", "sa/db", "got [spiffe://cluster.local/ns/shop/sa/web]"] {
        assert!(error.contains(name), "{name} in {error}");
    }
    shake(client_side.client(&[expected[0].clone(), web()]), server.server()).unwrap();
}

#[test]
fn a_client_of_another_trust_domain_is_refused() {
    let ca = Ca::new();
    let foreign = ca.sign(&id("spiffe://other.example/ns/shop/sa/client"));
    let server = ca.sign(&web());
    let error = shake(foreign.client(&[web()]), server.server()).err().unwrap().to_string();
    assert!(error.contains("spiffe://cluster.local/..") && error.contains("other.example"), "{error}");
}

/// While a mesh is renamed, either side may have a certificate of the old name, and the mesh may know
/// it by the new one.
#[test]
fn an_alias_of_the_trust_domain_is_the_own_one_for_clients_and_servers() {
    let folder = tempfile::tempdir().unwrap();
    let tls = TlsParameters::default()
        .with_trust(MeshTrust::of_aliases(["cluster.local".into(), "old.example".into()].into()));
    let ca = DevelopmentCa::open(folder.path(), HOUR, tls).unwrap();
    let ca = Ca { ca, _folder: folder };
    let old = |account: &str| id(&format!("spiffe://old.example/ns/shop/sa/{account}"));
    for (from, server, expected) in
        [(old("client"), web(), web()), (client(), old("web"), web()), (client(), web(), old("web"))]
    {
        let shaken = shake(ca.sign(&from).client(&[expected]), ca.sign(&server).server()).unwrap();
        assert_eq!(peer_identity(shaken.server.peer_certificates()), Ok(from));
        assert_eq!(peer_identity(shaken.client.peer_certificates()), Ok(server));
    }
    let db = [id("spiffe://cluster.local/ns/shop/sa/db"), old("db")];
    let error = shake(ca.sign(&client()).client(&db), ca.sign(&old("web")).server()).err().unwrap();
    assert!(error.to_string().contains("expected SAN"), "{error}");
    let foreign = ca.sign(&id("spiffe://other.example/ns/shop/sa/client"));
    let error = shake(foreign.client(&[web()]), ca.sign(&web()).server()).err().unwrap().to_string();
    assert!(error.contains("spiffe://cluster.local/.. or spiffe://old.example/.."), "{error}");
}

#[test]
fn another_root_is_refused_by_both_sides() {
    let (ours, theirs) = (Ca::new(), Ca::new());
    let (server, stranger) = (ours.sign(&web()), theirs.sign(&client()));
    let error = shake(stranger.client(&[web()]), server.server()).err().unwrap();
    assert!(matches!(error, Error::InvalidCertificate(CertificateError::UnknownIssuer)), "{error}");

    // A client that trusts us, with a certificate that we do not trust.
    let mut config = (*ours.sign(&client()).client(&[web()])).clone();
    config.client_auth_cert_resolver = stranger.client(&[web()]).client_auth_cert_resolver.clone();
    let error = shake(Arc::new(config), server.server()).err().unwrap();
    assert!(matches!(error, Error::InvalidCertificate(CertificateError::UnknownIssuer)), "{error}");
}

#[test]
fn a_client_without_certificate_is_refused() {
    let ca = Ca::new();
    let server = ca.sign(&web());
    let verifier =
        ExpectedServer::new(roots_of(&server), vec![web()], &web().trust_domain, &TlsParameters::default());
    let config = ClientConfig::builder_with_provider(TlsParameters::default().provider)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    let error = shake(Arc::new(config), server.server()).err().unwrap();
    assert!(matches!(error, Error::NoCertificatesPresented), "{error}");
}

#[test]
fn no_alpn_is_fine_and_another_protocol_is_not() {
    let ca = Ca::new();
    let (server, client_side) = (ca.sign(&web()), ca.sign(&client()));
    let with = |protocols: Vec<Vec<u8>>| {
        let mut config = (*client_side.client(&[web()])).clone();
        config.alpn_protocols = protocols;
        shake(Arc::new(config), server.server())
    };
    with(vec![]).unwrap();
    let error = with(vec![b"http/1.1".to_vec()]).err().unwrap();
    assert!(matches!(error, Error::NoApplicationProtocol), "{error}");
}

#[test]
fn tls_1_2_and_other_ciphers_are_not_offered() {
    let provider = TlsParameters::default().provider;
    let suites: Vec<_> = provider.cipher_suites.iter().map(rustls::SupportedCipherSuite::suite).collect();
    assert_eq!(suites, [CipherSuite::TLS13_AES_256_GCM_SHA384, CipherSuite::TLS13_AES_128_GCM_SHA256]);
}

#[test]
fn two_configurations_of_one_process_differ() {
    let with_tls12 = TlsParameters::new(TlsConfig { tls12: true, ..TlsConfig::default() });
    assert_eq!(with_tls12.versions(), [&TLS13, &TLS12]);
    assert_eq!(TlsParameters::default().versions(), [&TLS13], "another configuration of the same process");
    let post_quantum = TlsParameters::new(TlsConfig { only_post_quantum: true, ..TlsConfig::default() });
    let groups: Vec<_> = post_quantum.provider.kx_groups.iter().map(|group| group.name()).collect();
    assert_eq!(groups, [NamedGroup::X25519MLKEM768]);
}

#[test]
fn an_expired_certificate_is_no_identity() {
    use rcgen::{CertificateParams, KeyPair, SanType, date_time_ymd};
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(web().to_string().try_into().unwrap())];
    let valid = params.self_signed(&key).unwrap();
    assert_eq!(peer_identity(Some(&[valid.der().clone()])), Ok(web()));
    params.not_before = date_time_ymd(2001, 1, 1);
    params.not_after = date_time_ymd(2001, 1, 2);
    let expired = params.self_signed(&key).unwrap();
    assert_eq!(peer_identity(Some(&[expired.der().clone()])), Err(NoIdentity::Expired));
    assert_eq!(peer_identity(None), Err(NoIdentity::Missing));
    assert_eq!(peer_identity(Some(&[])), Err(NoIdentity::Missing));
}

#[test]
fn credentials_need_their_own_key_and_name() {
    let ca = Ca::new();
    let signed = ca.sign(&web());
    let other_key = PrivateKeyDer::try_from(rcgen::KeyPair::generate().unwrap().serialize_der()).unwrap();
    let made = |identity, roots: &[_]| {
        let (chain, tls) = (signed.chain().to_vec(), TlsParameters::default());
        Credentials::new(identity, chain, &other_key, roots.to_vec(), &tls).err().unwrap()
    };
    assert!(matches!(made(web(), signed.roots()), IdentityError::Unusable { .. }));
    assert!(matches!(made(client(), signed.roots()), IdentityError::Mismatch { .. }));
    assert!(matches!(made(web(), &[]), IdentityError::NoRoots));
}

fn roots_of(credentials: &Credentials) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for root in credentials.roots() {
        roots.add(root.clone()).unwrap();
    }
    Arc::new(roots)
}

/// The server's ticket is for that server alone; the client's certificate ends in between.
#[test]
fn a_resumed_session_of_an_expired_certificate_is_nobody_on_either_side() {
    let short = Ca::living(Duration::from_secs(2));
    let (server, client_side) = (short.sign(&web()), short.sign(&client()));
    shake(client_side.client(&[web()]), server.server()).unwrap();
    let limit = std::time::Instant::now() + Duration::from_secs(20);
    while SystemTime::now() <= client_side.not_after + Duration::from_secs(1) {
        assert!(std::time::Instant::now() < limit);
        std::thread::sleep(Duration::from_millis(50));
    }
    let again = shake(client_side.client(&[web()]), server.server()).unwrap();
    assert_eq!(again.server.handshake_kind(), Some(rustls::HandshakeKind::Resumed));
    assert_eq!(peer_identity(again.server.peer_certificates()), Err(NoIdentity::Expired));
    assert_eq!(peer_identity(again.client.peer_certificates()), Err(NoIdentity::Expired));
    client_side.forget_sessions(&[web()]);
    let error = shake(client_side.client(&[web()]), server.server()).err().unwrap().to_string();
    assert!(error.contains("xpired"), "the certificate is looked at again: {error}");
}
