//! Client of Istio's certificate service: one call per certificate. Private keys never leave this
//! process.

use std::{sync::Arc, time::Duration};

use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tonic::Request;
use ztunnel_api::ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};

use super::{
    Credentials, Identity, IdentityError,
    authority::{Authority, Issuing},
    trust::TlsParameters,
};
use crate::{config::ControlPlaneConfig, control_plane::ControlPlane};

/// Time limit of the whole call, since a service that hangs would occupy one of the few concurrent
/// fetches.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Requests certificates over one shared channel.
pub(super) struct CaClient(Arc<Service>);

struct Service {
    control_plane: ControlPlane,
    impersonate: bool,
    ttl: Duration,
    tls: TlsParameters,
}

impl CaClient {
    /// `impersonate`: whether each request names the workload that the certificate is for.
    pub(super) fn new(
        config: ControlPlaneConfig,
        impersonate: bool,
        ttl: Duration,
        tls: TlsParameters,
    ) -> Self {
        Self(Arc::new(Service { control_plane: ControlPlane::new(config), impersonate, ttl, tls }))
    }
}

impl Authority for CaClient {
    fn issue(&self, identity: &Identity) -> Issuing {
        let (service, identity) = (Arc::clone(&self.0), identity.clone());
        Box::pin(async move {
            match tokio::time::timeout(CALL_TIMEOUT, service.issue(&identity)).await {
                Ok(issued) => issued,
                Err(_) => {
                    Err(IdentityError::TimedOut { address: service.control_plane.address().to_owned() })
                }
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
            metadata: self.impersonate.then(|| impersonated(identity)),
        };
        let answer = self.call(request).await?;
        let key = PrivateKeyDer::try_from(key.serialize_der())
            .map_err(|reason| IdentityError::PrivateKey { reason })?;
        credentials_from_response(identity, &key, &answer, &self.tls)
    }

    /// Tries each server name in turn; an error of the service itself is final.
    async fn call(&self, request: IstioCertificateRequest) -> Result<Vec<String>, IdentityError> {
        let mut unreachable = tonic::Status::unavailable("no server name to try");
        let address = || self.control_plane.address().to_owned();
        for channel in self.control_plane.channels()? {
            let mut call = Request::new(request.clone());
            self.control_plane.authenticate(&mut call)?;
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
}

/// Request metadata: the workload that the certificate is for.
fn impersonated(identity: &Identity) -> Struct {
    let id = Value { kind: Some(Kind::StringValue(identity.to_string())) };
    Struct { fields: [("ImpersonatedIdentity".to_owned(), id)].into() }
}

/// Only the URI, since the service reads nothing else.
fn csr(identity: &Identity, key: &KeyPair) -> Result<String, IdentityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    Ok(params.serialize_request(key)?.pem()?)
}

/// Credentials from the service's response: texts with certificates in PEM.
///
/// # Errors
/// [`IdentityError`], unless the leaf is for `identity` and belongs to `key`.
pub fn credentials_from_response(
    identity: &Identity,
    key: &PrivateKeyDer<'_>,
    answer: &[String],
    tls: &TlsParameters,
) -> Result<Credentials, IdentityError> {
    let (chain, roots) = split_chain(answer)?;
    Credentials::new(identity.clone(), chain, key, roots, tls)
}

type Certs = Vec<CertificateDer<'static>>;

/// The last text holds the roots, those before it the leaf and its intermediates.
fn split_chain(answer: &[String]) -> Result<(Certs, Certs), IdentityError> {
    let Some((roots, chain)) = answer.split_last().filter(|(_, chain)| !chain.is_empty()) else {
        return Err(IdentityError::ShortResponse { count: answer.len() });
    };
    let certs = |pem: &String| {
        CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(IdentityError::unusable("the signed certificate"))
    };
    let chain = chain.iter().map(certs).collect::<Result<Vec<_>, _>>()?.concat();
    Ok((chain, certs(roots)?))
}

#[cfg(test)]
mod tests;
