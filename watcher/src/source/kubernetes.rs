//! The API server as a source: the pods of this node, and what their namespaces say of them.
//!
//! * `pod`: reads one pod of the API: labels, annotations, sidecars, static pods
//! * `cache`: pods and namespaces as listed last, and what follows
//! * `watch`: lists and watches one kind of object for ever
//! * `startup_taint`: takes a taint off the node when the watcher is ready
//! * `status_writer`: writes the pods' state back to the API
//! * `cleanup`: takes what was written back when the watcher is gone
//! * `pace`: how soon a watch begins again
//! * `backoff`: how long to wait before the next attempt
//!
//! Only complete, successful responses change state. While the server is unreachable, refuses, or
//! has sent half a list, no pod enters or leaves the mesh.

use std::{collections::BTreeSet, time::Duration};

use k8s_openapi::api::core::v1 as api;
use kube::{Api, Config, core::PartialObjectMeta, runtime::watcher::Event};
use tokio::sync::{mpsc, oneshot};
use tracing::info;

pub use self::cleanup::{TakenBack, take_back_annotations};
use self::{
    cache::{ClusterCache, PodChange},
    pod::ReadRules,
    watch::{Received, Watched},
};
use super::{Source, foreign::ForeignMesh, selection::EnrolmentLabels};
use crate::model::pod::Update;

mod backoff;
pub(crate) mod cache;
mod cleanup;
mod pace;
pub(crate) mod pod;
mod startup_taint;
mod status_writer;
#[cfg(test)]
mod tests;
mod watch;

/// At most so many events become one update, so that an endless stream does not delay it for ever.
const EVENTS_AT_ONCE: usize = 10_000;

/// What the source follows and writes.
#[derive(Clone, Debug, Default)]
pub struct KubernetesConfig {
    /// The node whose pods are followed.
    pub node: String,
    /// The labels that enrol.
    pub labels: EnrolmentLabels,
    /// Names of containers that carry their pod's traffic themselves.
    pub sidecars: BTreeSet<String>,
    /// The key of the taint that is taken off the node when the watcher is ready.
    pub startup_taint: Option<String>,
    /// The ConfigMap that has the mesh's lists, by namespace and name.
    pub lists: Option<(String, String)>,
    /// The meshes whose annotations are read, beside ours.
    pub foreign: BTreeSet<ForeignMesh>,
    /// Whether the pods' state is written back.
    pub write_back: bool,
}

