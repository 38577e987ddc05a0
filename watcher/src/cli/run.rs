//! `watcher run`: enrols pods until it is stopped.

use std::{
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
use ztunnel_api::names::ServiceAccount;

use watcher::{
    agent,
    model::pod::FailMode,
    observe::{cgroups, events::SourceKind},
};

use super::{
    MountArgs, NodeArgs, environment, preflight,
    source::{KubernetesArgs, SourceArgs, Wanted},
};

/// Enrol this node's pods until stopped; the API server or a file lists them
#[derive(Debug, Args)]
#[command(
    after_help = "Without --detach the kernel programs stay attached when the watcher ends, and traffic continues; \
`watcher uninstall` removes everything.

In a pod of a cluster --kubernetes is the default; elsewhere KUBECONFIG names the API server.

Examples:
  watcher run --pods pods.yaml --node a
  watcher run --kubernetes --node worker-1 --fail-mode open
  watcher run --pods pods.yaml --node a --detach --fail-mode open
  watcher run --pods pods.yaml --node a --attach /sys/fs/cgroup/pods --zds-socket /run/a/zds.sock"
)]
pub(super) struct RunArgs {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    kubernetes: KubernetesArgs,
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    mounts: MountArgs,
    /// Where tunnels connect
    #[arg(long, default_value = "/var/run/ztunnel/ztunnel.sock", value_name = "PATH")]
    zds_socket: PathBuf,
    /// A tunnel may run in a pod of this service account, as that of a DaemonSet; repeatable
    #[arg(long = "tunnel-account", value_name = "NAMESPACE/NAME", default_values = ["istio-system/ztunnel", "adit-system/ztunnel"])]
    tunnel_accounts: Vec<ServiceAccount>,
    /// The cgroup above all pods [default: kubepods or kubepods.slice, whichever has pods; else the
    /// root]
    #[arg(long, value_name = "DIR")]
    attach: Option<PathBuf>,
    /// Enrolled pods' traffic while no tunnel serves them: refuse it, or let it pass in plaintext
    #[arg(long, value_enum, default_value_t)]
    fail_mode: FailMode,
    /// Where events come from [default: the first of these that works here]
    #[arg(long, value_enum, value_name = "SOURCE")]
    events: Option<SourceKind>,
    /// Send enrolled pods' DNS queries to the tunnel while it answers DNS; a pod's own `dnsCapture`
    /// wins
    #[arg(long)]
    dns_capture: bool,
    /// Capture only queries to this resolver (at most 3) [default: all]
    #[arg(long = "dns-resolver", value_name = "IP")]
    dns_resolvers: Vec<IpAddr>,
    /// Serve /metrics and /healthz/ready here, such as 127.0.0.1:15022 [default: nowhere]
    #[arg(long, value_name = "ADDRESS")]
    metrics_address: Option<SocketAddr>,
    /// Seconds between two scans of everything, which correct for lost events
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = clap::value_parser!(u64).range(1..=3600))]
    rescan: u64,
    /// Seconds for which a pod whose label is off still accepts HBONE, for peers that have not
    /// heard of it yet
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = clap::value_parser!(u64).range(..=600))]
    leave_grace: u64,
    /// The kubelet is who listens on this port of the node: its probes pass to enrolled pods,
    /// whatever the policies and the tunnel do; 0: nobody's do. With --kubernetes only
    #[arg(long, value_name = "PORT", default_value = "10250")]
    kubelet_port: u16,
    /// Leave a pod alone in which a known sidecar is found: listeners on all its ports, by its user. Any
    /// pod that can become that user leaves the mesh so
    #[arg(long)]
    detect_sidecars: bool,
    /// Remove everything on SIGTERM and SIGINT
    #[arg(long)]
    detach: bool,
    /// The format of log lines on stderr; RUST_LOG selects which are written
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
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
    raise_descriptor_limit();
    let cgroup_root = args.mounts.root();
    let attach = match &args.attach {
        Some(dir) => cgroup_root.join(dir).components().collect(),
        None => cgroups::pods_dir(&cgroup_root),
    };
    let checks = preflight::checks(&args.mounts.bpffs, &cgroup_root, &attach);
    if checks.iter().any(Check::failed) {
        preflight::print_human(&mut io::stderr(), checks.iter().filter(|check| check.failed()))?;
        anyhow::bail!("this node is not ready; nothing was attached");
    }
    for check in checks.iter().filter(|check| check.level == Level::Warn) {
        tracing::warn!(check = check.name, found = check.found, advice = check.advice, "preflight");
    }
    let wanted = args.source.wanted(args.node.node.as_deref(), Some(&args.kubernetes))?;
    let config = agent::AgentConfig {
        status_socket: args.node.socket(),
        run_dir: args.node.dir(),
        pins: args.mounts.pins(&args.node.name()),
        node: args.node.name(),
        zds_socket: args.zds_socket,
        tunnel_accounts: args.tunnel_accounts.into_iter().collect(),
        cgroup_root,
        attach,
        fail_mode: args.fail_mode,
        events: args.events,
        dns_capture: args.dns_capture,
        dns_resolvers: args.dns_resolvers,
        metrics_address: args.metrics_address,
        rescan: Duration::from_secs(args.rescan),
        leave_grace: Duration::from_secs(args.leave_grace),
        kubelet_port: Some(args.kubelet_port)
            .filter(|port| *port != 0 && matches!(wanted, Wanted::Kubernetes(_))),
        detect_sidecars: args.detect_sidecars,
        detach: args.detach,
    };
    // This thread runs the loop that owns all state. A second one serves tunnels, the source and
    // commands, so that a tunnel receives its next pod while the loop prepares others.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let source = wanted.start(config.cgroup_root.clone()).await?;
        Ok::<_, anyhow::Error>(agent::run(config, source).await?)
    })?;
    Ok(ExitCode::SUCCESS)
}

/// As many descriptors as may be had: what runs out of them sees nothing and serves nobody.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files");
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
