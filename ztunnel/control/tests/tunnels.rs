//! The halves of real tunnels that are about certificates, and connections between them.

use std::sync::Arc;

use rustls::pki_types::ServerName;
use testbed::api_server::ApiServer;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
    runtime::Runtime,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::CancellationToken;
use ztunnel::identity::{AccountLease, Certificates, Credentials, Identity};

use crate::{
    certificates::{id, pod_of},
    rig::{LIMIT, bound_token, tunnel_config, unique},
};

/// A tunnel of one node, with one pod.
pub struct Tunnel {
    identity: Identity,
    certificates: Arc<Certificates>,
    _lease: AccountLease,
}

impl Tunnel {
    /// It calls the control plane at `port`. `root`: in PEM, or the file that a kubelet would keep.
    pub fn start(api: &ApiServer, runtime: &Runtime, port: u16, root: &str) -> Self {
        let node = unique("node");
        let demo = pod_of(api, "web", &node);
        let (_, token) = bound_token(api, ("adit-system", "ztunnel"), &node, "istio-ca");
        let certificates =
            Certificates::new(&tunnel_config(port, root, &token, &node), Arc::default()).unwrap();
        let lease = certificates.lease(demo.as_str().into(), "web".into());
        runtime.spawn(Arc::clone(&certificates).run(CancellationToken::new()));
        Self { identity: id(&demo, "web").parse().unwrap(), certificates, _lease: lease }
    }

    /// Of its pod.
    pub async fn credentials(&self) -> Arc<Credentials> {
        timeout(LIMIT, self.certificates.get(&self.identity)).await.expect("in time").expect("a certificate")
    }
}

/// A new connection, whose ends verify each other.
pub async fn connect(from: &Tunnel, to: &Tunnel) -> Result<(), String> {
    let (client, server) = (from.credentials().await, to.credentials().await);
    let (near, far) = duplex(64 << 10);
    let name = ServerName::try_from("10.0.0.1").unwrap();
    let connector = TlsConnector::from(client.client(std::slice::from_ref(&to.identity)));
    let acceptor = TlsAcceptor::from(server.server());
    let connecting = async {
        let mut stream = connector.connect(name, near).await?;
        stream.write_all(b"hello").await?;
        // The server's verdict arrives with its first bytes.
        stream.read_u8().await
    };
    let accepting = async {
        let mut stream = acceptor.accept(far).await?;
        stream.read_exact(&mut [0; 5]).await?;
        stream.write_u8(1).await?;
        stream.flush().await?;
        Ok::<_, std::io::Error>(stream)
    };
    let (connected, accepted) = tokio::join!(connecting, accepting);
    connected.and_then(|_| accepted.map(drop)).map_err(|error| error.to_string())
}
