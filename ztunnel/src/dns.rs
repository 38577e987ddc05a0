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
//! * [`forward`]: queries the resolver that the pod asked, or else the configured ones; `health`: which
//!   of them are away
//! * `share`: how many queries a pod may have answered in a second
//! * [`resolv_conf`]: finds the upstream resolvers
//! * `sockets`: the sockets in the pod's netns

mod forward;
mod health;
pub mod message;
pub mod names;
mod resolv_conf;
mod serve;
mod share;
pub(crate) mod sockets;

use std::{cell::RefCell, io, net::SocketAddr, path::Path, rc::Rc, sync::Arc};

use self::{names::DnsZone, sockets::DnsSockets};
use crate::{config::ProxyMode, context::ProcessContext, pod::ServedPod, threads::PodThread};

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// State that the DNS of all pods shares.
#[derive(Debug)]
struct DnsContext {
    process: Arc<ProcessContext>,
    zone: DnsZone,
    /// For queries of which it is not known whom the pod asked.
    resolvers: Vec<SocketAddr>,
    /// Room for one message of any size. Not borrowed across an await.
    scratch: RefCell<Box<[u8]>>,
}

/// The control runtime's handle on the thread that serves DNS.
#[derive(Debug)]
pub struct Dns(PodThread<Vec<DnsSockets>>);

impl Dns {
    /// Starts the thread.
    ///
    /// # Errors
    /// The thread or its runtime cannot be started.
    pub fn start(process: &Arc<ProcessContext>) -> io::Result<Self> {
        let config = &process.config;
        let zone = DnsZone::new(&config.cluster_domain, config.dns.preferred_namespace.clone(), config.ipv6);
        let in_pods_netns = config.mode == ProxyMode::Shared;
        let resolvers = resolv_conf::resolvers(&config.dns.upstream, Path::new(RESOLV_CONF), in_pods_netns);
        let (metrics, supervisor) = (Arc::clone(&process.metrics), process.supervisor.clone());
        let process = Arc::clone(process);
        PodThread::start("dns".to_owned(), &metrics, &supervisor, move || {
            let scratch = RefCell::new(vec![0; usize::from(u16::MAX)].into());
            let context = Rc::new(DnsContext { process, zone, resolvers, scratch });
            move |pod, pairs| serve::serve(Rc::clone(&context), pod, pairs)
        })
        .map(Self)
    }

    /// Serves `pod` until its `stop`.
    ///
    /// # Errors
    /// The thread has ended.
    pub(crate) fn serve(&self, pod: &Arc<ServedPod>, pairs: Vec<DnsSockets>) -> io::Result<()> {
        self.0.serve(pod, pairs)
    }

    /// Waits until every pod, each of which has been stopped, has no more queries under way.
    pub async fn finish(self) {
        self.0.finish().await;
    }
}
