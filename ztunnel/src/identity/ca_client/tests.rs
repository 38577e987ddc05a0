use std::{fs, net::SocketAddr, path::PathBuf};

use rcgen::{CertificateSigningRequestParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, SerialNumber};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Response, Status,
    transport::{Identity as TlsIdentity, Server, ServerTlsConfig, server::TcpIncoming},
};
use ztunnel_api::ca::{
    IstioCertificateResponse,
    istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
};

use super::*;
use crate::config::Headers;
use crate::config::{ControlPlaneAddress, RootSource, Token};

const NAME: &str = "istiod.test";

/// A certificate service that checks its requests.
struct TestCa {
    issuer: CertifiedIssuer<'static, KeyPair>,
    answer: Answer,
}

#[derive(Clone, Copy, PartialEq)]
enum Answer {
    Signed,
    WithSan(&'static str),
    RootMissing,
}

#[tonic::async_trait]
impl IstioCertificateService for TestCa {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header = |name| request.metadata().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        if header("authorization") != "Bearer token-1" {
            return Err(Status::unauthenticated("wrong token"));
        }
        assert_eq!(header("clusterid"), "Kubernetes");
        assert_eq!(header("x-tenant"), "7");
        let request = request.into_inner();
        assert_eq!(request.validity_duration, 3600);
        let impersonated = request.metadata.unwrap().fields["ImpersonatedIdentity"].clone();
        let mut csr = CertificateSigningRequestParams::from_pem(&request.csr).unwrap();
        let SanType::URI(san) = &csr.params.subject_alt_names[0] else { panic!("no URI") };
        assert_eq!(impersonated.kind, Some(Kind::StringValue(san.to_string())));
        if let Answer::WithSan(other) = self.answer {
            csr.params.subject_alt_names = vec![SanType::URI(other.try_into().unwrap())];
        }
        csr.params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        csr.params.serial_number = Some(SerialNumber::from_slice(&[7]));
        let leaf = csr.signed_by(&self.issuer).unwrap().pem();
        let cert_chain = match self.answer {
            Answer::RootMissing => vec![leaf],
            _ => vec![leaf, self.issuer.pem()],
        };
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

struct Running {
    address: SocketAddr,
    folder: tempfile::TempDir,
    _stop: DropGuard,
}

impl Running {
    async fn start(answer: Answer) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new([NAME.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        testbed::cryptography::choose();
        let tls = ServerTlsConfig::new().identity(TlsIdentity::from_pem(cert.pem(), key.serialize_pem()));
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("root.pem"), issuer.pem()).unwrap();
        fs::write(folder.path().join("token"), "token-1\n").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let server = Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(IstioCertificateServiceServer::new(TestCa { issuer, answer }))
            .serve_with_incoming_shutdown(TcpIncoming::from(listener), stop.clone().cancelled_owned());
        tokio::spawn(server);
        Self { address, folder, _stop: stop.drop_guard() }
    }

    fn config(&self) -> ControlPlaneConfig {
        ControlPlaneConfig {
            address: ControlPlaneAddress::Https(format!("https://{}", self.address)),
            root: RootSource::File(self.path("root.pem")),
            token: Token::File(self.path("token")),
            cluster_id: "Kubernetes".into(),
            alt_name: Some(NAME.to_owned()),
            headers: Headers([("X-Tenant".to_owned(), "7".to_owned())].into()),
        }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }
}

fn identity() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

async fn issue(config: ControlPlaneConfig) -> Result<Credentials, IdentityError> {
    CaClient::new(config, true, Duration::from_hours(1), TlsParameters::default()).issue(&identity()).await
}

#[tokio::test]
async fn a_certificate_is_asked_for_as_istio_wants_it() {
    let ca = Running::start(Answer::Signed).await;
    let credentials = issue(ca.config()).await.unwrap();
    assert_eq!(credentials.identity, identity());
    assert_eq!((credentials.chain().len(), credentials.roots().len()), (1, 1));
    credentials.server();
    credentials.client(&[identity()]);
}

#[tokio::test]
async fn the_token_is_read_again_at_each_call() {
    let ca = Running::start(Answer::Signed).await;
    let client = CaClient::new(ca.config(), true, Duration::from_hours(1), TlsParameters::default());
    fs::write(ca.path("token"), "expired").unwrap();
    let error = client.issue(&identity()).await.unwrap_err().to_string();
    assert!(error.contains(&ca.address.to_string()) && error.contains("wrong token"), "{error}");
    fs::write(ca.path("token"), "token-1").unwrap();
    client.issue(&identity()).await.unwrap();
    fs::remove_file(ca.path("token")).unwrap();
    let error = client.issue(&identity()).await.unwrap_err().to_string();
    assert!(error.contains("wrong token"), "without a file the service decides: {error}");
}

#[tokio::test]
async fn somebody_elses_certificate_is_refused() {
    let ca = Running::start(Answer::WithSan("spiffe://cluster.local/ns/shop/sa/admin")).await;
    let error = issue(ca.config()).await.unwrap_err().to_string();
    assert!(error.contains("sa/web") && error.contains("sa/admin"), "{error}");
}

#[tokio::test]
async fn an_answer_without_root_is_refused() {
    let ca = Running::start(Answer::RootMissing).await;
    let error = issue(ca.config()).await.unwrap_err().to_string();
    assert!(error.contains("sent 1 certificates"), "{error}");
}

#[tokio::test]
async fn a_service_by_another_name_or_root_is_not_told_the_token() {
    let ca = Running::start(Answer::Signed).await;
    let other = ControlPlaneConfig { alt_name: None, ..ca.config() };
    assert!(matches!(issue(other).await, Err(IdentityError::Unreachable { .. })));
    let stranger = Running::start(Answer::Signed).await;
    let other = ControlPlaneConfig { root: RootSource::File(stranger.path("root.pem")), ..ca.config() };
    assert!(matches!(issue(other).await, Err(IdentityError::Unreachable { .. })));
}

#[tokio::test]
async fn a_new_root_is_taken_without_a_restart() {
    let (ca, stranger) = (Running::start(Answer::Signed).await, Running::start(Answer::Signed).await);
    let right = fs::read(ca.path("root.pem")).unwrap();
    fs::copy(stranger.path("root.pem"), ca.path("root.pem")).unwrap();
    let client = CaClient::new(ca.config(), true, Duration::from_hours(1), TlsParameters::default());
    client.issue(&identity()).await.unwrap_err();
    fs::write(ca.path("root.pem"), right).unwrap();
    client.issue(&identity()).await.unwrap();
}

#[test]
fn a_request_holds_nothing_but_the_uri() {
    let csr = csr(&identity(), &KeyPair::generate().unwrap()).unwrap();
    let parsed = CertificateSigningRequestParams::from_pem(&csr).unwrap().params;
    assert_eq!(parsed.distinguished_name, DistinguishedName::new());
    assert_eq!(parsed.subject_alt_names, [SanType::URI(identity().to_string().try_into().unwrap())]);
    assert!(parsed.extended_key_usages.is_empty() && parsed.key_usages.is_empty());
}
