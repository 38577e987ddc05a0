//! A certificate service with Istio's protocol, in the netns of nodes. It signs every request and
//! checks nothing. For tunnels that have no development CA of their own.

use std::{fs, path::Path, time::Duration};

use nix::sched::{CloneFlags, setns};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, SerialNumber,
};
use time::OffsetDateTime;
use tokio::sync::oneshot;
use tonic::{
    Request, Response, Status,
    transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming},
};
use ztunnel_api::ca::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
};

use crate::{cryptography, netns::TestNetns};

/// On the loopback of the node, at the port of Istio's control plane.
const ADDRESS: &str = "127.0.0.1:15012";

/// The certificate service. It stops when this is dropped.
#[derive(Debug)]
pub struct FakeCa {
    _stop: Vec<oneshot::Sender<()>>,
}

struct Service {
    root_key: String,
    root: String,
}

impl FakeCa {
    /// One root, served in each of `netns`; `root-cert.pem` and `token` are written to `folder`.
    pub fn start(folder: &Path, netns: &[&TestNetns]) -> Self {
        fs::create_dir_all(folder).expect("folder");
        let key = KeyPair::generate().expect("key");
        let root_key = key.serialize_pem();
        let root = CertifiedIssuer::self_signed(root_params(), key).expect("root");
        let root = root.pem();
        fs::write(folder.join("root-cert.pem"), &root).expect("root");
        fs::write(folder.join("token"), "a token of the testbed").expect("token");
        let serve = |netns: &&TestNetns| {
            let (stop, stopped) = oneshot::channel();
            let (ready, is_ready) = std::sync::mpsc::channel();
            let service = Service { root_key: root_key.clone(), root: root.clone() };
            let netns = netns.open();
            std::thread::spawn(move || {
                setns(&netns, CloneFlags::CLONE_NEWNET).expect("setns");
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
                runtime.block_on(service.serve(stopped, || ready.send(()).expect("ready")));
            });
            is_ready.recv_timeout(Duration::from_secs(10)).expect("the certificate service starts");
            stop
        };
        Self { _stop: netns.iter().map(serve).collect() }
    }

    /// The variables by which a tunnel uses it.
    pub fn env(folder: &Path) -> Vec<(&'static str, String)> {
        let path = |name: &str| folder.join(name).to_str().expect("UTF-8 path").to_owned();
        vec![
            ("CA_ADDRESS", format!("https://{ADDRESS}")),
            ("CA_ROOT_CA", path("root-cert.pem")),
            ("AUTH_TOKEN", path("token")),
        ]
    }
}

fn root_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "the testbed's root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

impl Service {
    async fn serve(self, stopped: oneshot::Receiver<()>, ready: impl FnOnce()) {
        let listener = tokio::net::TcpListener::bind(ADDRESS).await.expect("bind");
        let key = KeyPair::generate().expect("key");
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let params = CertificateParams::new(names).expect("names");
        let cert = params.signed_by(&key, &self.issuer()).expect("certificate");
        cryptography::choose();
        let tls = ServerTlsConfig::new().identity(Identity::from_pem(cert.pem(), key.serialize_pem()));
        ready();
        Server::builder()
            .tls_config(tls)
            .expect("TLS")
            .add_service(IstioCertificateServiceServer::new(self))
            .serve_with_incoming_shutdown(TcpIncoming::from(listener), async {
                let _ = stopped.await;
            })
            .await
            .expect("the certificate service");
    }

    fn issuer(&self) -> CertifiedIssuer<'static, KeyPair> {
        let key = KeyPair::from_pem(&self.root_key).expect("the root's key");
        CertifiedIssuer::self_signed(root_params(), key).expect("root")
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let request = request.into_inner();
        let refused = |error: rcgen::Error| Status::invalid_argument(error.to_string());
        let mut csr = CertificateSigningRequestParams::from_pem(&request.csr).map_err(refused)?;
        let life = Duration::from_secs(request.validity_duration.try_into().unwrap_or(3600));
        let now = OffsetDateTime::now_utc();
        csr.params.not_before = now - Duration::from_mins(1);
        csr.params.not_after = now + life;
        csr.params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        csr.params.serial_number =
            Some(SerialNumber::from_slice(&now.unix_timestamp_nanos().to_be_bytes()[9..]));
        let leaf = csr.signed_by(&self.issuer()).map_err(refused)?.pem();
        Ok(Response::new(IstioCertificateResponse { cert_chain: vec![leaf, self.root.clone()] }))
    }
}
