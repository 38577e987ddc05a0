//! `watcher run`: enrols pods until it is stopped.

use std::{
    collections::BTreeSet,
    io::{self, IsTerminal as _},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use adit_ebpf_loader::preflight::{Check, Level};
use anyhow::Context as _;
use clap::Args;
use tracing_subscriber::EnvFilter;

use watcher::{
    agent,
    model::pod::FailMode,
    observe::{cgroups, events::SourceKind},
    source::{
        Source,
        file::watch,
        kubernetes::{self, KubernetesConfig},
        selection::DataplaneLabel,
    },
};

use super::{MountArgs, NodeArgs, environment, preflight};

/// Enrol pods until stopped: those of this node that the API server knows, or those of a file
#[derive(Debug, Args)]
#[command(
    after_help = "Without --detach the kernel's links stay when the watcher ends, and traffic goes on; \
`watcher uninstall` undoes everything.

In a pod of a cluster --kubernetes is the default; elsewhere the API server is found by KUBECONFIG.

Examples:
  watcher run --pods pods.yaml --node a
  watcher run --kubernetes --node worker-1 --fail-mode open
  watcher run --pods pods.yaml --node a --detach --fail-mode open
  watcher run --pods pods.yaml --node a --attach /sys/fs/cgroup/pods --zds-socket /run/a/zds.sock"
)]
pub(super) struct RunArgs {
    /// The pods of this node (YAML); watched, so that an edit takes effect at once
    #[arg(long, value_name = "FILE", conflicts_with = "kubernetes")]
    pods: Option<PathBuf>,
    #[command(flatten)]
    kubernetes: KubernetesArgs,
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    mounts: MountArgs,
    /// Where tunnels connect
    #[arg(long, default_value = "/var/run/ztunnel/ztunnel.sock", value_name = "PATH")]
    zds_socket: PathBuf,
    /// The cgroup above all pods [default: kubepods or kubepods.slice, else the root]
    #[arg(long, value_name = "DIR")]
    attach: Option<PathBuf>,
    /// What happens to enrolled pods' traffic while no tunnel serves them
    #[arg(long, value_enum, default_value_t)]
    fail_mode: FailMode,
    /// The source of events [default: the first of these that works here]
    #[arg(long, value_enum, value_name = "SOURCE")]
    events: Option<SourceKind>,
    /// Have enrolled pods' DNS queries answered by the tunnel, while it answers any; a pod's own `dnsCapture` wins
    #[arg(long)]
    dns_capture: bool,
    /// Only queries to this resolver, which should be one that the tunnel forwards to [default: all]
    #[arg(long = "dns-resolver", value_name = "IP")]
    dns_resolvers: Vec<IpAddr>,
    /// Where /metrics and /healthz/ready are served, such as 127.0.0.1:15022 [default: nowhere]
    #[arg(long, value_name = "ADDRESS")]
    metrics_address: Option<SocketAddr>,
    /// Every so many seconds everything is looked at again, whatever events told
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = clap::value_parser!(u64).range(1..=3600))]
    rescan: u64,
    /// Undo everything on SIGTERM and SIGINT
    #[arg(long)]
    detach: bool,
    /// How log lines are written to stderr; RUST_LOG chooses which
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
}

