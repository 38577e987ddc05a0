//! Where `run` and `preflight` take the pods from.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::Args;

use watcher::{
    model::pod::{Entry, Pod, Update},
    source::{
        Source,
        file::watch,
        foreign::ForeignMesh,
        kubernetes::{self, KubernetesConfig},
        selection::LabelSelector,
    },
};

use super::environment;

/// The source of pods.
#[derive(Debug, Args)]
pub(super) struct SourceArgs {
    /// The pods of this node (YAML); an edit takes effect at once
    #[arg(long, value_name = "FILE", conflicts_with = "kubernetes")]
    pods: Option<PathBuf>,
    /// Take this node's pods from the API server; needs the node's name
    #[arg(long)]
    kubernetes: bool,
}

/// How pods of the API server are read, and what is written there.
#[derive(Debug, Args)]
pub(super) struct KubernetesArgs {
    /// A label of namespaces and pods that enrols, whatever its value where none is given;
    /// repeatable. The value `none` on a pod excludes it
    #[arg(
        long = "dataplane-label",
        value_name = "KEY[=VALUE]",
        default_value = "istio.io/dataplane-mode=ambient"
    )]
    dataplane_labels: Vec<LabelSelector>,
    /// Do not enrol pods with a container of this name, which carries their traffic as Istio's
    /// sidecar does
    #[arg(long = "sidecar-container", value_name = "NAME")]
    sidecar_containers: Vec<String>,
    /// Take the taint of this key off the node when every pod that was there is enrolled as far as
    /// possible
    #[arg(long, value_name = "KEY", conflicts_with = "pods", value_parser = taint_key)]
    startup_taint: Option<String>,
    /// The ConfigMap with the lists of ports and CIDRs that the mesh excludes and includes; an edit
    /// takes effect at once. Without the ConfigMap there are none
    #[arg(long, value_name = "NAMESPACE/NAME", conflicts_with = "pods", value_parser = namespaced)]
    lists_config_map: Option<(String, String)>,
    /// Read the lists that pods and namespaces have as annotations for the sidecar of this mesh, where
    /// they have none of ours; repeatable
    #[arg(long, value_name = "MESH", value_enum, conflicts_with = "pods")]
    annotations_of: Vec<ForeignMesh>,
    /// Write no annotations and no Events
    #[arg(long)]
    no_write_back: bool,
}

/// The name of an object in its namespace.
fn namespaced(text: &str) -> Result<(String, String), String> {
    let is_name = |name: &str| !name.is_empty() && !name.contains('/');
    match text.split_once('/') {
        Some((namespace, name)) if is_name(namespace) && is_name(name) => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("expected NAMESPACE/NAME, such as adit-system/adit-lists".to_owned()),
    }
}

/// The key of a taint, without value and effect.
fn taint_key(text: &str) -> Result<String, String> {
    match text {
        "" => Err("expected the key of a taint, such as adit.dev/not-ready".to_owned()),
        key if key.contains(['=', ':', ' ']) => {
            Err("expected the key alone, such as adit.dev/not-ready".to_owned())
        }
        key => Ok(key.to_owned()),
    }
}

/// Which source the arguments select.
pub(super) enum Wanted {
    PodsFile(PathBuf),
    Kubernetes(KubernetesConfig),
}

impl SourceArgs {
    /// Whether they select one.
    pub(super) fn is_given(&self) -> bool {
        self.pods.is_some() || self.kubernetes || environment::is_in_cluster()
    }

    /// The source, of the node `node`; `read`: of the API server, how.
    pub(super) fn wanted(&self, node: Option<&str>, read: Option<&KubernetesArgs>) -> anyhow::Result<Wanted> {
        if let Some(path) = &self.pods {
            return Ok(Wanted::PodsFile(std::path::absolute(path).context("the path of the pods file")?));
        }
        anyhow::ensure!(self.is_given(), "no pod source: pass --pods FILE or --kubernetes");
        let mut config = KubernetesConfig { node: node_of_kubernetes(node)?, ..KubernetesConfig::default() };
        if let Some(read) = read {
            config.labels = read.dataplane_labels.clone().into();
            config.sidecars = read.sidecar_containers.iter().cloned().collect();
            config.startup_taint.clone_from(&read.startup_taint);
            config.lists.clone_from(&read.lists_config_map);
            config.foreign = read.annotations_of.iter().copied().collect();
            config.write_back = !read.no_write_back;
        }
        Ok(Wanted::Kubernetes(config))
    }
}

/// The node's name in Kubernetes. With a host name that is not it, no pod would ever be found.
pub(super) fn node_of_kubernetes(node: Option<&str>) -> anyhow::Result<String> {
    node.map(str::to_owned).context(
        "the node's name is missing: set NODE_NAME (spec.nodeName by the downward API) or --node to its name in Kubernetes",
    )
}

impl Wanted {
    /// Starts it.
    pub(super) async fn start(self, cgroup_root: PathBuf) -> anyhow::Result<Source> {
        match self {
            Self::PodsFile(path) => {
                let failed = format!("cannot watch the directory of {}", path.display());
                watch::start(path, cgroup_root).context(failed)
            }
            Self::Kubernetes(options) => {
                let config = kubernetes::config(environment::has_kubeconfig()).await?;
                Ok(kubernetes::start(&config, options)?)
            }
        }
    }

    /// The pods that it names first, within `limit`.
    pub(super) async fn first_pods(
        self,
        cgroup_root: PathBuf,
        limit: Duration,
    ) -> anyhow::Result<Vec<Arc<Pod>>> {
        let mut source = self.start(cgroup_root).await?;
        source.begin();
        let mut problem = "it does not answer".to_owned();
        let first = async {
            loop {
                match source.updates.recv().await {
                    Some(Update::All(entries)) => return Some(entries),
                    Some(Update::Unusable(why)) => problem = why,
                    Some(Update::Changed(_) | Update::Usable) => {}
                    None => return None,
                }
            }
        };
        match tokio::time::timeout(limit, first).await {
            Ok(Some(entries)) => Ok(entries
                .into_iter()
                .filter_map(|entry| match entry {
                    Entry::Pod(pod) => Some(pod),
                    Entry::Bad(_) => None,
                })
                .collect()),
            Ok(None) | Err(_) => anyhow::bail!("{}: {problem}", source.name),
        }
    }
}
