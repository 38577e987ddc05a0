//! The API server as a source: the pods of this node, and what their namespaces say of them.
//!
//! * [`pod`]: what one pod of the API is to us: labels, annotations, sidecars, static pods
//! * [`cache`]: what was told of pods and namespaces, and what follows
//! * `watch`: one kind of object, listed and watched for ever
//! * `status_writer`: writes back what became of the pods
//! * `backoff`: how long to wait before the next attempt
//!
//! What was told last holds until something else is *told*: while the server is away, refuses, or has a list
//! half sent, no pod enters or leaves the mesh.

use std::{collections::BTreeSet, time::Duration};

use k8s_openapi::api::core::v1 as api;
use kube::{Config, core::PartialObjectMeta};
use tokio::sync::mpsc;
use tracing::info;

use self::{
    cache::{Change, Cluster},
    pod::Rules,
    watch::{Told, Watched},
};
use super::{Source, selection::Mode};
use crate::model::pod::Update;

mod backoff;
pub mod cache;
pub mod pod;
mod status_writer;
mod watch;

/// How many events are taken before they are passed on, so that a stream that never ends delays nobody for ever.
const EVENTS_AT_ONCE: usize = 10_000;

/// What is told of the source.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whose pods.
    pub node: String,
    pub mode: Mode,
    /// Names of containers that carry their pod's traffic themselves.
    pub sidecars: BTreeSet<String>,
    /// Whether what became of the pods is written back.
    pub write_back: bool,
}

/// Why the source cannot even begin.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    #[error("cannot use the file that KUBECONFIG names")]
    Kubeconfig(#[source] kube::config::KubeconfigError),
    #[error(
        "cannot find the API server: outside of a pod set KUBECONFIG; inside, mount the service account's token"
    )]
    InCluster(#[source] kube::config::InClusterError),
    #[error("cannot make a client of the API server")]
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

/// `config`, where the API server must not be silent for longer than `limit`.
fn answering_within(limit: Duration, config: &Config) -> Config {
    let mut config = config.clone();
    config.read_timeout = Some(limit);
    config.reset_reader_on_write = true;
    config
}

/// Begins to follow the API server, in tasks that end with the receiver of the updates.
pub fn start(config: &Config, options: Options) -> Result<Source, KubernetesError> {
    let name = format!("Kubernetes at {}", config.cluster_url);
    let (sender, updates) = mpsc::channel(4);
    let (outcomes, told_outcomes) = mpsc::unbounded_channel();
    let (changes, told_changes) = mpsc::unbounded_channel();
    let fields = format!("spec.nodeName={}", options.node);
    let follower = Follower {
        pods: Watched::new("pods", config, Some(fields)).map_err(KubernetesError::Client)?,
        namespaces: Watched::new("namespaces", config, None).map_err(KubernetesError::Client)?,
        cluster: Cluster::new(Rules { mode: options.mode, sidecars: options.sidecars }),
        problems: [None, None],
        told_all: false,
        updates: sender,
        changes: options.write_back.then_some(changes),
    };
    let (outcomes, passed_on) = if options.write_back {
        let client =
            kube::Client::try_from(status_writer::config(config)).map_err(KubernetesError::Client)?;
        let api = status_writer::Api::new(client, options.node);
        (Some(outcomes), Some(tokio::spawn(status_writer::run(api, told_changes, told_outcomes))))
    } else {
        (None, None)
    };
    tokio::spawn(follower.run());
    Ok(Source { name, updates, outcomes, passed_on })
}

struct Follower {
    pods: Watched<api::Pod>,
    /// Only their labels are asked for.
    namespaces: Watched<PartialObjectMeta<api::Namespace>>,
    cluster: Cluster,
    /// Why pods, and why namespaces, cannot be watched at present.
    problems: [Option<String>; 2],
    told_all: bool,
    updates: mpsc::Sender<Update>,
    changes: Option<mpsc::UnboundedSender<Change>>,
}

impl Follower {
    async fn run(mut self) {
        tokio::join!(self.pods.prefer_streaming_lists(), self.namespaces.prefer_streaming_lists());
        loop {
            let before = self.problem();
            tokio::select! {
                // Namespaces first: a pod is told of when its namespace is known.
                biased;
                () = self.updates.closed() => return,
                told = self.namespaces.next() => self.on_namespace(told),
                told = self.pods.next() => self.on_pod(told),
            }
            // What is there already is one batch: sixty pods of a namespace need not be sixty updates.
            for _ in 0..EVENTS_AT_ONCE {
                if let Some(told) = self.namespaces.ready() {
                    self.on_namespace(told);
                } else if let Some(told) = self.pods.ready() {
                    self.on_pod(told);
                } else {
                    break;
                }
            }
            if self.pass_on(before).await.is_err() {
                return;
            }
        }
    }

    fn problem(&self) -> Option<String> {
        let problems: Vec<&str> = self.problems.iter().flatten().map(String::as_str).collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }

    fn on_namespace(&mut self, told: Told<PartialObjectMeta<api::Namespace>>) {
        let [_, problem] = &mut self.problems;
        match told {
            Told::Event(event) => {
                settle(problem, &event);
                self.cluster.on_namespace(event);
            }
            Told::Failed(error) => *problem = Some(error),
            Told::Recovered => *problem = None,
        }
    }

    fn on_pod(&mut self, told: Told<api::Pod>) {
        let [problem, _] = &mut self.problems;
        match told {
            Told::Event(event) => {
                settle(problem, &event);
                self.cluster.on_pod(event);
            }
            Told::Failed(error) => *problem = Some(error),
            Told::Recovered => *problem = None,
        }
    }

    /// Tells the loop what it does not know yet, if anything. Fails when nobody listens any more.
    async fn pass_on(&mut self, before: Option<String>) -> Result<(), mpsc::error::SendError<Update>> {
        let changes = self.cluster.changes();
        let mut news = Vec::new();
        for change in changes {
            if change.is_news {
                news.push((change.uid.clone(), change.entry.clone()));
            }
            if let Some(reporter) = &self.changes {
                // It ends only with us.
                let _ = reporter.send(change);
            }
        }
        if self.cluster.is_whole() && !self.told_all {
            self.told_all = true;
            self.updates.send(Update::All(self.cluster.all())).await?;
        } else if !news.is_empty() {
            self.updates.send(Update::Changed(news)).await?;
        }
        let problem = self.problem();
        match (&before, problem) {
            (before, Some(problem)) if before.as_ref() != Some(&problem) => {
                self.updates.send(Update::Unusable(problem)).await?;
            }
            (Some(_), None) => {
                info!("the API server can be used again");
                self.updates.send(Update::Changed(Vec::new())).await?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// An event shows that the server answers; that a list begins does not.
fn settle<K>(problem: &mut Option<String>, event: &kube::runtime::watcher::Event<K>) {
    if !matches!(event, kube::runtime::watcher::Event::Init) {
        *problem = None;
    }
}

/// The causes of an error, from the outermost in, each once: libraries like to repeat what is below them.
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