/// Why the source cannot start.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// The file that `KUBECONFIG` names.
    #[error("cannot use the file that KUBECONFIG names")]
    Kubeconfig(#[source] kube::config::KubeconfigError),
    /// There is neither that file nor a service account.
    #[error(
        "cannot find the API server: outside of a pod set KUBECONFIG; inside, mount the service account's token"
    )]
    InCluster(#[source] kube::config::InClusterError),
    /// Certificates or proxy settings are not usable.
    #[error("cannot create a client for the API server")]
    Client(#[source] kube::Error),
}

/// Where the API server is and who we are: by the file that `KUBECONFIG` names, else as a pod.
///
/// # Errors
/// That file, or the pod's service account, cannot be used.
pub async fn config(by_kubeconfig: bool) -> Result<Config, KubernetesError> {
    if by_kubeconfig {
        return Config::from_kubeconfig(&kube::config::KubeConfigOptions::default())
            .await
            .map_err(KubernetesError::Kubeconfig);
    }
    Config::incluster().map_err(KubernetesError::InCluster)
}

/// `config`, where a request fails when the API server is silent for longer than `limit`.
fn answering_within(limit: Duration, config: &Config) -> Config {
    let mut config = config.clone();
    config.read_timeout = Some(limit);
    config.reset_reader_on_write = true;
    config
}

/// Will follow the API server once that is wanted ([`Source::begin`]), in tasks that end with the
/// receiver of the updates.
///
/// # Errors
/// No client can be created from `config`.
pub fn start(config: &Config, options: KubernetesConfig) -> Result<Source, KubernetesError> {
    let name = format!("Kubernetes at {}", config.cluster_url);
    let (sender, updates) = mpsc::channel(4);
    let (outcomes, outcome_receiver) = mpsc::unbounded_channel();
    let (changes, change_receiver) = mpsc::unbounded_channel();
    let (when_wanted, wanted) = oneshot::channel();
    let fields = format!("spec.nodeName={}", options.node);
    let mesh_lists = options.lists.as_ref().map(|(namespace, name)| format!("{namespace}/{name}"));
    let lists = options.lists.map(|(namespace, name)| {
        let api = move |client| Api::namespaced(client, &namespace);
        Watched::new("configmaps", config, api, Some(format!("metadata.name={name}")))
    });
    let follower = Follower {
        pods: Watched::new("pods", config, Api::all, Some(fields)).map_err(KubernetesError::Client)?,
        namespaces: Watched::new("namespaces", config, Api::all, None).map_err(KubernetesError::Client)?,
        lists: lists.transpose().map_err(KubernetesError::Client)?,
        cluster: ClusterCache::new(ReadRules {
            labels: options.labels,
            sidecars: options.sidecars,
            mesh_lists,
            foreign: options.foreign,
            ..ReadRules::default()
        }),
        problems: [None, None, None],
        listed_all: false,
        updates: sender,
        changes: options.write_back.then_some(changes),
    };
    let (when_ready, startup) = match options.startup_taint {
        Some(key) => {
            let client =
                kube::Client::try_from(status_writer::config(config)).map_err(KubernetesError::Client)?;
            let (sender, ready) = oneshot::channel();
            let removal = startup_taint::remove_when_ready(client, options.node.clone(), key, ready);
            #[expect(clippy::disallowed_methods, reason = "`Source` keeps the handle")]
            let startup = tokio::spawn(removal);
            (Some(sender), Some(startup))
        }
        None => (None, None),
    };
    let (outcomes, writer) = if options.write_back {
        let client =
            kube::Client::try_from(status_writer::config(config)).map_err(KubernetesError::Client)?;
        let api = status_writer::Api::new(client, options.node);
        #[expect(clippy::disallowed_methods, reason = "`Source` keeps the handle")]
        let writer = tokio::spawn(status_writer::run(api, change_receiver, outcome_receiver));
        (Some(outcomes), Some(writer))
    } else {
        (None, None)
    };
    #[expect(clippy::disallowed_methods, reason = "`Source` keeps the handle")]
    let producer = tokio::spawn(follower.run(wanted));
    Ok(Source {
        forgets_running_pods: true,
        name,
        updates,
        producer,
        when_wanted: Some(when_wanted),
        outcomes,
        when_ready,
        startup,
        writer,
    })
}

struct Follower {
    pods: Watched<api::Pod>,
    /// Only their metadata is requested.
    namespaces: Watched<PartialObjectMeta<api::Namespace>>,
    /// The ConfigMap of the mesh's lists, where there may be one.
    lists: Option<Watched<api::ConfigMap>>,
    cluster: ClusterCache,
    /// Why pods, namespaces, and the lists, cannot be watched at present.
    problems: [Option<String>; 3],
    listed_all: bool,
    updates: mpsc::Sender<Update>,
    changes: Option<mpsc::UnboundedSender<PodChange>>,
}

impl Follower {
    async fn run(mut self, wanted: oneshot::Receiver<()>) {
        if wanted.await.is_err() {
            return;
        }
        loop {
            let before = self.problem();
            tokio::select! {
                // Lists and namespaces first: a pod is published when its namespace is known.
                biased;
                () = self.updates.closed() => return,
                received = next_of(&mut self.lists) => self.on_lists(received),
                received = self.namespaces.next() => self.on_namespace(received),
                received = self.pods.next() => self.on_pod(received),
            }
            // What has arrived by now is one batch: sixty pods of a namespace need not be sixty
            // updates.
            for _ in 0..EVENTS_AT_ONCE {
                if let Some(received) = self.lists.as_mut().and_then(Watched::ready) {
                    self.on_lists(received);
                } else if let Some(received) = self.namespaces.ready() {
                    self.on_namespace(received);
                } else if let Some(received) = self.pods.ready() {
                    self.on_pod(received);
                } else {
                    break;
                }
            }
            if self.publish(before).await.is_err() {
                return;
            }
        }
    }

    fn problem(&self) -> Option<String> {
        let problems: Vec<&str> = self.problems.iter().flatten().map(String::as_str).collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }

    fn on_namespace(&mut self, received: Received<PartialObjectMeta<api::Namespace>>) {
        let Self { problems: [_, problem, _], cluster, .. } = self;
        note(problem, received, |event| cluster.on_namespace(event));
    }

    fn on_pod(&mut self, received: Received<api::Pod>) {
        let Self { problems: [problem, ..], cluster, .. } = self;
        note(problem, received, |event| cluster.on_pod(event));
    }

    fn on_lists(&mut self, received: Received<api::ConfigMap>) {
        let Self { problems: [.., problem], cluster, .. } = self;
        note(problem, received, |event| cluster.on_mesh_lists(event));
    }

    /// Sends the loop what it does not know yet, if anything. Fails when the receiver is gone.
    async fn publish(&mut self, before: Option<String>) -> Result<(), mpsc::error::SendError<Update>> {
        let mut entries = Vec::new();
        for change in self.cluster.changes() {
            if change.entry_changed {
                entries.push((change.uid.clone(), change.entry.clone()));
            }
            if let Some(writer) = &self.changes {
                // It ends only with us.
                let _ = writer.send(change);
            }
        }
        let lists_all = self.cluster.is_whole() && !self.listed_all;
        if lists_all {
            self.listed_all = true;
            self.updates.send(Update::All(self.cluster.all())).await?;
        } else if !entries.is_empty() {
            self.updates.send(Update::Changed(entries)).await?;
        }
        let problem = self.problem();
        match (&before, problem) {
            (before, Some(problem)) if lists_all || before.as_ref() != Some(&problem) => {
                self.updates.send(Update::Unusable(problem)).await?;
            }
            (Some(_), None) => {
                info!("API server available again");
                self.updates.send(Update::Usable).await?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// The next event or failure of what is watched, if anything is. Cancel safe.
async fn next_of(watched: &mut Option<Watched<api::ConfigMap>>) -> Received<api::ConfigMap> {
    match watched {
        Some(watched) => watched.next().await,
        None => std::future::pending().await,
    }
}

/// Notes in `problem` whether one kind of object can be watched, and passes its events on. An event
/// shows that the server answers; the start of a list does not.
fn note<K>(problem: &mut Option<String>, received: Received<K>, take: impl FnOnce(Event<K>)) {
    match received {
        Received::Event(event) => {
            if !matches!(event, Event::Init) {
                *problem = None;
            }
            take(event);
        }
        Received::Failed(error) => *problem = Some(error),
        Received::Recovered => *problem = None,
    }
}

/// The causes of an error, from the outermost in, each once. By hand: `kube` repeats the text of a
/// cause in its own, and `error_reporter` prints every text.
fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = error.source();
    while let Some(error) = next {
        let text = error.to_string();
        if texts.iter().all(|before| !before.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    if texts.is_empty() { error.to_string() } else { texts.join(": ") }
}
