//! Istio's certificate service: a tunnel gets certificates for the pods of its own node, and for
//! nobody else.
//!
//! * [`csr`]: what a request for a certificate must be
//! * [`refusal`]: why there is none

pub mod csr;
pub mod refusal;

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, api::ListParams};
use prost_types::value::Kind;
use tokio::time::timeout;
use tonic::{Request, Response, Status};
use tracing::{debug, warn};
use ztunnel_api::ca::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::IstioCertificateService,
};

use self::refusal::Refusal;
use crate::{
    authority::CurrentAuthority,
    callers::{Caller, Callers},
    connection::Peer,
    identity::{self, Identity},
    metrics::Metrics,
};

/// The key of the request's metadata that names the workload.
const IMPERSONATED: &str = "ImpersonatedIdentity";
/// The shortest life of a certificate: tunnels renew at half of it.
const SHORTEST: Duration = Duration::from_mins(1);
/// Of one question to the API server.
const LIMIT: Duration = Duration::from_secs(10);

/// The service.
#[derive(Clone)]
pub struct CertificateService {
    client: Client,
    callers: Callers,
    authority: CurrentAuthority,
    trust_domain: String,
    longest: Duration,
    metrics: Arc<Metrics>,
}

impl std::fmt::Debug for CertificateService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateService").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

impl CertificateService {
    /// Signs with `authority`, for at most `longest`, what lies in `trust_domain`.
    #[must_use]
    pub fn new(
        client: Client,
        callers: Callers,
        authority: CurrentAuthority,
        trust_domain: String,
        longest: Duration,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { client, callers, authority, trust_domain, longest, metrics }
    }

    async fn issue(&self, request: Request<IstioCertificateRequest>) -> Result<Vec<String>, Refusal> {
        let caller = self.callers.review(request.metadata()).await?;
        if let Some(peer) = request.extensions().get::<Peer>() {
            peer.prove();
        }
        let request = request.into_inner();
        let identity = self.identity(&caller, &request)?;
        let key = csr::key_for(&request.csr, &identity)?;
        self.runs_there(&identity, &caller.node).await?;
        let asked = u64::try_from(request.validity_duration).ok().filter(|seconds| *seconds > 0);
        let life = asked.map_or(self.longest, Duration::from_secs).max(SHORTEST).min(self.longest);
        let authority = Arc::clone(&self.authority.borrow());
        let signed = authority.sign(&identity, &key, life).map_err(Refusal::Sign)?;
        debug!(%identity, node = caller.node, "certificate signed");
        Ok(signed)
    }

    /// Who the certificate is for: whom the caller names, else the caller itself.
    fn identity(&self, caller: &Caller, request: &IstioCertificateRequest) -> Result<Identity, Refusal> {
        let named = request.metadata.as_ref().and_then(|metadata| metadata.fields.get(IMPERSONATED));
        let identity = match named.map(|value| &value.kind) {
            None => Identity {
                trust_domain: self.trust_domain.as_str().into(),
                namespace: caller.account.namespace.as_str().into(),
                service_account: caller.account.name.as_str().into(),
            },
            Some(Some(Kind::StringValue(text))) => identity::of_objects(text)
                .map_err(|source| Refusal::NoIdentity { text: text.chars().take(300).collect(), source })?,
            Some(_) => return Err(Refusal::IdentityType),
        };
        if *identity.trust_domain != *self.trust_domain {
            let expected = self.trust_domain.clone();
            return Err(Refusal::OtherTrustDomain { identity: Box::new(identity), expected });
        }
        Ok(identity)
    }

    /// Whether a pod of `identity` runs on `node` at this moment: the API server is asked each time.
    async fn runs_there(&self, identity: &Identity, node: &str) -> Result<(), Refusal> {
        let account = &identity.service_account;
        let fields = format!("spec.nodeName={node},spec.serviceAccountName={account}");
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &identity.namespace);
        let params = ListParams::default().fields(&fields);
        let listed = match timeout(LIMIT, pods.list(&params)).await {
            Ok(Ok(listed)) => listed,
            Ok(Err(source)) => return Err(Refusal::Unavailable { source: Some(Box::new(source)) }),
            Err(_) => return Err(Refusal::Unavailable { source: None }),
        };
        let runs = |pod: &Pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            !matches!(phase, Some("Succeeded" | "Failed"))
        };
        if listed.items.iter().any(runs) {
            return Ok(());
        }
        Err(Refusal::NotOnNode { identity: Box::new(identity.clone()), node: node.to_owned() })
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        match self.issue(request).await {
            Ok(cert_chain) => {
                self.metrics.signed();
                Ok(Response::new(IstioCertificateResponse { cert_chain }))
            }
            Err(refusal) => {
                let reason = refusal.reason();
                self.metrics.refused(reason);
                let cause = std::error::Error::source(&refusal).map(ToString::to_string).unwrap_or_default();
                if refusal.is_notable() {
                    warn!(reason, error = %refusal, cause, "certificate refused");
                } else {
                    debug!(reason, error = %refusal, cause, "certificate refused");
                }
                Err(Status::new(refusal.code(), refusal.to_string()))
            }
        }
    }
}
