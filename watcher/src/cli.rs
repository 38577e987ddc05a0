//! The commands, one file each. Exit code 0: done; 1: failed; 2: wrong arguments.

use std::{io, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand, ValueEnum};

use watcher::{
    control::{self, Answer},
    observe::cgroups,
};

mod completion;
mod environment;
mod explain;
mod preflight;
mod run;
mod source;
mod status;
mod trace;
mod uninstall;

/// Enrols pods into the mesh: finds them, steers their traffic to the node's tunnel, and registers
/// them there.
#[derive(Debug, Parser)]
#[command(
    name = "watcher",
    version,
    after_help = "Examples:
  watcher preflight
  watcher run --pods pods.yaml --node a
  NODE_NAME=worker-1 watcher run --kubernetes
  watcher status --node a
  watcher explain client 10.0.2.3:80 --node a
  watcher uninstall --node a"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Status(status::StatusArgs),
    Preflight(preflight::PreflightArgs),
    Explain(explain::ExplainArgs),
    Trace(trace::TraceArgs),
    Uninstall(uninstall::UninstallArgs),
    Completion(completion::CompletionArgs),
}

/// Which node, and where its watcher keeps run-time files.
#[derive(Clone, Debug, Args)]
struct NodeArgs {
    /// The node's name; also the folder of its maps and links [default: the host's name]
    #[arg(long, env = "NODE_NAME", value_parser = node_name)]
    node: Option<String>,
    /// The folder for run-time files of all nodes
    #[arg(long, default_value = "/run/adit", value_name = "DIR")]
    run_dir: PathBuf,
    /// The socket through which commands query the watcher [default: RUN_DIR/NODE/watcher.sock]
    #[arg(long, value_name = "PATH")]
    status_socket: Option<PathBuf>,
}

impl NodeArgs {
    fn name(&self) -> String {
        self.node.clone().unwrap_or_else(hostname)
    }

    fn dir(&self) -> PathBuf {
        self.run_dir.join(self.name())
    }

    fn socket(&self) -> PathBuf {
        self.status_socket.clone().unwrap_or_else(|| self.dir().join("watcher.sock"))
    }
}

/// Where the kernel's file systems are.
#[derive(Clone, Debug, Args)]
struct MountArgs {
    /// Where bpffs is mounted
    #[arg(long, default_value = "/sys/fs/bpf", value_name = "DIR")]
    bpffs: PathBuf,
    /// Where cgroup2 is mounted [default: found among the mounts]
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
}

impl MountArgs {
    fn pins(&self, node: &str) -> PathBuf {
        self.bpffs.join("adit").join(node)
    }

    /// The cgroup2 root; on a node without one the usual path, which preflight then reports.
    fn root(&self) -> PathBuf {
        let root = self.cgroup_root.clone().or_else(cgroups::find_root);
        root.unwrap_or_else(|| PathBuf::from("/sys/fs/cgroup")).components().collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Human,
    /// For programs
    Json,
}

/// A text that cannot name a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected at most 253 letters, digits, '-', '_' and '.', not starting with '.'")]
struct InvalidNodeName;

/// A name that is one folder.
fn node_name(name: &str) -> Result<String, InvalidNodeName> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) || name.len() > 253 {
        return Err(InvalidNodeName);
    }
    Ok(name.to_owned())
}

fn hostname() -> String {
    nix::sys::utsname::uname()
        .ok()
        .and_then(|found| found.nodename().to_str().map(str::to_owned))
        .filter(|name| node_name(name).is_ok())
        .unwrap_or_else(|| "node".to_owned())
}

/// Runs the command; its failure is printed here, once.
pub(crate) fn run(cli: Cli) -> ExitCode {
    let result = match cli.command {
        Command::Run(args) => run::run(*args),
        Command::Status(args) => status::run(&args),
        Command::Preflight(args) => preflight::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Trace(args) => trace::run(&args),
        Command::Uninstall(args) => uninstall::run(&args),
        Command::Completion(args) => Ok(completion::run(&args)),
    };
    match result {
        Ok(code) => code,
        // The reader is gone (`watcher trace | head`): there is nowhere to print.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("watcher: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// The one answer to `request`.
fn ask_once<T: serde::de::DeserializeOwned>(
    args: &NodeArgs,
    request: &control::Request,
) -> anyhow::Result<T> {
    use anyhow::Context as _;
    let socket = args.socket();
    let mut answers = control::ask::<T>(&socket, request).with_context(|| no_watcher(args))?;
    match answers.next() {
        Some(Ok(Answer::Ok(answer))) => Ok(answer),
        Some(Ok(Answer::Error(problem))) => anyhow::bail!(problem),
        Some(Err(error)) => Err(error).context("cannot read the watcher's answer"),
        None => anyhow::bail!("the watcher ended without an answer"),
    }
}

fn no_watcher(args: &NodeArgs) -> String {
    format!("no watcher of node {} answers at {}", args.name(), args.socket().display())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_commands_are_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_documentation_has_only_commands_that_there_are() {
        testbed::doc_commands::assert_valid(&Cli::command());
    }

    #[test]
    fn a_nodes_name_is_one_folder() {
        assert!(node_name("node-1.example").is_ok());
        for bad in ["", "..", ".hidden", "a/b", "a b"] {
            assert!(node_name(bad).is_err(), "{bad:?}");
        }
    }
}
