//! The workers: one thread each, with a single-threaded runtime. A connection stays on the worker
//! that accepted it, so its path has no locks and shares nothing between cores.
//!
//! The control runtime (main thread) sends all workers the pods to serve. Each worker has its own
//! listeners, and the kernel spreads connections over them.

pub(crate) mod listeners;

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::{net::TcpStream, task::JoinSet};
use tracing::{error, info, warn};

use crate::{
    connection::{inbound, inbound_plain, outbound},
    context::{Accepted, ProcessContext, WorkerContext},
    hbone::pool::TunnelPool,
    lookup::HostResolver,
    pod::ServedPod,
    reason::FailureReason,
    route::FailedEndpoints,
    socket::{self, ReadySockets},
    threads::{PodThread, finish_all, report_panic},
    worker::listeners::{ActiveListeners, ListenPort, Listeners},
};

/// How long a worker keeps accepting for a pod that has left. The kernel steers nothing new here by
/// then, but peers of handshakes in progress would be reset.
const HANDSHAKES: Duration = Duration::from_millis(250);

/// The control runtime's handle on the workers.
#[derive(Debug)]
pub struct Workers(Vec<PodThread<Listeners>>);

impl Workers {
    /// Starts as many as are configured.
    ///
    /// # Errors
    /// A thread or its runtime cannot be started.
    pub fn start(process: &Arc<ProcessContext>) -> io::Result<Self> {
        let start = |number: usize| {
            let metrics = Arc::clone(&process.metrics);
            let process = Arc::clone(process);
            let supervisor = process.supervisor.clone();
            PodThread::start(format!("worker-{number}"), &metrics, &supervisor, move || {
                let worker = Rc::new(WorkerContext {
                    pool: TunnelPool::new(process.config.pool, process.metrics.pool.clone()),
                    resolver: HostResolver::new(&process.config.dns.upstream),
                    ready: ReadySockets::default(),
                    failed: FailedEndpoints::default(),
                    process,
                });
                move |pod, listeners| serve_pod(Rc::clone(&worker), pod, listeners)
            })
        };
        (0..process.config.workers.get()).map(start).collect::<io::Result<_>>().map(Self)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Serves `pod` until its `stop`; `listeners` has one set for each worker.
    ///
    /// # Errors
    /// A worker has ended.
    pub(crate) fn serve(&self, pod: &Arc<ServedPod>, listeners: Vec<Listeners>) -> io::Result<()> {
        debug_assert_eq!(listeners.len(), self.0.len());
        self.0.iter().zip(listeners).try_for_each(|(worker, listeners)| worker.serve(pod, listeners))
    }

    /// Waits until every pod, each of which has been stopped, has no more connections.
    pub async fn finish(self) {
        join_all(self.0.into_iter().map(PodThread::finish)).await;
    }
}

/// Resolves with the reason when the open connections of a stopped pod must end. A pod that only
/// left the mesh keeps them.
async fn overdue(pod: &ServedPod, deadline: Duration) -> &'static str {
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
async fn serve_pod(worker: Rc<WorkerContext>, pod: Arc<ServedPod>, listeners: Listeners) {
    let listeners = match listeners.activate() {
        Ok(listeners) => listeners,
        Err(error) => return error!(pod.uid, %error, "a worker cannot take the pod's listeners"),
    };
    let mut connections = JoinSet::new();
    let accept = |connections: &mut JoinSet<()>,
                  (port, stream, client): (ListenPort, TcpStream, SocketAddr)| {
        let Some(descriptors) = pod.budget.descriptors.take(port.descriptors()) else {
            return refuse(&worker, &pod, port, stream);
        };
        let (pod, worker) = (Arc::clone(&pod), Rc::clone(&worker));
        let accepted = Accepted { stream, client, pod, worker, descriptors };
        match port {
            ListenPort::Outbound => connections.spawn_local(outbound::serve(accepted)),
            ListenPort::Inbound => connections.spawn_local(inbound_plain::serve(accepted)),
            ListenPort::Hbone => connections.spawn_local(inbound::serve(accepted)),
        };
    };
    accept_until(pod.stop.cancelled(), &listeners, &mut connections, accept).await;
    // If ports are not shared, they must be free at once. When the process ends, the kernel still
    // steers new connections here, so waiting would not help; a successor receives the waiting ones
    // (`tcp_migrate_req`).
    if worker.process.config.port_reuse {
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
    let deadline = worker.process.config.drain_deadline;
    let why = tokio::select! {
        () = finish_all(&mut connections) => None,
        why = overdue(&pod, deadline) => Some(why),
    };
    if let Some(why) = why {
        info!(pod.uid, connections = connections.len(), why, "open connections are cut");
    }
    connections.shutdown().await;
    worker.pool.forget(pod.netns.id());
    worker.ready.forget(pod.netns.id());
}

/// Beyond the pod's budget a connection must cost next to nothing: no record, and few log lines.
fn refuse(worker: &WorkerContext, pod: &ServedPod, port: ListenPort, stream: TcpStream) {
    socket::reset(stream);
    worker.process.metrics.refused(port.direction().as_str(), FailureReason::TooManyConnections);
    if let Some(left_out) = pod.budget.said.due() {
        warn!(pod.uid, pod.name = %pod.info.name, left_out, "the pod has too many connections; new ones are refused");
    }
}

async fn accept_until(
    stop: impl Future<Output = ()>,
    listeners: &ActiveListeners,
    connections: &mut JoinSet<()>,
    accept: impl Fn(&mut JoinSet<()>, (ListenPort, TcpStream, SocketAddr)),
) {
    tokio::pin!(stop);
    loop {
        tokio::select! {
            biased;
            () = &mut stop => return,
            Some(ended) = connections.join_next() => report_panic(ended),
            accepted = listeners.accept() => accept(connections, accepted),
        }
    }
}
