//! A certificate with its key, as TLS configuration for both roles.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    pki_types::{CertificateDer, PrivateKeyDer},
    sign::CertifiedKey,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    Identity, IdentityError,
    trust::{self, ExpectedServer, TlsParameters, TrustedClient},
};

const H2: &[u8] = b"h2";

/// Cached client configurations, one per set of expected servers: a service or workload that pods
/// of this identity talk to. When the cache is full it is cleared.
const MAX_CLIENT_CONFIGS: usize = 4096;

/// TLS sessions kept per set of expected servers.
const RESUMABLE_SESSIONS: usize = 32;

/// A certificate with its key. Immutable: a renewal creates new credentials.
pub struct Credentials {
    /// The identity that the certificate proves.
    pub identity: Identity,
    /// Start of its validity.
    pub not_before: SystemTime,
    /// End of its validity.
    pub not_after: SystemTime,
    certified: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    root_certs: Vec<CertificateDer<'static>>,
    tls: TlsParameters,
    server: Arc<ServerConfig>,
    clients: Mutex<HashMap<Vec<Identity>, Arc<ClientConfig>>>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("identity", &self.identity)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// `chain` is the leaf and its intermediates. The leaf must be for `identity` and belong to
    /// `key`.
    pub(super) fn new(
        identity: Identity,
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKeyDer<'_>,
        root_certs: Vec<CertificateDer<'static>>,
        tls: &TlsParameters,
    ) -> Result<Self, IdentityError> {
        let leaf = chain.first().ok_or_else(|| IdentityError::EmptyChain)?;
        let names = trust::uri_names(leaf);
        if names != [identity.to_string()] {
            return Err(IdentityError::Mismatch { expected: identity, got: format!("{names:?}") });
        }
        let (_, parsed) =
            X509Certificate::from_der(leaf).map_err(IdentityError::unusable("the signed certificate"))?;
        let not_before = system_time(parsed.validity().not_before.timestamp());
        let not_after = system_time(parsed.validity().not_after.timestamp());

        let mut roots = RootCertStore::empty();
        for root in &root_certs {
            roots.add(root.clone()).map_err(IdentityError::unusable("a root certificate"))?;
        }
        if roots.is_empty() {
            return Err(IdentityError::NoRoots);
        }
        let roots = Arc::new(roots);

        let signer = tls
            .provider
            .key_provider
            .load_private_key(key.clone_key())
            .map_err(IdentityError::unusable("the private key"))?;
        let certified = Arc::new(CertifiedKey::new(chain, signer));
        certified.keys_match().map_err(IdentityError::unusable("the signed certificate"))?;

        let verifier = TrustedClient::new(Arc::clone(&roots), &identity.trust_domain, tls)?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&tls.provider))
            .with_protocol_versions(tls.versions())
            .map_err(IdentityError::unusable("the TLS provider"))?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(&certified))));
        server.alpn_protocols = vec![H2.to_vec()];

        Ok(Self {
            identity,
            not_before,
            not_after,
            certified,
            roots,
            root_certs,
            tls: tls.clone(),
            server: Arc::new(server),
            clients: Mutex::default(),
        })
    }

    /// For accepting: ALPN `h2`; requires a client certificate of a trust domain that is accepted.
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// Whether a client of `server` is of a trust domain that is accepted at this moment. To be asked
    /// after the handshake: one that resumes a session does not ask the verifier again.
    pub fn accepts(&self, client: &Identity) -> bool {
        self.tls.trust.accepts(&self.identity.trust_domain, &client.trust_domain)
    }

    /// Resolves when it is not.
    pub async fn until_not_accepted(&self, client: &Identity) {
        self.tls.trust.until_not_accepted(&self.identity.trust_domain, &client.trust_domain).await;
    }

    /// For connecting to a server that must be one of `expected`. Sends no SNI.
    ///
    /// Sessions are resumed only within one set of expected servers, since a resumed handshake
    /// shows no certificate to check. Use the peer's address as the server name: it keys the
    /// sessions.
    pub fn client(&self, expected: &[Identity]) -> Arc<ClientConfig> {
        let mut key = expected.to_vec();
        key.sort_unstable();
        key.dedup();
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = clients.get(&key) {
            return Arc::clone(config);
        }
        if clients.len() >= MAX_CLIENT_CONFIGS {
            clients.clear();
        }
        let config = Arc::new(self.client_config(key.clone()));
        clients.insert(key, Arc::clone(&config));
        config
    }

    /// Has the next handshake with a server of `expected` show its certificate.
    pub(crate) fn forget_sessions(&self, expected: &[Identity]) {
        let mut key = expected.to_vec();
        key.sort_unstable();
        key.dedup();
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }

    fn client_config(&self, expected: Vec<Identity>) -> ClientConfig {
        let own = &self.identity.trust_domain;
        let verifier = ExpectedServer::new(Arc::clone(&self.roots), expected, own, &self.tls);
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.tls.provider))
            .with_protocol_versions(self.tls.versions())
            .expect("the same provider made the server's configuration")
            .dangerous() // our verifier checks the identity in place of the host name
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(
                &self.certified,
            ))));
        config.alpn_protocols = vec![H2.to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::in_memory_sessions(RESUMABLE_SESSIONS);
        config
    }

    /// The leaf and its intermediates.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// The certificates that peers must chain to.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.root_certs
    }

    /// When `part` of the lifetime has passed.
    pub(super) fn after(&self, part: f64) -> SystemTime {
        let life = self.not_after.duration_since(self.not_before).unwrap_or_default();
        self.not_before + life.mul_f64(part)
    }
}

fn system_time(unix_seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(unix_seconds).unwrap_or_default())
}
