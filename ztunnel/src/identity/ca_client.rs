//! Istio's certificate service: one call per certificate, the key never leaves this process.

use std::{
    path::Path,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tonic::{
    Request,
    metadata::{Ascii, MetadataKey, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Uri},
};
use ztunnel_api::ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};

use super::{
    Credentials, Identity, IdentityError,
    certificates::{Authority, Issuing},
};
use crate::config::{CaService, RootSource, Token};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Of the whole call. A control plane that hangs must not hold one of the few fetches for ever.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Where distributions keep the system's bundle: Debian, Fedora, Alpine and the BSDs.
const SYSTEM_BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Asks for certificates over one shared channel.
pub(super) struct CaClient(Arc<Service>);

struct Service {
    config: CaService,
    ttl: Duration,
    /// Made anew when the root file changes.
    channel: Mutex<Option<Connected>>,
}

struct Connected {
    root: String,
    /// One per name that the service may bear, all lazily connected.
    channels: Vec<Channel>,
}

impl CaClient {
    pub fn new(config: CaService, ttl: Duration) -> Self {
        Self(Arc::new(Service { config, ttl, channel: Mutex::default() }))
    }
}

impl Authority for CaClient {
    fn issue(&self, identity: &Identity) -> Issuing {
        let (service, identity) = (Arc::clone(&self.0), identity.clone());
        Box::pin(async move {
            match tokio::time::timeout(CALL_TIMEOUT, service.issue(&identity)).await {
                Ok(issued) => issued,
                Err(_) => Err(IdentityError::TimedOut { address: service.config.address.clone() }),
            }
        })
    }
}

impl Service {
    async fn issue(&self, identity: &Identity) -> Result<Credentials, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let request = IstioCertificateRequest {
            csr: csr(identity, &key)?,
            validity_duration: i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: self.config.impersonate.then(|| impersonated(identity)),
        };
        let answer = self.call(request).await?;
        let key = PrivateKeyDer::try_from(key.serialize_der())
            .map_err(|error| IdentityError::Malformed { what: error.to_owned() })?;
        answered(identity, &key, &answer)
    }

    /// Tries the service by each of its names; a refusal by the service itself is final.
    async fn call(&self, request: IstioCertificateRequest) -> Result<Vec<String>, IdentityError> {
        let mut unreachable = tonic::Status::unavailable("no name to call it by");
        let address = || self.config.address.clone();
        for channel in self.channels()? {
            let mut call = Request::new(request.clone());
            self.authenticate(&mut call)?;
            match IstioCertificateServiceClient::new(channel).create_certificate(call).await {
                Ok(answer) => return Ok(answer.into_inner().cert_chain),
                Err(status) if status.code() == tonic::Code::Unavailable => unreachable = status,
                Err(status) => {
                    return Err(IdentityError::Refused { address: address(), status: Arc::new(status) });
                }
            }
        }
        Err(IdentityError::Unreachable { address: address(), source: Arc::new(unreachable) })
    }

    fn channels(&self) -> Result<Vec<Channel>, IdentityError> {
        let root = root_pem(&self.config.root)?;
        let mut held = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connected) = &*held
            && connected.root == root
        {
            return Ok(connected.channels.clone());
        }
        let host = Uri::from_str(&self.config.address).ok().and_then(|uri| uri.host().map(str::to_owned));
        let host = host.ok_or_else(|| IdentityError::Malformed {
            what: format!("CA_ADDRESS {} names no host", self.config.address),
        })?;
        let channels = [Some(host), self.config.alt_name.clone()]
            .into_iter()
            .flatten()
            .map(|name| self.channel_by(name, &root))
            .collect::<Result<Vec<_>, _>>()?;
        *held = Some(Connected { root, channels: channels.clone() });
        Ok(channels)
    }

    fn channel_by(&self, name: String, root: &str) -> Result<Channel, IdentityError> {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root)).domain_name(name);
        let unusable = |source| IdentityError::Endpoint {
            address: self.config.address.clone(),
            source: Arc::new(source),
        };
        let endpoint = Endpoint::from_shared(self.config.address.clone())
            .and_then(|endpoint| endpoint.tls_config(tls))
            .map_err(unusable)?;
        Ok(endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .connect_lazy())
    }

    fn authenticate(&self, call: &mut Request<IstioCertificateRequest>) -> Result<(), IdentityError> {
        let token = match &self.config.token {
            Token::Literal(token) => token.clone(),
            Token::File(path) => read("the token for the certificate service", path)?,
        };
        let bearer = format!("Bearer {}", token.trim());
        let metadata = call.metadata_mut();
        metadata.insert("authorization", ascii("the token for the certificate service", &bearer)?);
        metadata.insert("clusterid", ascii("CLUSTER_ID", &self.config.cluster_id)?);
        for (name, value) in &self.config.headers.0 {
            let what = "a CA_HEADER_ variable";
            let key = MetadataKey::<Ascii>::from_str(&name.to_lowercase())
                .map_err(IdentityError::unusable(what))?;
            metadata.insert(key, ascii(what, value)?);
        }
        Ok(())
    }
}

fn ascii(what: &'static str, text: &str) -> Result<MetadataValue<Ascii>, IdentityError> {
    text.parse().map_err(IdentityError::unusable(what))
}

/// Whose certificate the node asks for.
fn impersonated(identity: &Identity) -> Struct {
    let id = Value { kind: Some(Kind::StringValue(identity.to_string())) };
    Struct { fields: [("ImpersonatedIdentity".to_owned(), id)].into() }
}

/// No subject, no extension but the URI: the service looks at nothing else.
fn csr(identity: &Identity, key: &KeyPair) -> Result<String, IdentityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    Ok(params.serialize_request(key)?.pem()?)
}

/// Takes the service's answer, texts with certificates in PEM. Refused unless the leaf bears `identity` and belongs to
/// `key`.
pub fn answered(
    identity: &Identity,
    key: &PrivateKeyDer<'_>,
    answer: &[String],
) -> Result<Credentials, IdentityError> {
    let (chain, roots) = split_chain(answer)?;
    Credentials::new(identity.clone(), chain, key, roots)
}

type Certs = Vec<CertificateDer<'static>>;

/// The last text holds the roots, those before it the leaf and its intermediates.
fn split_chain(answer: &[String]) -> Result<(Certs, Certs), IdentityError> {
    let Some((roots, chain)) = answer.split_last().filter(|(_, chain)| !chain.is_empty()) else {
        let what = format!("the certificate service sent {} certificates, expected 2 or more", answer.len());
        return Err(IdentityError::Malformed { what });
    };
    let certs = |pem: &String| {
        CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(IdentityError::unusable("the signed certificate"))
    };
    let chain = chain.iter().map(certs).collect::<Result<Vec<_>, _>>()?.concat();
    Ok((chain, certs(roots)?))
}

fn root_pem(source: &RootSource) -> Result<String, IdentityError> {
    let what = "the root of the certificate service";
    match source {
        RootSource::Pem(pem) => Ok(pem.clone()),
        RootSource::File(path) => read(what, path),
        RootSource::System => {
            let found = SYSTEM_BUNDLES.iter().find(|path| Path::new(path).exists());
            read(what, Path::new(found.unwrap_or(&SYSTEM_BUNDLES[0])))
        }
    }
}

fn read(what: &'static str, path: &Path) -> Result<String, IdentityError> {
    std::fs::read_to_string(path).map_err(|source| IdentityError::Read {
        what,
        path: path.display().to_string(),
        source: Arc::new(source),
    })
}

#[cfg(test)]
mod tests;
