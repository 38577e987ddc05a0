//! `watcher uninstall`: removes everything that a node's watcher ever installed.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use adit_ebpf_loader::Kernel;
use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use socket2::Type;

use watcher::{
    apply::{journal::Journal, restore},
    control::{self, Request},
    source::kubernetes::{self, TakenBack},
    unix_socket,
};

use super::{MountArgs, NodeArgs, Output, ask_once, environment, source::node_of_kubernetes};

/// Remove all links, programs, maps, rules, routes and sysctls of a node, whether its watcher runs
/// or not
#[derive(Debug, Args)]
#[command(after_help = "A running watcher removes everything and exits. Succeeds when nothing is installed.

Examples:
  watcher uninstall --node a
  watcher uninstall --node worker-1 --kubernetes")]
pub(super) struct UninstallArgs {
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    mounts: MountArgs,
    /// Where tunnels connected: the file is removed unless a process still serves it
    #[arg(long, default_value = "/var/run/ztunnel/ztunnel.sock", value_name = "PATH")]
    zds_socket: PathBuf,
    /// Take the annotations back from the node's pods, at the API server that KUBECONFIG names or
    /// whose pod this is; the default inside of a cluster
    #[arg(long)]
    kubernetes: bool,
    #[arg(short, long, value_enum, default_value = "human")]
    output: Output,
}

/// How long the API server may take for all annotations together.
const ANNOTATIONS_TIME: Duration = Duration::from_secs(15);

pub(super) fn run(args: &UninstallArgs) -> anyhow::Result<ExitCode> {
    let socket = args.node.socket();
    let ran = control::is_served(&socket);
    if ran {
        ask_once::<()>(&args.node, &Request::Detach)
            .context("the running watcher cannot remove everything")?;
        let deadline = Instant::now() + Duration::from_secs(5);
        while control::is_served(&socket) {
            anyhow::ensure!(Instant::now() < deadline, "the running watcher does not exit");
            thread::sleep(Duration::from_millis(20));
        }
    }
    let dir = args.node.dir();
    let mut journal = Journal::open(&dir).context("what the watcher noted cannot be read")?;
    // The links first: they must not lead traffic to where nothing answers any more.
    let pins = args.mounts.pins(&args.node.name());
    let removed = Kernel::remove(&pins).context("cannot remove the pinned links and maps")?;
    let undone = restore::restore_all(&mut journal).context("cannot restore the pods' netns")?;
    for id in journal.tunnels().keys().copied().collect::<Vec<_>>() {
        journal.remove_tunnel(id)?;
    }
    remove_stale(&socket)?;
    // Another watcher, or a CNI agent, may serve it by now: whatever is alive stays.
    let _ = unix_socket::remove_stale(&args.zds_socket, Type::SEQPACKET);
    for empty in [dir.as_path(), &args.node.run_dir, &args.mounts.bpffs.join("adit")] {
        // Another node's files may be in the shared ones.
        let _ = fs::remove_dir(empty);
    }
    // Last: the node is in order whether the API server answers or not.
    let annotations = args.annotations();
    let ok = undone.failed.is_empty()
        && annotations.as_ref().is_none_or(|annotations| annotations.failed.is_empty());
    let mut out = io::stdout().lock();
    match args.output {
        Output::Json => writeln!(
            out,
            "{}",
            json!({"ok": ok, "watcher_stopped": ran, "links": removed.links, "maps": removed.maps, "netns": undone,
                "annotations": annotations})
        )?,
        Output::Human => {
            if ran {
                writeln!(out, "watcher stopped; it removed what it had installed")?;
            }
            writeln!(out, "links removed: {}, maps removed: {}", removed.links, removed.maps)?;
            writeln!(out, "netns restored: {}, gone: {}", undone.netns_restored, undone.netns_gone)?;
            match &annotations {
                Some(annotations) => writeln!(out, "annotations removed: {}", annotations.pods)?,
                None => writeln!(out, "annotations of pods: not looked for (--kubernetes)")?,
            }
            let unannotated = annotations.iter().flat_map(|annotations| &annotations.failed);
            for problem in undone.failed.iter().chain(unannotated) {
                writeln!(out, "left behind: {problem}")?;
            }
        }
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl UninstallArgs {
    /// Takes the annotations back. `None`: no API server is asked.
    fn annotations(&self) -> Option<TakenBack> {
        if !self.kubernetes && !environment::is_in_cluster() {
            return None;
        }
        let taken = || {
            let node = node_of_kubernetes(self.node.node.as_deref())?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let config = kubernetes::config(environment::has_kubeconfig()).await?;
                anyhow::Ok(kubernetes::take_back_annotations(&config, &node, ANNOTATIONS_TIME).await)
            })
        };
        let failed = |error| TakenBack { failed: vec![format!("annotations of pods: {error:#}")], pods: 0 };
        Some(taken().unwrap_or_else(failed))
    }
}

fn remove_stale(socket: &Path) -> io::Result<()> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
