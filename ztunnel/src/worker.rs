//! The workers: one thread each, with a single-threaded runtime. A connection lives and dies on the worker that
//! accepted it, so nothing on its way is locked or shared between cores.
//!
//! The control runtime (main thread) tells all workers what to serve; each has its own listeners, and the kernel
//! spreads connections over them.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use tokio::{
    net::TcpStream,
    sync::mpsc,
    task::{JoinError, JoinSet, LocalSet},
    time::timeout,
};
use tracing::{error, info};

use crate::{
    config::Config,
    discovery::demand::{Demand, Unanswered},
    hbone::pool::Pool,
    identity::{Certificates, Revocations},
    inbound, inbound_plain,
    lookup::Lookups,
    mesh::{Mesh, Store, Workload},
    metrics::Metrics,
    outbound,
    pods::{
        Pod,
        listeners::{Active, Listeners, Port},
    },
    socket,
};

/// A connection may come before the source of workloads has told about its pod.
const WORKLOAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a pod that left is still accepted for. Nothing new is steered here by then, but the peers of handshakes under
/// way would be reset.
const HANDSHAKES: Duration = Duration::from_millis(250);

/// What all workers and the control runtime see.
#[derive(Debug)]
pub struct Shared {
    pub config: Arc<Config>,
    pub store: Arc<Store>,
    pub certificates: Arc<Certificates>,
    pub revocations: Arc<Revocations>,
    pub metrics: Arc<Metrics>,
    /// Where the mesh is asked for piece by piece.
    pub demand: Option<Demand>,
    /// As configured; a pod may need it otherwise.
    pub socket: socket::Options,
    /// Whether applications are dialled from their clients' addresses.
    pub original_source: bool,
}

impl Shared {
    pub fn new(
        config: Arc<Config>,
        store: Arc<Store>,
        certificates: Arc<Certificates>,
        revocations: Arc<Revocations>,
        metrics: Arc<Metrics>,
        demand: Option<Demand>,
    ) -> Self {
        let socket = socket::Options::new(&config);
        let original_source = config.original_source.unwrap_or_else(socket::may_speak_as_others);
        Self { config, store, certificates, revocations, metrics, demand, socket, original_source }
    }

    /// The ports that are the tunnel's own in every netns; traffic to them through the tunnel would go in circles.
    pub fn is_own_port(&self, port: u16) -> bool {
        let ports = &self.config.ports;
        // 15080: where Istio's tunnel may offer SOCKS.
        [ports.outbound, ports.inbound, ports.hbone, 15080].contains(&port)
    }

    /// The pod's workload and the snapshot that has it. Waits for it a little, if it is not there yet.
    pub async fn workload(&self, pod: &Pod) -> Result<(Arc<Mesh>, Arc<Workload>), UnknownWorkload> {
        let mut changes = self.store.subscribe();
        let arrived = async {
            loop {
                changes.mark_unchanged();
                let mesh = self.store.snapshot();
                let info = &pod.info;
                let found =
                    mesh.workload_by_name(&info.namespace, &info.name, &info.service_account).cloned();
                if let Some(workload) = found {
                    return Some((mesh, workload));
                }
                if let Some(demand) = &self.demand {
                    // As Istio's control plane calls a pod; it tells of this node's by itself.
                    demand.ask(&format!("{}//Pod/{}/{}", self.config.cluster_id, info.namespace, info.name));
                }
                changes.changed().await.ok()?;
            }
        };
        timeout(WORKLOAD_TIMEOUT, arrived).await.ok().flatten().ok_or(UnknownWorkload)
    }

    /// A snapshot that has all of what is `missing` in `mesh`, by name, or of which the control plane said that it is not
    /// there. Where the mesh is told of as a whole, that is `mesh` itself.
    pub async fn informed(
        &self,
        mut mesh: Arc<Mesh>,
        missing: impl Fn(&Mesh) -> Vec<String>,
    ) -> Result<Arc<Mesh>, Unanswered> {
        let Some(demand) = &self.demand else { return Ok(mesh) };
        loop {
            let mut new = false;
            for name in missing(&mesh) {
                new |= demand.answer(&name).await?;
            }
            // What was told may name others in turn. Ends, since a name is new once.
            if !new {
                return Ok(mesh);
            }
            mesh = self.store.snapshot();
        }
    }

    /// Connects to the application in `pod`, from its client's address if that is to be kept.
    pub async fn dial_application(&self, pod: &Pod, to: SocketAddr, client: IpAddr) -> io::Result<TcpStream> {
        let from = (self.original_source && pod.own_port.is_none()).then_some(client);
        socket::connect(&pod.netns, to, from, &self.socket).await
    }
}

/// The pod is served, but nobody has told what workload it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("failed to fetch information about local workload")]
pub struct UnknownWorkload;

/// One worker, as its connections see it.
#[derive(Debug)]
pub struct Worker {
    pub shared: Arc<Shared>,
    pub pool: Pool,
    pub lookups: Lookups,
}

/// A connection that was accepted for a pod.
#[derive(Debug)]
pub struct Accepted {
    pub stream: TcpStream,
    pub client: SocketAddr,
    pub pod: Arc<Pod>,
    pub worker: Rc<Worker>,
}

struct Serve {
    pod: Arc<Pod>,
    listeners: Listeners,
}

/// The control runtime's handle on the workers.
#[derive(Debug)]
pub struct Workers(Vec<Handle>);

