//! The handles that a connection needs: those of the process, of its worker, and its own.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use tokio::net::TcpStream;

use crate::{
    config::Config,
    discovery::demand::Demand,
    hbone::pool::TunnelPool,
    identity::{Certificates, Revocations},
    lookup::HostResolver,
    mesh::Store,
    metrics::Metrics,
    pod::ServedPod,
    socket,
};

/// Handles that all workers and the control runtime share.
#[derive(Debug)]
pub struct ProcessContext {
    pub(crate) config: Arc<Config>,
    pub(crate) store: Arc<Store>,
    pub(crate) certificates: Arc<Certificates>,
    pub(crate) revocations: Arc<Revocations>,
    pub(crate) metrics: Arc<Metrics>,
    /// Set if the mesh is known on demand (`xds.on_demand`).
    pub demand: Option<Demand>,
    /// As configured; a pod may need it otherwise.
    pub(crate) socket: socket::SocketOptions,
    /// Whether applications are dialled from their clients' addresses.
    pub original_source: bool,
}

impl ProcessContext {
    /// What follows from `config` and from the rights of this process is decided here, once.
    pub fn new(
        config: Arc<Config>,
        store: Arc<Store>,
        certificates: Arc<Certificates>,
        revocations: Arc<Revocations>,
        metrics: Arc<Metrics>,
        demand: Option<Demand>,
    ) -> Self {
        let socket = socket::SocketOptions::new(&config);
        let original_source = config.original_source.unwrap_or_else(socket::may_speak_as_others);
        Self { config, store, certificates, revocations, metrics, demand, socket, original_source }
    }
}

/// One worker, as its connections see it.
#[derive(Debug)]
pub struct WorkerContext {
    pub(crate) process: Arc<ProcessContext>,
    pub(crate) pool: TunnelPool,
    pub(crate) resolver: HostResolver,
}

/// A connection that was accepted for a pod.
#[derive(Debug)]
pub struct Accepted {
    pub(crate) stream: TcpStream,
    pub(crate) client: SocketAddr,
    pub(crate) pod: Arc<ServedPod>,
    pub(crate) worker: Rc<WorkerContext>,
}
