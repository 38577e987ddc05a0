//! `watcher run`: enrols pods until it is stopped.

use std::{
    io::{self, IsTerminal as _},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::Args;
use tracing_subscriber::EnvFilter;

use crate::{
    desired::{FailMode, file_source},
    node,
    observed::{cgroups, events::SourceKind},
};

use super::{MountArgs, NodeArgs, preflight};

/// Enrol the pods of a file until stopped
#[derive(Debug, Args)]
#[command(
    after_help = "Without --detach the kernel's links stay when the watcher ends, and traffic goes on; \
`watcher uninstall` undoes everything.

Examples:
  watcher run --pods pods.yaml --node a
  watcher run --pods pods.yaml --node a --detach --fail-mode open
  watcher run --pods pods.yaml --node a --attach /sys/fs/cgroup/pods --zds-socket /run/a/zds.sock"
)]
pub struct RunArgs {
    /// The pods of this node (YAML); watched, so that an edit takes effect at once
    #[arg(long, value_name = "FILE")]
    pods: PathBuf,
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
    /// Undo everything on SIGTERM and SIGINT
    #[arg(long)]
    detach: bool,
    /// How log lines are written to stderr; RUST_LOG chooses which
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

pub fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    // As many as resolv.conf(5) may name.
    anyhow::ensure!(
        args.dns_resolvers.len() <= 3,
        "--dns-resolver: {} addresses, expected at most 3",
        args.dns_resolvers.len()
    );
    start_log(args.log_format)?;
    let cgroup_root = args.mounts.root();
    let attach = match args.attach {
        Some(dir) => cgroup_root.join(dir).components().collect(),
        None => cgroups::pods_dir(&cgroup_root),
    };
    let checks = adit_ebpf_loader::preflight::checks(&args.mounts.bpffs, &cgroup_root, Some(&attach));
    if checks.iter().any(|check| !check.ok) {
        preflight::print_human(&mut io::stderr(), checks.iter().filter(|check| !check.ok))?;
        anyhow::bail!("this node is not ready, nothing was attached");
    }
    let pods_file = std::path::absolute(&args.pods).context("the path of the pods file")?;
    let config = node::Config {
        status_socket: args.node.socket(),
        run_dir: args.node.dir(),
        pins: args.mounts.pins(&args.node.node),
        node: args.node.node,
        zds_socket: args.zds_socket,
        cgroup_root,
        attach,
        fail_mode: args.fail_mode,
        events: args.events,
        dns_capture: args.dns_capture,
        dns_resolvers: args.dns_resolvers,
        metrics_address: args.metrics_address,
        detach: args.detach,
    };
    // The loop that owns all state is this thread; a second one speaks with tunnels, the source and askers, so
    // that a tunnel is given its next pod while the loop prepares others.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let what = format!("watch the directory of {}", pods_file.display());
        let source = file_source::start(pods_file, config.cgroup_root.clone()).map_err(node::cannot(what))?;
        node::run(config, source).await
    })?;
    Ok(ExitCode::SUCCESS)
}

fn start_log(format: LogFormat) -> anyhow::Result<()> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(filter) => EnvFilter::try_new(&filter).with_context(|| format!("RUST_LOG is \"{filter}\""))?,
        Err(_) => EnvFilter::new("info"),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
