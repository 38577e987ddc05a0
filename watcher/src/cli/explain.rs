//! `watcher explain`: why a connection is captured or not.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    process::ExitCode,
};

use clap::Args;

use watcher::control::{Caller, Request, explain::Explanation};

use super::{NodeArgs, Output, ask_once};

/// Print the rule that decides about a connection of a pod
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  watcher explain client 10.0.2.3:80
  watcher explain demo/client '[fd00::3]:80' -o json
  watcher explain demo/client 10.0.2.3:80 --uid 1337")]
pub(super) struct ExplainArgs {
    /// The pod that connects: uid, name or namespace/name
    pod: String,
    /// Where it connects to
    #[arg(value_name = "ADDRESS:PORT")]
    destination: SocketAddr,
    /// The process is in this container: its name, or that of its cgroup's directory
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
    /// It runs as this user, as the pod numbers it
    #[arg(long, value_name = "NUMBER")]
    uid: Option<u32>,
    /// It runs as this group, as the pod numbers it
    #[arg(long, value_name = "NUMBER")]
    gid: Option<u32>,
    #[command(flatten)]
    node: NodeArgs,
    #[arg(short, long, value_enum, default_value = "human")]
    output: Output,
}

pub(super) fn run(args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let caller = Caller { container: args.container.clone(), uid: args.uid, gid: args.gid };
    let request = Request::Explain { pod: args.pod.clone(), destination: args.destination, caller };
    let explanation: Explanation = ask_once(&args.node, &request)?;
    let mut out = io::stdout().lock();
    match args.output {
        Output::Json => writeln!(out, "{}", serde_json::to_string(&explanation)?)?,
        Output::Human => {
            writeln!(out, "{} → {}: {}", explanation.pod, explanation.destination, explanation.outbound)?;
            if let Some(because) = &explanation.because {
                writeln!(out, "because of {because}")?;
            }
            if let Some(inbound) = &explanation.inbound {
                writeln!(out, "where it arrives, from others in clear: {inbound}")?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
