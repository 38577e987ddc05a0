//! Starts everything, and ends it.

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use kube::{Config, client::ClientBuilder};
use nix::errno::Errno;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use ztunnel_api::names::ServiceAccount;

use crate::{
    admin::{self, Readiness},
    authority::{keeper::RootKeeper, place::RootPlace},
    callers::Callers,
    certificates::CertificateService,
    discovery::{DiscoveryService, StreamLimits},
    metrics::Metrics,
    pace::Pace,
    server::{self, Services},
    settings::MeshSettings,
    source::Source,
    status,
};

/// A request to the API server may be silent for longer than a watch lasts.
const ANSWER: Duration = Duration::from_mins(3);

/// Everything that can be chosen.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where tunnels call.
    pub listen: SocketAddr,
    /// Where readiness and metrics are.
    pub http_listen: SocketAddr,
    /// Names of the cluster.
    pub mesh: MeshSettings,
    /// The service accounts of tunnels.
    pub tunnels: BTreeSet<ServiceAccount>,
    /// The names by which tunnels call this server.
    pub server_names: Vec<String>,
    /// The longest life of a certificate.
    pub certificate_life: Duration,
    /// Where the root is.
    pub root: RootPlace,
    /// What one tunnel may take.
    pub limits: StreamLimits,
}

/// The sockets, bound: an address in use must prevent the start.
#[derive(Debug)]
pub struct Sockets {
    grpc: TcpListener,
    http: TcpListener,
}

impl Sockets {
    /// Binds both.
    ///
    /// # Errors
    /// An address cannot be bound.
    pub async fn bind(options: &Options) -> anyhow::Result<Self> {
        let bind = async |purpose, address: SocketAddr| {
            listen(address).await.with_context(|| format!("cannot listen on {address} for {purpose}"))
        };
        Ok(Self {
            grpc: bind("tunnels", options.listen).await?,
            http: bind("readiness and metrics", options.http_listen).await?,
        })
    }

    /// Where tunnels call, and where readiness and metrics are.
    ///
    /// # Errors
    /// The kernel cannot name the address of a socket.
    pub fn addresses(&self) -> io::Result<[SocketAddr; 2]> {
        Ok([self.grpc.local_addr()?, self.http.local_addr()?])
    }
}

/// At `address`; `[::]` on a kernel without IPv6 is `0.0.0.0`.
async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error)
            if error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32)
                && address.ip() == Ipv6Addr::UNSPECIFIED =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

/// Serves until `stop`.
///
/// # Errors
/// The root cannot be used, or a server fails.
pub async fn run(
    options: Options,
    mut api: Config,
    sockets: Sockets,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    api.read_timeout = Some(ANSWER);
    api.reset_reader_on_write = true;
    let url = api.cluster_url.to_string();
    let client = ClientBuilder::try_from(api).context("cannot create a client for the API server")?;
    let client = client.with_layer(&Pace::default()).build();
    let [grpc, http] = sockets.addresses()?;
    info!(%grpc, %http, api_server = url, cluster = options.mesh.cluster_id, "listening");
    let metrics = Arc::new(Metrics::default());
    let (source, snapshots) = Source::new(client.clone(), options.mesh.clone(), Arc::clone(&metrics));
    let reports = source.reports();
    let readiness = Readiness::new(snapshots.clone(), stop.clone());
    // Readiness is answered to the end.
    let end = CancellationToken::new();
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let operators = admin::serve(sockets.http, readiness.clone(), Arc::clone(&metrics), end.clone());
    tasks.spawn(async { operators.await.context("the server for readiness and metrics failed") });
    tasks.spawn({
        let followed = source.run(end.clone());
        async {
            followed.await;
            Ok(())
        }
    });
    tasks.spawn({
        let writing = status::run(client.clone(), reports, end.clone());
        async {
            writing.await;
            Ok(())
        }
    });
    let serving = async {
        let Some(opened) = stop.run_until_cancelled(options.root.open(&client)).await else {
            return Ok(());
        };
        let (keeper, authority) =
            RootKeeper::new(options.root, opened?, options.certificate_life, Arc::clone(&metrics));
        let following = keeper.run(client.clone(), end.clone());
        readiness.set_root();
        let callers = Callers::new(client.clone(), options.tunnels);
        let streams = stop.clone();
        let services = Services {
            discovery: DiscoveryService::new(
                callers.clone(),
                snapshots,
                options.limits,
                Arc::clone(&metrics),
                streams,
            ),
            certificates: CertificateService::new(
                client,
                callers,
                authority.clone(),
                options.mesh.trust_domain,
                options.certificate_life,
                metrics,
            ),
        };
        tokio::select! {
            served = server::serve(sockets.grpc, authority, options.server_names, services, stop.clone()) => served,
            () = following => Err(anyhow::anyhow!("the root's Secret is not followed any more")),
        }
    };
    let done = tokio::select! {
        served = serving => served,
        Some(ended) = tasks.join_next() => match ended {
            Ok(Ok(())) => Err(anyhow::anyhow!("a part of the program ended early")),
            Ok(Err(error)) => Err(error),
            Err(error) => Err(error.into()),
        },
    };
    if let Err(error) = &done {
        error!(error = format!("{error:#}"), "shutting down");
    }
    end.cancel();
    while tasks.join_next().await.is_some() {}
    info!("stopped");
    done
}
