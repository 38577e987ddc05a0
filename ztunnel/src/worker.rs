//! The workers: one thread each, with a single-threaded runtime. A connection stays on the worker
//! that accepted it, so its path has no locks and shares nothing between cores.
//!
//! The control runtime (main thread) sends all workers the pods to serve. Each worker has its own
//! listeners, and the kernel spreads connections over them.

pub mod listeners;

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, thread::JoinHandle, time::Duration};

use tokio::{
    net::TcpStream,
    sync::mpsc,
    task::{JoinError, JoinSet, LocalSet},
};
use tracing::{error, info};

use crate::{
    connection::{inbound, inbound_plain, outbound},
    context::{Accepted, ProcessContext, WorkerContext},
    hbone::pool::Pool,
    lookup::Lookups,
    pod::Pod,
    worker::listeners::{Active, Listeners, Port},
};

/// How long a worker keeps accepting for a pod that has left. The kernel steers nothing new here by
/// then, but peers of handshakes in progress would be reset.
const HANDSHAKES: Duration = Duration::from_millis(250);

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
    pub fn start(shared: &Arc<ProcessContext>) -> io::Result<Self> {
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

    /// Waits until no pod has an open connection. Stop all pods first.
    pub async fn finish(self) {
        let threads: Vec<_> = self.0.into_iter().map(|handle| handle.thread).collect();
        let joined =
            tokio::task::spawn_blocking(|| threads.into_iter().map(JoinHandle::join).all(|t| t.is_ok()));
        if !joined.await.unwrap_or(false) {
            error!("a worker ended by a panic");
        }
    }
}

async fn work(shared: Arc<ProcessContext>, mut orders: mpsc::UnboundedReceiver<Serve>) {
    let worker = Rc::new(WorkerContext {
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

/// Resolves with the reason when the open connections of a stopped pod must end. A pod that only
/// left the mesh keeps them.
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
async fn serve(worker: Rc<WorkerContext>, pod: Arc<Pod>, listeners: Listeners) {
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
    // If ports are not shared, they must be free at once. When the process ends, the kernel still
    // steers new connections here, so waiting would not help; a successor receives the waiting ones
    // (`tcp_migrate_req`).
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

/// A panic in one connection must not end the others, but it is a bug and must be reported.
fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        error!(%error, "a connection's task panicked");
    }
}