/// The API server as the source of pods.
#[derive(Debug, Args)]
struct KubernetesArgs {
    /// The pods of this node, as the API server knows them; needs the node's name
    #[arg(long)]
    kubernetes: bool,
    /// The label of namespaces and pods that enrols; the value `none` on a pod leaves it alone
    #[arg(long, value_name = "KEY=VALUE", default_value_t)]
    dataplane_label: DataplaneLabel,
    /// A container of this name carries its pod's traffic itself: the pod is left alone, as with Istio's sidecar
    #[arg(long = "sidecar-container", value_name = "NAME")]
    sidecar_containers: Vec<String>,
    /// Write no annotations and no Events
    #[arg(long)]
    no_write_back: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

pub(super) fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    // As many as resolv.conf(5) may name.
    anyhow::ensure!(
        args.dns_resolvers.len() <= 3,
        "--dns-resolver: {} addresses, expected at most 3",
        args.dns_resolvers.len()
    );
    start_log(args.log_format)?;
    let cgroup_root = args.mounts.root();
    let attach = match &args.attach {
        Some(dir) => cgroup_root.join(dir).components().collect(),
        None => cgroups::pods_dir(&cgroup_root),
    };
    let checks = preflight::checks(&args.mounts.bpffs, &cgroup_root, &attach);
    if checks.iter().any(Check::failed) {
        preflight::print_human(&mut io::stderr(), checks.iter().filter(|check| check.failed()))?;
        anyhow::bail!("this node is not ready, nothing was attached");
    }
    for check in checks.iter().filter(|check| check.level == Level::Warn) {
        tracing::warn!(check = check.name, found = check.found, advice = check.advice, "preflight");
    }
    let wanted = wanted_source(&args)?;
    let config = agent::AgentConfig {
        status_socket: args.node.socket(),
        run_dir: args.node.dir(),
        pins: args.mounts.pins(&args.node.name()),
        node: args.node.name(),
        zds_socket: args.zds_socket,
        cgroup_root,
        attach,
        fail_mode: args.fail_mode,
        events: args.events,
        dns_capture: args.dns_capture,
        dns_resolvers: args.dns_resolvers,
        metrics_address: args.metrics_address,
        rescan: Duration::from_secs(args.rescan),
        detach: args.detach,
    };
    // The loop that owns all state is this thread; a second one speaks with tunnels, the source and askers, so
    // that a tunnel is given its next pod while the loop prepares others.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let source = wanted.start(config.cgroup_root.clone()).await?;
        Ok::<_, anyhow::Error>(agent::run(config, source).await?)
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Where pods are to come from.
enum Wanted {
    PodsFile(PathBuf),
    Kubernetes(KubernetesConfig),
}

fn wanted_source(args: &RunArgs) -> anyhow::Result<Wanted> {
    if let Some(path) = &args.pods {
        return Ok(Wanted::PodsFile(std::path::absolute(path).context("the path of the pods file")?));
    }
    anyhow::ensure!(
        args.kubernetes.kubernetes || environment::is_in_cluster(),
        "no pod source: pass --pods FILE or --kubernetes"
    );
    // The host's name would often do, and where it does not, no pod would ever be found.
    let node = args.node.node.clone().context(
        "which node this is: set NODE_NAME (spec.nodeName by the downward API) or --node to its name in Kubernetes",
    )?;
    Ok(Wanted::Kubernetes(KubernetesConfig {
        node,
        label: args.kubernetes.dataplane_label.clone(),
        sidecars: args.kubernetes.sidecar_containers.iter().cloned().collect::<BTreeSet<_>>(),
        write_back: !args.kubernetes.no_write_back,
    }))
}

impl Wanted {
    async fn start(self, cgroup_root: PathBuf) -> anyhow::Result<Source> {
        match self {
            Self::PodsFile(path) => {
                let what = format!("watch the directory of {}", path.display());
                Ok(watch::start(path, cgroup_root).map_err(agent::cannot(what))?)
            }
            Self::Kubernetes(options) => {
                let config = kubernetes::config(environment::has_kubeconfig()).await?;
                Ok(kubernetes::start(&config, options)?)
            }
        }
    }
}

fn start_log(format: LogFormat) -> anyhow::Result<()> {
    let filter = match environment::log_filter() {
        Some(filter) => EnvFilter::try_new(&filter).with_context(|| format!("RUST_LOG is \"{filter}\""))?,
        // Our own records cover what the client of the API server logs, once and with advice.
        None => EnvFilter::new("info,kube_client=off,kube_runtime=off"),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
