//! `watcher preflight`: checks whether this node can run the watcher.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use adit_ebpf_loader::preflight::{self, Check, Level};
use clap::Args;
use error_reporter::Report;
use serde_json::json;

use watcher::observe::{cgroups, connections, events::SourceKind};

use super::{MountArgs, Output, source::SourceArgs};

/// Check whether this node can run the watcher, and print what it lacks; changes nothing
#[derive(Debug, Args)]
#[command(after_help = "Exit code 1: a requirement is missing. Warnings do not change the exit code.

Examples:
  watcher preflight
  watcher preflight --kubernetes --node worker-1
  watcher preflight -o json | jq '.checks[] | select(.ok | not)'")]
pub(super) struct PreflightArgs {
    #[command(flatten)]
    mounts: MountArgs,
    /// Also check how many pods of this source can be found
    #[command(flatten)]
    source: SourceArgs,
    /// The node's name in Kubernetes
    #[arg(long, env = "NODE_NAME", value_parser = super::node_name)]
    node: Option<String>,
    /// The cgroup above all pods [default: kubepods or kubepods.slice, whichever has pods; else the
    /// root]
    #[arg(long, value_name = "DIR")]
    attach: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value = "human")]
    output: Output,
}

pub(super) fn run(args: &PreflightArgs) -> anyhow::Result<ExitCode> {
    let root = args.mounts.root();
    let attach = args.attach.clone().map_or_else(|| cgroups::pods_dir(&root), |dir| root.join(dir));
    let mut checks = checks(&args.mounts.bpffs, &root, &attach);
    checks.push(process_connector());
    checks.push(watcher::preflight::istio_rules());
    if args.source.is_given() {
        checks.push(pods(args, root, &attach));
    }
    let ok = !checks.iter().any(Check::failed);
    let mut out = io::stdout().lock();
    match args.output {
        Output::Human => print_human(&mut out, checks.iter())?,
        Output::Json => {
            let list: Vec<_> = checks
                .iter()
                .map(|check| {
                    json!({"name": check.name, "ok": !check.failed(), "level": check.level.as_str(),
                        "found": check.found, "needed": check.needed, "advice": check.advice})
                })
                .collect();
            writeln!(out, "{}", json!({"ok": ok, "checks": list}))?;
        }
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The checks that `watcher run` makes first.
pub(super) fn checks(bpffs: &Path, root: &Path, attach: &Path) -> Vec<Check> {
    let mut checks = preflight::checks(bpffs, root, Some(attach));
    checks.extend(watcher::preflight::checks(root, attach));
    checks.push(cutting_connections());
    checks
}

/// How many pods of the source can be found.
fn pods(args: &PreflightArgs, root: PathBuf, attach: &Path) -> Check {
    const LIMIT: Duration = Duration::from_secs(10);
    let found = || {
        let wanted = args.source.wanted(args.node.as_deref(), None)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(wanted.first_pods(root, LIMIT))
    };
    match found() {
        Ok(pods) => watcher::preflight::pods_found(&pods, attach),
        Err(error) => {
            let advice = "give the watcher the rights in charts/adit/templates/watcher-rbac.yaml, or correct the pods file";
            Check::fail("pods", "a source that names the node's pods", format!("{error:#}"), advice)
        }
    }
}

fn cutting_connections() -> Check {
    let (name, needed) =
        ("cutting connections", "SOCK_DESTROY, to cut what pods made in clear before the first watcher ran");
    match connections::can_cut() {
        Ok(()) => Check::ok(name, needed, "works"),
        Err(error) => {
            let advice = "use a kernel with CONFIG_INET_DIAG_DESTROY; without, restart pods that ran before the first watcher did";
            Check::warn(name, needed, error.to_string(), advice)
        }
    }
}

/// Only the second choice among the sources of events, so nothing fails without it.
fn process_connector() -> Check {
    let (name, needed) =
        ("process connector", "an acknowledged LISTEN, for nodes where tracepoints are refused");
    match SourceKind::Connector.probe() {
        Ok(()) => Check::ok(name, needed, "acknowledged"),
        Err(error) => {
            let found = format!("not available, lifecycle ring buffer is used: {}", Report::new(&error));
            Check::ok(name, needed, found)
        }
    }
}

/// One line per check: what was found, and for a failed one what is needed and what to do.
pub(super) fn print_human<'a>(
    out: &mut dyn Write,
    checks: impl Iterator<Item = &'a Check>,
) -> io::Result<()> {
    for Check { name, level, found, needed, advice } in checks {
        match level {
            Level::Ok => writeln!(out, "ok   {name}: {found}")?,
            Level::Warn => writeln!(out, "warn {name}: {found}; wanted: {needed}; to do: {advice}")?,
            Level::Fail => writeln!(out, "FAIL {name}: {found}; needed: {needed}; to do: {advice}")?,
        }
    }
    Ok(())
}
