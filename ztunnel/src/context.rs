//! The handles that a connection needs: those of the process, of its worker, and its own.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use nix::sys::resource::{Resource, getrlimit};
use tokio::net::TcpStream;
use tracing::info;

use crate::{
    budget::{DescriptorLease, ProcessDescriptors},
    config::{Config, ProxyMode},
    discovery::demand::Demand,
    hbone::pool::TunnelPool,
    identity::{Certificates, MeshTrust, Revocations},
    lookup::HostResolver,
    memory::MemoryBudget,
    mesh::Store,
    metrics::Metrics,
    pod::{PodIndex, ServedPod},
    route::FailedEndpoints,
    socket::{self, Dialler, ReadySockets},
    supervision::Supervisor,
};

/// Handles that all workers and the control runtime share.
#[derive(Debug)]
pub struct ProcessContext {
    pub(crate) config: Arc<Config>,
    pub(crate) store: Arc<Store>,
    pub(crate) certificates: Arc<Certificates>,
    pub(crate) trust: Arc<MeshTrust>,
    pub(crate) revocations: Arc<Revocations>,
    pub(crate) metrics: Arc<Metrics>,
    /// For what streams have received.
    pub(crate) memory: Arc<MemoryBudget>,
    /// Set if the mesh is known on demand (`xds.on_demand`).
    pub demand: Option<Demand>,
    /// As configured; a pod may need it otherwise.
    pub(crate) socket: socket::SocketOptions,
    /// Whether applications are dialled from their clients' addresses.
    pub original_source: bool,
    /// The pods that are served, which others of this node may want to reach.
    pub(crate) served: PodIndex,
    /// To whom threads report that they ended.
    pub(crate) supervisor: Supervisor,
    /// File descriptors that all connections share.
    pub(crate) descriptors: Arc<ProcessDescriptors>,
}

impl ProcessContext {
    /// What follows from `config` and from the rights and limits of this process is decided here,
    /// once.
    pub fn new(
        config: Arc<Config>,
        store: Arc<Store>,
        certificates: Arc<Certificates>,
        revocations: Arc<Revocations>,
        metrics: Arc<Metrics>,
        demand: Option<Demand>,
        supervisor: Supervisor,
    ) -> Self {
        let socket = socket::SocketOptions::new(&config);
        let memory = MemoryBudget::new(config.memory.total_bytes, metrics.memory.clone());
        let original_source = config.original_source.unwrap_or_else(socket::may_speak_as_others);
        let open_files = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let open_files = usize::try_from(open_files).unwrap_or(usize::MAX);
        let reserve = config.budget.reserved_descriptors.map(|reserve| reserve as usize);
        let fair = config.mode == ProxyMode::Shared;
        let descriptors = ProcessDescriptors::new(open_files, reserve, fair);
        info!(open_files, for_connections = descriptors.limit(), "file descriptors");
        let descriptors = Arc::new(descriptors);
        Self {
            config,
            store,
            trust: Arc::clone(certificates.trust()),
            certificates,
            revocations,
            metrics,
            memory,
            demand,
            socket,
            original_source,
            served: PodIndex::default(),
            supervisor,
            descriptors,
        }
    }
}

/// One worker, as its connections see it.
#[derive(Debug)]
pub struct WorkerContext {
    pub(crate) process: Arc<ProcessContext>,
    pub(crate) pool: TunnelPool,
    pub(crate) resolver: HostResolver,
    pub(crate) ready: ReadySockets,
    /// What its connections could not reach lately.
    pub(crate) failed: FailedEndpoints,
}

impl WorkerContext {
    /// Who connects from inside the netns of `pod`.
    pub(crate) fn dialler<'a>(&'a self, pod: &'a ServedPod) -> Dialler<'a> {
        // What waits for a pod that has left was closed. Its neighbours may be dialling it still.
        let ready = Some((&self.ready, &pod.stop));
        Dialler { netns: &pod.netns, options: &pod.socket, ready }
    }
}

/// A connection that was accepted for a pod.
#[derive(Debug)]
pub struct Accepted {
    pub(crate) stream: TcpStream,
    pub(crate) client: SocketAddr,
    pub(crate) pod: Arc<ServedPod>,
    pub(crate) worker: Rc<WorkerContext>,
    /// The descriptors that it takes.
    pub(crate) descriptors: DescriptorLease,
}