#[derive(Debug)]
struct Handle {
    orders: mpsc::UnboundedSender<Serve>,
    thread: JoinHandle<()>,
}

impl std::fmt::Debug for Serve {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serve").field("pod", &self.pod.uid).finish_non_exhaustive()
    }
}

impl Workers {
    pub fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        let start = |number: usize| {
            let (orders, todo) = mpsc::unbounded_channel();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            shared.metrics.runtimes.add(runtime.metrics());
            let shared = Arc::clone(shared);
            let thread = std::thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || LocalSet::new().block_on(&runtime, work(shared, todo)))?;
            Ok(Handle { orders, thread })
        };
        (0..shared.config.workers.get()).map(start).collect::<io::Result<_>>().map(Self)
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Serves `pod` until its `stop`; `listeners` are one set for each worker.
    pub fn serve(&self, pod: &Arc<Pod>, listeners: Vec<Listeners>) -> io::Result<()> {
        debug_assert_eq!(listeners.len(), self.0.len());
        for (worker, listeners) in self.0.iter().zip(listeners) {
            let order = Serve { pod: Arc::clone(pod), listeners };
            worker.orders.send(order).map_err(|_| io::Error::other("a worker has ended"))?;
        }
        Ok(())
    }

    /// Waits until every pod, all of them told to stop, has no more connections.
    pub async fn finish(self) {
        let threads: Vec<_> = self.0.into_iter().map(|handle| handle.thread).collect();
        let joined =
            tokio::task::spawn_blocking(|| threads.into_iter().map(JoinHandle::join).all(|t| t.is_ok()));
        if !joined.await.unwrap_or(false) {
            error!("a worker ended by a panic");
        }
    }
}

async fn work(shared: Arc<Shared>, mut orders: mpsc::UnboundedReceiver<Serve>) {
    let worker = Rc::new(Worker {
        pool: Pool::new(shared.config.pool, shared.metrics.pool.clone()),
        lookups: Lookups::new(&shared.config.dns.upstream),
        shared,
    });
    let mut pods = JoinSet::new();
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(Serve { pod, listeners }) => { pods.spawn_local(serve(Rc::clone(&worker), pod, listeners)); }
                None => break,
            },
            Some(ended) = pods.join_next() => report(ended),
        }
    }
    while let Some(ended) = pods.join_next().await {
        report(ended);
    }
}

/// Why the open connections of a pod that takes no new ones have to end. One that only left the mesh keeps them.
async fn overdue(pod: &Pod, deadline: Duration) -> &'static str {
    let deadline = async {
        pod.end.cancelled().await;
        tokio::time::sleep(deadline).await;
    };
    tokio::select! {
        () = deadline => "drain deadline",
        () = pod.deleted() => "the pod was deleted",
    }
}

/// Serves one pod until its `stop`, then lets the open connections finish.
async fn serve(worker: Rc<Worker>, pod: Arc<Pod>, listeners: Listeners) {
    let listeners = match listeners.activate() {
        Ok(listeners) => listeners,
        Err(error) => return error!(pod.uid, %error, "a worker cannot take the pod's listeners"),
    };
    let mut connections = JoinSet::new();
    let accept = |connections: &mut JoinSet<()>, (port, stream, client): (Port, TcpStream, SocketAddr)| {
        let accepted = Accepted { stream, client, pod: Arc::clone(&pod), worker: Rc::clone(&worker) };
        match port {
            Port::Outbound => connections.spawn_local(outbound::serve(accepted)),
            Port::Inbound => connections.spawn_local(inbound_plain::serve(accepted)),
            Port::Hbone => connections.spawn_local(inbound::serve(accepted)),
        };
    };
    accept_until(pod.stop.cancelled(), &listeners, &mut connections, accept).await;
    // Where ports are not shared they are wanted back at once. When the process ends, what is new is still steered here,
    // so that waiting would not help; a successor is given what waits (`tcp_migrate_req`).
    if worker.shared.config.port_reuse {
        let handshakes = async {
            tokio::select! {
                () = tokio::time::sleep(HANDSHAKES) => {}
                () = pod.end.cancelled() => {}
            }
        };
        accept_until(handshakes, &listeners, &mut connections, accept).await;
    }
    for waiting in listeners.close() {
        accept(&mut connections, waiting);
    }
    let deadline = worker.shared.config.drain_deadline;
    let why = tokio::select! {
        () = finish(&mut connections) => None,
        why = overdue(&pod, deadline) => Some(why),
    };
    if let Some(why) = why {
        info!(pod.uid, connections = connections.len(), why, "open connections are cut");
    }
    connections.shutdown().await;
    worker.pool.forget(pod.netns.id());
}

async fn accept_until(
    stop: impl Future<Output = ()>,
    listeners: &Active,
    connections: &mut JoinSet<()>,
    accept: impl Fn(&mut JoinSet<()>, (Port, TcpStream, SocketAddr)),
) {
    tokio::pin!(stop);
    loop {
        tokio::select! {
            biased;
            () = &mut stop => return,
            Some(ended) = connections.join_next() => report(ended),
            accepted = listeners.accept() => accept(connections, accepted),
        }
    }
}

async fn finish(connections: &mut JoinSet<()>) {
    while let Some(ended) = connections.join_next().await {
        report(ended);
    }
}

/// One connection's fault must not end the others; but it is ours, and must be seen.
fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        error!(%error, "a connection's task panicked");
    }
}
