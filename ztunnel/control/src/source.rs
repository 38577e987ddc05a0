//! Follows the API server, and publishes a [`Snapshot`] whenever something changed that tunnels are
//! told of.
//!
//! * `watch`: lists and watches one kind of object for ever
//! * `cluster`: all objects, and the snapshot that follows from them
//!
//! Only complete, successful answers change state. While the server is away, what is known stays.

mod cluster;
mod watch;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{Api, Client, core::DynamicObject};
use tokio::{
    sync::{mpsc, watch as state},
    task::{JoinSet, block_in_place},
    time::timeout_at,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use self::{
    cluster::{Change, Cluster, KINDS},
    watch::Kind,
};
use crate::{
    metrics::Metrics,
    objects::{
        endpoints, node,
        peer_authentication::PeerAuthentication,
        pod,
        policy::AuthorizationPolicy,
        service::{self, Distribution},
    },
    report::{PolicyKind, Unreported},
    settings::MeshSettings,
    snapshot::Snapshot,
};

/// How long changes are collected: a rollout makes many at once.
const COLLECT: Duration = Duration::from_millis(100);
/// After so long without another one, the collection ends.
const QUIET: Duration = Duration::from_millis(10);
/// Changes that may wait for the one task that applies them.
const WAITING: usize = 1024;

/// The latest snapshot. `None` until everything was listed once.
pub type Snapshots = state::Receiver<Option<Arc<Snapshot>>>;

/// What the statuses of policies do not say yet.
pub type Reports = state::Receiver<Arc<Vec<Unreported>>>;

/// Follows the API server. [`run`](Self::run) does all the work.
pub struct Source {
    client: Client,
    settings: MeshSettings,
    metrics: Arc<Metrics>,
    publish: state::Sender<Option<Arc<Snapshot>>>,
    reports: state::Sender<Arc<Vec<Unreported>>>,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Source {
    /// Connects to nothing yet.
    #[must_use]
    pub fn new(client: Client, settings: MeshSettings, metrics: Arc<Metrics>) -> (Self, Snapshots) {
        let (publish, snapshots) = state::channel(None);
        let (reports, _) = state::channel(Arc::default());
        (Self { client, settings, metrics, publish, reports }, snapshots)
    }

    /// What the statuses of policies do not say yet.
    #[must_use]
    pub fn reports(&self) -> Reports {
        self.reports.subscribe()
    }

    /// Follows the API server until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let (sender, changes) = mpsc::channel(WAITING);
        let mut watches = JoinSet::new();
        self.watch_all(&mut watches, &sender);
        drop(sender);
        // The watches end with the set. One that ends before leaves its kind as it was for ever: then all
        // of this ends, and so the program.
        let work = async {
            tokio::select! {
                () = self.publish_changes(changes) => {}
                _ = watches.join_next() => {}
            }
        };
        let _ = stop.run_until_cancelled(work).await;
    }

    fn watch_all(&self, watches: &mut JoinSet<()>, sender: &mpsc::Sender<Change>) {
        let (client, metrics) = (&self.client, &self.metrics);
        let mut spawn = |kind: futures_util::future::BoxFuture<'static, ()>| {
            watches.spawn(kind);
        };
        let all = |what| Kind { what, metrics: Arc::clone(metrics), sender: sender.clone() };
        let pods: Api<Pod> = Api::all(client.clone());
        spawn(Box::pin(all("pods").follow(pods, pod::Pod::read, Change::Pods)));
        let nodes: Api<Node> = Api::all(client.clone());
        spawn(Box::pin(all("nodes").follow(nodes, node::NodeLocality::read, Change::Nodes)));
        let services: Api<Service> = Api::all(client.clone());
        spawn(Box::pin(all("services").follow(services, service::Service::read, Change::Services)));
        let slices: Api<EndpointSlice> = Api::all(client.clone());
        let read = endpoints::EndpointSlice::read;
        spawn(Box::pin(all("endpointslices").follow(slices, read, Change::Slices)));
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let read = |of: &Namespace| Distribution::from_annotations(of.metadata.annotations.as_ref());
        spawn(Box::pin(all("namespaces").follow(namespaces, read, Change::Distributions)));

        let own = PolicyKind::Access;
        let read = |object: &DynamicObject| Some(AuthorizationPolicy::read(PolicyKind::Access, object));
        let (kind, change) = (all("accesspolicies"), Change::AccessPolicies);
        spawn(Box::pin(kind.follow_optional(client.clone(), (own.group(), own.name()), read, change)));
        let istio = PolicyKind::Authorization;
        let read =
            |object: &DynamicObject| Some(AuthorizationPolicy::read(PolicyKind::Authorization, object));
        let (kind, change) = (all("authorizationpolicies"), Change::AuthorizationPolicies);
        spawn(Box::pin(kind.follow_optional(client.clone(), (istio.group(), istio.name()), read, change)));
        let peers = (istio.group(), "PeerAuthentication");
        let read = |object: &DynamicObject| Some(PeerAuthentication::read(object));
        let kind = all("peerauthentications");
        spawn(Box::pin(kind.follow_optional(client.clone(), peers, read, Change::PeerAuthentications)));
    }

    /// The one writer of the state.
    async fn publish_changes(&self, mut changes: mpsc::Receiver<Change>) {
        let mut cluster = Cluster::new(self.settings.clone());
        while let Some(change) = changes.recv().await {
            let began = Instant::now();
            let end = tokio::time::Instant::now() + COLLECT;
            cluster.apply(change);
            loop {
                let quiet = end.min(tokio::time::Instant::now() + QUIET);
                match timeout_at(quiet, changes.recv()).await {
                    Ok(Some(change)) => cluster.apply(change),
                    // The outer loop ends, too.
                    Ok(None) | Err(_) => break,
                }
                if tokio::time::Instant::now() >= end {
                    break;
                }
            }
            if cluster.listed() < KINDS {
                continue;
            }
            let building = Instant::now();
            // Thousands of policies times thousands of pods take long.
            if let Some(snapshot) = block_in_place(|| cluster.snapshot(began)) {
                self.metrics.built(building.elapsed(), &snapshot, cluster.unenforceable());
                debug!(number = snapshot.number, took_ms = building.elapsed().as_millis(), "new snapshot");
                self.publish.send_replace(Some(Arc::new(snapshot)));
            }
            if let Some(reports) = cluster.reports() {
                self.reports.send_replace(Arc::new(reports));
            }
        }
    }
}
