//! The DNS proxy: answers names of mesh services in each pod's netns and forwards other queries to
//! the upstream resolvers.
//!
//! A separate thread serves all pods, so that lookups delay no connection and a flood of them does
//! not block the control runtime. The node agent brings the queries here: Istio's redirects them
//! with iptables; our watcher's kernel programs rewrite the address while this proxy listens.
//!
//! * [`serve`]: one pod's queries, from socket to socket
//! * [`message`]: bytes of a query → bytes of a reply, or the decision to forward it
//! * [`names`]: which service a name belongs to, and its addresses
//! * [`forward`]: queries the upstream resolvers
//! * [`resolv_conf`]: finds the upstream resolvers
//! * [`sockets`]: the sockets in the pod's netns

mod forward;
pub mod message;
pub mod names;
mod resolv_conf;
mod serve;
pub mod sockets;

use std::{io, net::SocketAddr, path::Path, rc::Rc, sync::Arc, thread::JoinHandle};

use tokio::{
    sync::mpsc,
    task::{JoinError, JoinSet, LocalSet},
};
use tracing::error;

use self::{names::Zone, sockets::Pair};
use crate::{config::ProxyMode, context::ProcessContext, pod::Pod};

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// State that the DNS of all pods shares.
#[derive(Debug)]
struct Server {
    shared: Arc<ProcessContext>,
    zone: Zone,
    resolvers: Vec<SocketAddr>,
}

#[derive(Debug)]
struct Serve {
    pod: Arc<Pod>,
    pairs: Vec<Pair>,
}

/// The control runtime's handle on the thread that serves DNS.
#[derive(Debug)]
pub struct Dns {
    orders: mpsc::UnboundedSender<Serve>,
    thread: JoinHandle<()>,
}

impl Dns {
    pub fn start(shared: &Arc<ProcessContext>) -> io::Result<Self> {
        let config = &shared.config;
        let zone = Zone::new(&config.cluster_domain, config.dns.preferred_namespace.clone(), config.ipv6);
        let in_pods_netns = config.mode == ProxyMode::Shared;
        let resolvers = resolv_conf::resolvers(&config.dns.upstream, Path::new(RESOLV_CONF), in_pods_netns);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        shared.metrics.runtimes.add(runtime.metrics());
        let (orders, todo) = mpsc::unbounded_channel();
        let shared = Arc::clone(shared);
        let thread = std::thread::Builder::new().name("dns".to_owned()).spawn(move || {
            let server = Rc::new(Server { shared, zone, resolvers });
            LocalSet::new().block_on(&runtime, work(server, todo));
        })?;
        Ok(Self { orders, thread })
    }

    /// Serves `pod` until its `stop`.
    pub fn serve(&self, pod: &Arc<Pod>, pairs: Vec<Pair>) -> io::Result<()> {
        let order = Serve { pod: Arc::clone(pod), pairs };
        self.orders.send(order).map_err(|_| io::Error::other("the DNS thread has ended"))
    }

    /// Waits until no pod has a query in progress. Stop all pods first.
    pub async fn finish(self) {
        drop(self.orders);
        let thread = self.thread;
        if !matches!(tokio::task::spawn_blocking(|| thread.join()).await, Ok(Ok(()))) {
            error!("the DNS thread ended by a panic");
        }
    }
}

async fn work(server: Rc<Server>, mut orders: mpsc::UnboundedReceiver<Serve>) {
    let mut pods = JoinSet::new();
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(Serve { pod, pairs }) => { pods.spawn_local(serve::serve(Rc::clone(&server), pod, pairs)); }
                None => break,
            },
            Some(ended) = pods.join_next() => report(ended),
        }
    }
    while let Some(ended) = pods.join_next().await {
        report(ended);
    }
}

/// A panic in one query must not end the others, but it is a bug and must be reported.
fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        error!(%error, "a task of the DNS panicked");
    }
}
